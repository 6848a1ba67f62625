"""Plans: from a configuration alone, beside what the same training then takes."""

import json
import shutil

import pytest

from checkpoints import make_checkpoint
from qlora_kit import (
    Pipeline,
    attach_lora,
    load_quantized,
    plan_training,
    planning,
    train_sft,
)
from qlora_kit.cli import main
from qlora_kit.errors import ConfigError, ModelNotFoundError, OfflineError
from qlora_kit.forecast import find_card, list_cards, read_shape
from qlora_kit.forecast import steps as forecast_steps

#: Qwen3-4B, as its config.json has it.
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 9728, "vocab_size": 151936, "tie_word_embeddings": True,
    "hidden_act": "silu", "max_position_embeddings": 40960,
}  # fmt: skip


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A model of 4 billion parameters without any weights."""
    folder = tmp_path_factory.mktemp("big")
    (folder / "config.json").write_text(json.dumps(QWEN3_4B), encoding="utf-8")
    return folder


def plan(model, card, *, row_tokens=None, **options):
    training = {"plan": options.pop("step", None), **options.pop("training", {})}
    asked = Pipeline(model=model, data=None, training=training, **options)
    return plan_training(asked, card=card, row_tokens=row_tokens)


@pytest.mark.parametrize(
    ("step", "measured"),
    [
        ({"checkpointing": "none", "weights": "nf4"}, 66.3),
        ({"checkpointing": "none", "weights": "cache"}, 73.1),
        ({"checkpointing": "full", "weights": "nf4"}, 8.3),
    ],
)
def test_a_plan_is_near_what_was_measured_on_an_h200(big, step, measured):
    """docs/performance.md, packed rows of 16,384 tokens; what torch allocated at most.

    What it reserved for that, which is what is foretold, was 3 to 5% more where that was measured.
    """
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    made = plan(big, "H200", row_tokens=16384, loading={"max_seq_length": 16384}, step=step,
                training=rows)  # fmt: skip
    allocated = (made.memory.total - made.memory.runtime) / 1024**3
    assert measured <= allocated <= measured * 1.1
    assert made.fits
    assert made.parameters == pytest.approx(4.02e9, rel=0.01)


def test_what_does_not_fit_says_what_would(big):
    loading = {"max_seq_length": 16384, "load_in_4bit": False}
    made = plan(big, "RTX 3060 12GB", row_tokens=16384, loading=loading)
    assert not made.fits
    assert "does NOT fit" in str(made)
    assert any("load_in_4bit=True" in one for one in made.remedies)
    again = plan(big, "RTX 3060 12GB", row_tokens=16384, loading={"max_seq_length": 16384})
    assert again.fits
    small = plan(big, "4GB", row_tokens=8192, loading={"max_seq_length": 8192})
    assert not small.fits
    (one, *_) = small.remedies
    assert "max_seq_length=" in one or "smaller model" in one


def test_exports_take_disk(big):
    made = plan(big, "24GB", exports={"lora": {}, "merged_16bit": {}, "gguf": {
        "quantization": ["q4_k_m", "q8_0"]}})  # fmt: skip
    assert made.disk["merged_16bit"] == pytest.approx(2 * 4.02e9, rel=0.02)
    assert made.disk["gguf"] == pytest.approx((4.9 + 8.5) / 8 * 4.02e9, rel=0.02)
    assert made.disk["lora"] < 0.2e9
    assert made.seconds is None, "nothing is known of the speed of a card of 24 GB"
    assert plan(big, "RTX 3090").seconds > plan(big, "H100").seconds > 0


def test_cards_are_found_by_the_names_people_type():
    for name in list_cards():
        assert find_card(name).name == name
        assert find_card(f"NVIDIA GeForce {name}".lower()).name == name
    assert find_card("RTX 3060").name == "RTX 3060 12GB"
    assert find_card("rtx3090 24gb").name == "RTX 3090"
    assert find_card("11.5 GB").memory_gib == 11.5
    for name, near in (("RTX 3095", "RTX 3090"), ("A100", "one of A100 40GB, A100 80GB")):
        with pytest.raises(ConfigError, match=near):
            find_card(name)
    with pytest.raises(ConfigError, match="no card 'RTX 3090 12GB'"):
        find_card("RTX 3090 12GB")


def test_a_plan_counts_what_training_then_does(tiny_llama, alpaca_rows, tmp_path):
    """Without weights, with the same data: steps, parameters and memory are the run's own."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(alpaca_rows), encoding="utf-8")
    training = {"num_train_epochs": 2, "disable_tqdm": True,
                "plan": {"compile": False, "micro_batch_tokens": 200}}  # fmt: skip
    asked = Pipeline(
        model=bare, data=str(data), loading={"max_seq_length": 128, "dtype": "float32"},
        adapter={"r": 4}, training={**training, "output_dir": str(tmp_path / "planned")},
    )  # fmt: skip
    made = plan_training(asked)
    assert list(tmp_path.iterdir()) == [bare, data] or not (tmp_path / "planned").exists()
    model = attach_lora(load_quantized(tiny_llama, 128, "float32"), r=4)
    result = train_sft(model, str(data), output_dir=tmp_path / "run", **training)
    assert made.steps == result.steps
    assert made.trainable_parameters == result.trainable_parameters
    assert made.parameters == result.total_parameters - result.trainable_parameters
    manifest = json.loads(result.manifest_path.read_text(encoding="utf-8"))
    assert manifest["memory"]["peak_gib"] == result.peak_memory_gib
    assert manifest["memory"]["parts"] == made.memory.describe()
    weights = sum(p.nbytes for n, p in model.model.named_parameters() if "lora_" not in n)
    assert made.memory.weights == pytest.approx(weights, rel=0.05)


