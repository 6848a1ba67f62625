"""Saved adapters, ours and other tools': all of them is loaded, or what is not is named."""

import json
import logging
import shutil

import pytest

from adapter_folders import (
    TEMPLATE,
    copy_changed,
    load_plain_adapter,
    make_own_tokenizer,
    make_peft,
)
from checkpoints import make_checkpoint
from forward import are_same, logits_of
from qlora_kit import attach_lora, export_model, generate_stream, load_quantized, train_sft
from qlora_kit.errors import ConfigError, ModelNotFoundError, UnsupportedModelError

#: 384 tokens of the tiny base and the one that is added.
ROWS = 385


@pytest.fixture(scope="module")
def plain(tiny_llama, tmp_path_factory):
    """What plain peft saves."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    make_peft(tiny_llama, target_modules=["q_proj", "v_proj", "down_proj"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def resized(tiny_llama, tmp_path_factory):
    """An adapter with an added token, its embeddings and its tokenizer, and the live logits."""
    folder = tmp_path_factory.mktemp("resized") / "adapter"
    model = make_peft(tiny_llama, rows=ROWS)
    model.save_pretrained(folder, save_embedding_layers=True)
    make_own_tokenizer(tiny_llama).save_pretrained(folder)
    return folder


def load(folder, **options):
    return load_quantized(folder, 64, "float32", False, **options)


# -- tensors that find no place ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_modules": ["q_proj"]}, r"layers\.0\.\S+\.lora_A\.weight.*target_modules"),
        ({"target_modules": None}, r"down_proj\.lora_A\.weight.*target_modules"),
        ({"layers_to_transform": [0]}, r"layers\.1\.\S+\.lora_A\.weight"),
    ],
    ids=["fewer", "lost", "layers"],
)
def test_tensors_without_a_place_are_named(plain, tmp_path, changes, named):
    folder = copy_changed(plain, tmp_path / "adapter", **changes)
    with pytest.raises(UnsupportedModelError, match=rf"no place.*{named}"):
        load(folder)


def test_layers_beyond_the_bases_are_named(plain, tmp_path):
    short = make_checkpoint(tmp_path / "short", "llama", num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\..*has layers 0 to 0"):
        load(plain, base=short)


# -- the tokenizer beside the adapter ------------------------------------------------------------


def test_the_adapters_tokenizer_is_the_one_it_was_trained_with(resized, tiny_llama, tmp_path):
    from transformers import AutoTokenizer

    wanted = AutoTokenizer.from_pretrained(str(resized))
    model = load(resized)
    messages = [{"role": "user", "content": "Say 5"}]
    for options in ({"tokenize": False}, {"tokenize": True}):
        asked = {"add_generation_prompt": True, **options}
        assert model.tokenizer.apply_chat_template(messages, **asked) == (
            wanted.apply_chat_template(messages, **asked)
        )
    assert model.tokenizer.chat_template == TEMPLATE
    # Answers end where its own do, and where the base's generation config says besides.
    assert model.stop_token_ids == (384, 2)
    assert list(generate_stream(model, "Say 5", max_new_tokens=2))
    for kind in ("lora", "merged_16bit"):
        export_model(model, kind, tmp_path / kind)
        written = AutoTokenizer.from_pretrained(str(tmp_path / kind))
        assert (written.eos_token, written.chat_template) == ("<|turn_end|>", TEMPLATE)
        assert written("a<|turn_end|>")["input_ids"] == wanted("a<|turn_end|>")["input_ids"]
        settings = json.loads((tmp_path / kind / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [384, 2]


def test_a_tokenizer_like_the_bases_changes_nothing(plain, tiny_llama, tmp_path, caplog):
    folder = copy_changed(plain, tmp_path / "adapter")
    make_own_tokenizer(tiny_llama, tokens=()).save_pretrained(folder)
    with caplog.at_level(logging.INFO):
        model = load(folder)
    assert "beside the adapter" not in caplog.text
    assert model.tokenizer.name_or_path == str(tiny_llama)


def test_added_tokens_without_embeddings_are_refused(plain, tiny_llama, tmp_path):
    folder = copy_changed(plain, tmp_path / "adapter")
    make_own_tokenizer(tiny_llama).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=r"<\|turn_end\|>', token 384 of 384"):
        load(folder)


def test_a_tokenizer_of_another_model_is_refused(plain, tiny_llama, tmp_path):
    folder = copy_changed(plain, tmp_path / "adapter")
    make_own_tokenizer(tiny_llama, tokens=()).save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match=r"numbers tokens otherwise.*'[ab]' is token"):
        load(folder)


def test_half_a_tokenizer_is_refused(plain, tmp_path):
    folder = copy_changed(plain, tmp_path / "adapter")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    with pytest.raises(ModelNotFoundError, match=r"of which tokenizer_config\.json is left"):
        load(folder)


# -- vocabularies that were resized ------------------------------------------------------------


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_resized_vocabulary_goes_in_and_out(resized, tiny_llama, tmp_path, load_in_4bit):
    import torch

    expected = logits_of(load_plain_adapter(tiny_llama, resized, ROWS))
    model = load_quantized(resized, 64, "float32", load_in_4bit)
    if not load_in_4bit:
        assert are_same(logits_of(model.model), expected)
    export_model(model, "lora", tmp_path / "lora", verify="full")
    again = load_plain_adapter(tiny_llama, tmp_path / "lora", ROWS)
    assert torch.equal(logits_of(again), expected)
    # The base is of another vocabulary than its file, in both verifications.
    artifact = export_model(model, "merged_16bit", tmp_path / "merged", verify="full")
    assert artifact.verification.passed
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == ROWS


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["saved", "adapted"],
)
def test_trained_embeddings_of_a_resized_vocabulary_come_back(tiny_llama, tmp_path, options):
    model = make_peft(tiny_llama, rows=448, **options)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert are_same(logits_of(load(tmp_path / "adapter").model), logits_of(model))


def test_a_vocabulary_without_its_rows_is_refused(tiny_llama, tmp_path):
    model = make_peft(tiny_llama, rows=448, target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(UnsupportedModelError, match="448 token embeddings, the base has 384"):
        load(tmp_path / "adapter")


# -- which base ------------------------------------------------------------------------------------


def test_the_base_is_the_one_that_was_named_last(adapted16, tiny_llama, tmp_path):
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    third = shutil.copytree(tiny_llama, tmp_path / "third")
    export_model(adapted16, "lora", tmp_path / "adapter")
    assert load(tmp_path / "adapter").base.path == tiny_llama
    edited = copy_changed(
        tmp_path / "adapter", tmp_path / "edited", base_model_name_or_path=str(other)
    )
    assert load(edited).base.path == other
    moved = load(edited, base=third)
    assert moved.base.path == third
    assert moved.model.peft_config["default"].base_model_name_or_path == str(third)
    shutil.rmtree(other)
    with pytest.raises(ModelNotFoundError, match=r"other, which is not there.*base=\.\.\."):
        load(edited)


def test_a_base_that_cannot_be_one_is_refused(plain, tiny_llama):
    with pytest.raises(ConfigError, match="is a model of its own"):
        load(tiny_llama, base=tiny_llama)
    with pytest.raises(UnsupportedModelError, match="is an adapter itself"):
        load(plain, base=plain)
    with pytest.raises(ConfigError, match="base must be a folder"):
        load(plain, base=5)


# -- configurations as other tools write them -----------------------------------------------------


def test_nulls_are_defaults(plain, tmp_path):
    import torch

    expected = logits_of(load(plain).model)
    nulls = {"bias": None, "rank_pattern": None, "alpha_pattern": None, "lora_dropout": None,
             "use_rslora": None, "use_dora": None, "init_lora_weights": None,
             "fan_in_fan_out": None, "loftq_config": None}  # fmt: skip
    model = load(copy_changed(plain, tmp_path / "adapter", **nulls))
    assert torch.equal(logits_of(model.model), expected)
    assert (model.adapter.bias, model.adapter.rank_pattern) == ("none", None)
    export_model(model, "lora", tmp_path / "lora")
    with pytest.raises(UnsupportedModelError, match="no value for r"):
        load(copy_changed(plain, tmp_path / "rank", r=None))


@pytest.mark.parametrize(
    ("start", "load_in_4bit"),
    [
        ("orthogonal", True),
        ("mica", False),
        *[
            pytest.param(start, load_in_4bit, marks=pytest.mark.slow)
            for start, load_in_4bit in [
                ("orthogonal", False), ("mica", True), ("eva", True), ("gaussian", True),
            ]
        ],
    ],
)  # fmt: skip
def test_starts_that_leave_the_base_alone_load_on_any(plain, tmp_path, start, load_in_4bit, caplog):
    import torch

    expected = logits_of(load_quantized(plain, 64, "float32", load_in_4bit).model)
    folder = copy_changed(plain, tmp_path / "adapter", init_lora_weights=start)
    model = load_quantized(folder, 64, "float32", load_in_4bit)
    assert torch.equal(logits_of(model.model), expected)
    assert ("A and B train" in caplog.text) is (start == "mica")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_changed_the_base_say_the_way_out_of_a_quantized_one(plain, tmp_path, start):
    folder = copy_changed(plain, tmp_path / "adapter", init_lora_weights=start)
    with pytest.raises(ConfigError, match=rf"{start}.*nf4 base.*load_in_4bit=False"):
        load_quantized(folder, 64, "float32")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init_lora_weights": "corda"}, "'corda', which changed the base's weights"),
        ({"megatron_config": {"a": 1}}, "megatron_config.*Set it to null"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"peft_type": "VERA"}, "VERA"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded_is_named(plain, tmp_path, changes, named):
    folder = copy_changed(plain, tmp_path / "adapter", **changes)
    with pytest.raises(UnsupportedModelError, match=named) as raised:
        load(folder)
    assert "damaged" not in str(raised.value)


@pytest.mark.parametrize(
    "modules",
    [None, pytest.param(["embed_tokens", "lm_head"], marks=pytest.mark.slow)],
    ids=["frozen", "trained"],
)
def test_a_checkpoint_of_a_resized_vocabulary_comes_back(
    tiny_llama, tmp_path, alpaca_rows, modules
):
    import torch

    model = load(tiny_llama)
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn_end|>"]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.model.resize_token_embeddings(ROWS)
    model = attach_lora(model, r=2, modules_to_save=modules)
    train_sft(
        model, alpaca_rows, output_dir=tmp_path / "run", max_steps=1, save_steps=1,
        learning_rate=0.01, disable_tqdm=True,
    )  # fmt: skip
    again = load(tmp_path / "run" / "checkpoint-1")
    assert again.tokenizer.convert_tokens_to_ids("<|turn_end|>") == 384
    assert torch.equal(logits_of(again.model), logits_of(model.model))
    export_model(model, "lora", tmp_path / "lora", verify="full")
    assert torch.equal(logits_of(load(tmp_path / "lora").model), logits_of(model.model))