def test_other_architectures_are_planned_coarsely(tmp_path):
    from transformers import PhiConfig

    config = PhiConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                       vocab_size=500)  # fmt: skip
    shape = read_shape(config)
    assert "of no family that it computes" in shape.obstacle
    config.save_pretrained(tmp_path / "phi")
    made = plan(tmp_path / "phi", "8GB", row_tokens=100)
    assert made.seconds is None
    assert made.memory.logits == 200 * 500 * 8
    assert "estimated coarsely" in str(made)


def test_fused_projections_are_adapted_as_attach_lora_does(tmp_path):
    from transformers import Phi3Config

    Phi3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
               vocab_size=500, pad_token_id=0).save_pretrained(tmp_path)  # fmt: skip
    made = plan(tmp_path, "8GB", row_tokens=100, adapter={"r": 4})
    a_layer = 4 * ((64 + 192) + (64 + 64) + (64 + 256) + (128 + 64))
    assert made.trainable_parameters == 2 * a_layer
    assert "estimated coarsely" not in str(made)


def test_adapted_experts_are_counted_as_attach_lora_attaches_them(tmp_path):
    folder = make_checkpoint(tmp_path / "moe", "qwen3_moe")
    asked = {"r": 4, "target_parameters": "experts", "rank_pattern": {"down_proj": 2}}
    made = plan(folder, "RTX 4090", row_tokens=64, adapter=asked)
    model = attach_lora(load_quantized(folder, dtype="float32", load_in_4bit=False), **asked)
    assert made.trainable_parameters == model.trainable_parameters


def test_what_cannot_be_planned_is_said(big, tmp_path, capsys):
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        plan(tmp_path, "8GB")
    with pytest.raises(OfflineError, match="Allow downloading its configuration"):
        plan("owner/name", "8GB")
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ConfigError, match=r"reads config\.json"):
        plan(tmp_path / "m.gguf", "8GB")
    with pytest.raises(ConfigError, match="row_tokens"):
        plan(big, "8GB", row_tokens=0)
    assert main(["plan", str(big), "--card", "H100", "--card", "2GB", "--row-tokens", "512",
                 "--json"]) == 1  # fmt: skip
    fits = [one["fits"] for one in json.loads(capsys.readouterr().out)]
    assert fits == [True, False]
    assert main(["plan", str(big), "--card", "H1000"]) == 1
    assert "Did you mean 'H100'" in capsys.readouterr().err


LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "intermediate_size": 28672, "vocab_size": 128256, "tie_word_embeddings": False,
    "hidden_act": "silu", "max_position_embeddings": 131072,
}  # fmt: skip


def test_several_cards_share_a_base_where_one_cannot_hold_it(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 10}
    step = {"checkpointing": "full", "weights": "nf4"}
    asked = Pipeline(model=tmp_path, data=None, training={**rows, "plan": step},
                     loading={"max_seq_length": 4096})  # fmt: skip
    alone = plan_training(asked, card="A100 40GB", row_tokens=4096)
    together = plan_training(asked, card="A100 40GB", row_tokens=4096, ranks=4)
    assert not alone.fits
    assert together.fits
    assert together.is_sharded
    # Three quarters of 80 layers in 4 bits are elsewhere; two come and go.
    saved = together.other_memory.weights - together.memory.weights
    assert saved == pytest.approx(70.5e9 * (68.4e9 / 70.5e9) * 0.516 * (0.75 - 2.2 / 80), rel=0.02)
    assert "sharded over them; whole on each card it would be" in str(together)
    assert together.describe()["ranks"] == 4
    # Where it fits whole, it stays so, and each card is as fast as one alone but for the waiting.
    large = plan_training(asked, card="H200", row_tokens=4096, ranks=2)
    assert not large.is_sharded
    assert large.other_memory.fits
    one = plan_training(asked, card="H200", row_tokens=4096)
    assert large.tokens_per_second == pytest.approx(2 * 0.93 * one.tokens_per_second, rel=1e-3)
    kept = Pipeline(model=tmp_path, data=None, loading={"max_seq_length": 4096},
                    training={**rows, "plan": {**step, "shard": False}})  # fmt: skip
    assert not plan_training(kept, card="A100 40GB", row_tokens=4096, ranks=4).fits
    with pytest.raises(ConfigError, match="ranks"):
        plan_training(asked, ranks=0)
    command = ["plan", str(tmp_path), "--row-tokens", "4096", "--card", "A100 40GB", "--json",
               "--nproc", "4", "--per-device-train-batch-size", "1",
               "--gradient-accumulation-steps", "1"]  # fmt: skip
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)[0]["sharded"] is True


@pytest.mark.parametrize(
    "settings", [{"card": 5}, {"card": "0GB"}, {"row_tokens": 2**40}, {"ranks": 10**6}]
)
def test_what_no_machine_is_or_reads_is_refused(big, settings):
    asked = Pipeline(model=big, data=None)
    with pytest.raises(ConfigError) as caught:
        plan_training(asked, **settings)
    assert caught.value.parameter in settings


@pytest.mark.parametrize(
    ("step", "size", "ranks", "low", "high"),
    [
        # docs/performance.md and docs/scale-out.md: tokens a second of all cards, on H200s.
        ({"checkpointing": "none", "weights": "nf4"}, 16384, 1, 25_600, 27_330),
        ({"checkpointing": "full", "weights": "nf4"}, 16384, 1, 19_221, 20_154),
        ({"checkpointing": "full", "weights": "nf4"}, 16384, 2, 39_651, 39_651),
        ({"checkpointing": "full", "weights": "nf4"}, 16384, 4, 78_730, 78_730),
        (None, 8 * 226, 1, 17_860, 20_740),
        (None, 8 * 226, 2, 37_239, 37_239),
    ],
)
def test_a_plans_speed_is_near_what_was_measured(big, step, size, ranks, low, high, monkeypatch):
    """Packed rows hold short examples, which attend to themselves alone."""
    rows = forecast_steps.RowTokens((size,), 226, 10_000, attended=320.0)
    monkeypatch.setattr(planning, "count_tokens", lambda *arguments: rows)
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "plan": step}
    asked = Pipeline(model=big, data=None, training=training, loading={"max_seq_length": 16384})
    made = plan_training(asked, card="H200", ranks=ranks)
    assert low * 0.88 <= made.tokens_per_second <= high * 1.12


def test_a_long_example_attends_to_more_than_packed_short_ones():
    packed = forecast_steps.RowTokens(
        (4096, 4096), 512, 2, forecast_steps.find_attended([512] * 16)
    )
    assert packed.average_attended == 512
    assert forecast_steps.RowTokens((4096, 4096), 4096, 2).average_attended == 4096
    # Most tokens lie in the long one.
    assert forecast_steps.find_attended([100, 900]) == 820
    assert packed.cut(256).average_attended == 256
