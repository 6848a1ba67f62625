"""Training: what is learned, what is reported, what is refused, and how it stops."""

import json
import math
import os
import signal

import pytest

from forward import tolerance
from qlora_kit import AlpacaFormatter, attach_lora, load_quantized, train_sft
from qlora_kit.engines.checkpointing import is_checkpointing
from qlora_kit.errors import ConfigError, DataError, UnknownOptionError

FAST = {
    "max_steps": 4, "save_strategy": "no", "learning_rate": 2e-2, "warmup_steps": 1,
    "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture
def make_model(tiny_llama):
    def make(**arguments):
        loaded = load_quantized(tiny_llama, max_seq_length=128, dtype="float32", **arguments)
        return attach_lora(loaded, r=4)

    return make


@pytest.fixture
def model(make_model):
    return make_model()


def _train(model, rows, folder, **arguments):
    formatter = AlpacaFormatter(model.tokenizer)
    return train_sft(model, formatter.load(rows), output_dir=folder, **{**FAST, **arguments})


def again(losses, rel=0.0):
    """The losses of a run repeated: within ``rel`` on a CPU, bit for bit by default.

    Another order of the rows moves them by 2e-4 and more.
    """
    return pytest.approx(losses, rel=tolerance(cpu=rel, gpu=5e-5), abs=0.0)


def test_training_lowers_the_loss_and_reports_what_it_did(model, alpaca_rows, tmp_path):
    result = _train(model, alpaca_rows, tmp_path, max_steps=8)
    assert result.steps == len(result.losses) == 8
    assert result.losses[-1] < 0.95 * result.losses[0]
    assert result.losses[0] == pytest.approx(math.log(384), rel=0.1)
    assert 0 < result.trained_tokens < result.tokens_seen
    assert result.tokens_per_second == pytest.approx(result.tokens_seen / result.seconds)
    # A GPU counts what torch has reserved on it, a CPU the whole process.
    least = 0 if model.model.device.type == "cuda" else 0.1
    assert result.peak_memory_gib >= result.memory_before_gib > least
    assert result.device
    assert {"torch", "trl", "peft", "transformers"} <= set(result.versions)
    assert not result.was_interrupted
    assert model.record.training is result
    assert "8 steps" in str(result)


def test_the_result_says_how_steps_were_computed(model, alpaca_rows, tmp_path):
    fast = _train(model, alpaca_rows, tmp_path, max_steps=1, plan={"compile": False})
    assert fast.plan.startswith("micro-batches of up to ")
    manifest = json.loads(fast.manifest_path.read_text(encoding="utf-8"))
    assert manifest["result"]["plan"] == fast.plan
    assert 0 < manifest["memory"]["predicted_gib"] < 1
    taken = fast.peak_memory_gib - fast.memory_before_gib
    assert manifest["memory"]["measured_gib"] == pytest.approx(taken)
    plain = _train(model, alpaca_rows, tmp_path, max_steps=1, plan=False)
    assert plain.plan == "TRL and peft"
    manifest = json.loads(plain.manifest_path.read_text(encoding="utf-8"))
    assert manifest["memory"]["predicted_gib"] is None


def test_after_early_stopping_the_weights_are_said_to_be_those_of_the_best_step(
    model, alpaca_rows, tmp_path
):
    from safetensors.torch import load_file
    from transformers import EarlyStoppingCallback

    result = _train(
        model, alpaca_rows, tmp_path, max_steps=12,
        eval_dataset=alpaca_rows[:4], eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        # The loss falls from the first step on, so that is the best where more is better.
        metric_for_best_model="eval_loss", greater_is_better=True,
        callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    losses = dict(result.eval_losses)
    assert result.best_step == max(losses, key=losses.get) < result.steps < 12
    assert f"the weights are those of step {result.best_step}" in str(result)
    manifest = json.loads(result.manifest_path.read_text(encoding="utf-8"))
    assert manifest["result"]["best_step"] == result.best_step
    saved = load_file(tmp_path / f"checkpoint-{result.best_step}" / "adapter_model.safetensors")
    live = {name.replace(".default", ""): p for name, p in model.model.named_parameters()}
    assert all(live[name].cpu().equal(tensor) for name, tensor in saved.items())
    assert _train(model, alpaca_rows, tmp_path / "plain", max_steps=1).best_step is None


def test_the_manifest_says_what_happened_and_holds_no_token(model, alpaca_rows, tmp_path):
    result = _train(model, alpaca_rows, tmp_path, hub_token="hf_secret")
    text = result.manifest_path.read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert "hf_secret" not in text
    assert manifest["kind"] == "training"
    assert manifest["base"]["quantization"] == "nf4"
    assert manifest["adapter"]["r"] == 4
    assert manifest["formatter"]["eos_token"] == "<|im_end|>"
    assert manifest["seeds"] == {"training": 3407, "adapter": 3407}
    assert manifest["data"]["rows"] == 12
    assert manifest["data"]["fingerprint"]
    assert manifest["data"]["template_fingerprint"]
    assert manifest["result"]["losses"] == pytest.approx(list(result.losses))


def test_defaults_are_the_classic_scripts(model, alpaca_rows, tmp_path):
    formatter = AlpacaFormatter(model.tokenizer)
    result = train_sft(
        model, formatter.load(alpaca_rows), output_dir=tmp_path, max_steps=2, save_strategy="no"
    )
    arguments = json.loads(result.manifest_path.read_text(encoding="utf-8"))["arguments"]
    wanted = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "warmup_steps": 5,
        "weight_decay": 0.01, "lr_scheduler_type": "linear", "seed": 3407, "logging_steps": 1,
    }  # fmt: skip
    assert {name: arguments[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("dtype", "given", "bf16", "fp16"),
    [
        ("float32", {"fp16": False}, False, False),
        ("float32", {"bf16": False}, False, False),
        ("float32", {"bf16": True}, True, False),
        ("bfloat16", {"fp16": False}, True, False),
        ("bfloat16", {"bf16": False}, False, False),
        ("bfloat16", {"fp16": True}, False, True),
    ],
)
def test_one_precision_flag_leaves_the_other_to_the_model(
    tiny_llama, tmp_path, dtype, given, bf16, fp16
):
    import torch

    from qlora_kit.training.arguments import Optimizer, build_arguments

    model = attach_lora(load_quantized(tiny_llama, 128, dtype), r=4)
    arguments = build_arguments(
        model, given, output_dir=tmp_path, device=torch.device("cpu"),
        optimizer=Optimizer("sgd"), has_eval=False,
    )  # fmt: skip
    assert (arguments.bf16, arguments.fp16) == (bf16, fp16)


def test_the_same_seed_gives_the_same_losses(make_model, alpaca_rows, tmp_path):
    first = _train(make_model(), alpaca_rows, tmp_path / "a")
    second = _train(make_model(), alpaca_rows, tmp_path / "b")
    other = _train(make_model(), alpaca_rows, tmp_path / "c", seed=1)
    assert first.losses == again(second.losses)
    assert first.losses != again(other.losses)


@pytest.mark.parametrize("arguments", [
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    {"padding_free": True},
])  # fmt: skip
def test_the_split_into_micro_batches_does_not_change_the_steps(
    make_model, alpaca_rows, tmp_path, arguments
):
    classic = _train(make_model(), alpaca_rows, tmp_path / "a", max_grad_norm=1e9)
    other = _train(make_model(), alpaca_rows, tmp_path / "b", max_grad_norm=1e9, **arguments)
    assert other.losses == pytest.approx(classic.losses, rel=2e-4)
    assert other.tokens_seen == classic.tokens_seen
    assert other.trained_tokens == classic.trained_tokens


def test_packing_trains_every_example_once_per_epoch(make_model, alpaca_rows, tmp_path):
    plain = _train(
        make_model(), alpaca_rows, tmp_path / "a", max_steps=-1, num_train_epochs=1,
        per_device_train_batch_size=12, gradient_accumulation_steps=1,
    )  # fmt: skip
    packed = _train(
        make_model(), alpaca_rows, tmp_path / "b", max_steps=-1, num_train_epochs=1,
        per_device_train_batch_size=12, gradient_accumulation_steps=1, packing=True,
    )  # fmt: skip
    assert packed.tokens_seen == plain.tokens_seen
    assert packed.trained_tokens == plain.trained_tokens
    # One step over all rows: the same mean, whatever the layout.
    assert packed.losses == pytest.approx(plain.losses, rel=1e-4)


def test_epochs_given_alone_replace_the_default_steps(model, alpaca_rows, tmp_path):
    result = train_sft(
        model, AlpacaFormatter(model.tokenizer).load(alpaca_rows), output_dir=tmp_path,
        num_train_epochs=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    assert result.steps == 4  # 12 rows in steps of 8, twice


def test_only_the_adapter_changes_and_the_model_is_left_as_found(model, alpaca_rows, tmp_path):
    import torch

    module = model.model
    frozen = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    module.eval()
    forward, use_cache = module.get_base_model().forward.__func__, module.config.use_cache
    _train(model, alpaca_rows, tmp_path, gradient_checkpointing=True)
    for name, parameter in module.named_parameters():
        before = frozen.get(name, trained.get(name))
        assert torch.equal(parameter, before) is (name in frozen), name
        assert parameter.dtype is before.dtype, name
    assert module.training is False
    assert module.config.use_cache == use_cache
    assert module.get_base_model().forward.__func__ is forward
    assert not is_checkpointing(module)
    assert not module.get_input_embeddings()._forward_hooks


def test_training_again_goes_on_from_where_it_was(model, alpaca_rows, tmp_path):
    first = _train(model, alpaca_rows, tmp_path / "a", max_steps=6)
    second = _train(model, alpaca_rows, tmp_path / "b", max_steps=6)
    assert second.losses[0] < 0.95 * first.losses[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_base_trains_in_every_dtype(tiny_qwen3, alpaca_rows, tmp_path, dtype, bits):
    import torch

    loaded = load_quantized(tiny_qwen3, 128, dtype, load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = attach_lora(loaded, r=4)
    result = _train(model, alpaca_rows, tmp_path, max_steps=6)
    assert result.losses[-1] < result.losses[0]
    assert {p.dtype for p in model.model.parameters() if p.requires_grad} == {torch.float32}


def test_generating_before_and_during_training_does_not_change_it(
    make_model, alpaca_rows, tmp_path
):
    from transformers import TrainerCallback

    from qlora_kit import generate_stream

    plain = _train(make_model(), alpaca_rows, tmp_path / "a")
    model = make_model()
    asked = []

    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            asked.extend(generate_stream(model, "Say the number", max_new_tokens=3))

    asked.extend(generate_stream(model, "Say the number", max_new_tokens=3))
    result = _train(model, alpaca_rows, tmp_path / "b", callbacks=[Asks()])
    assert len(asked) >= 5
    assert result.losses == again(plain.losses, rel=1e-6)


def test_evaluation_runs_by_itself_when_rows_are_given(model, alpaca_rows, tmp_path):
    formatter = AlpacaFormatter(model.tokenizer)
    rows, held_out = formatter.load(alpaca_rows).split(0.25, seed=0)
    result = train_sft(
        model, rows, output_dir=tmp_path, eval_dataset=held_out, **{**FAST, "max_steps": 8}
    )
    assert [step for step, _ in result.eval_losses] == [2, 4, 6, 8]
    assert result.eval_losses[-1][1] < result.eval_losses[0][1]
    counted = len([entry for entry in result.log_history if "eval_loss" in entry])
    assert counted == 4
    # Evaluation is not training.
    assert result.tokens_seen < 8 * 8 * 128


def test_unknown_fields_name_the_nearest(model, alpaca_rows, tmp_path):
    with pytest.raises(UnknownOptionError, match="'learning_rate'"):
        _train(model, alpaca_rows, tmp_path, learning_rat=1e-3)
    with pytest.raises(TypeError, match="'warmup_steps'"):
        _train(model, alpaca_rows, tmp_path, warmup_step=3, zzzz=1)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"completion_only_loss": True}, "response_only=True"),
        ({"assistant_only_loss": True}, "ChatFormatter"),
        ({"eos_token": "</s>"}, "eos_token"),
        ({"model_init_kwargs": {"a": 1}}, "load_quantized"),
        ({"truncation_mode": "keep_end"}, "truncation"),
        ({"truncation": "begin"}, "truncation"),
        ({"max_length": 1}, "max_length"),
        ({"learning_rate": "fast"}, "learning_rate must be"),
        ({"learning_rate": math.nan}, "learning_rate must be"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"max_steps": "a"}, "max_steps"),
        ({"max_steps": -1, "num_train_epochs": 0}, "would train nothing"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"seed": "a"}, "seed"),
        ({"packing": "yes"}, "packing must be True or False"),
        ({"callbacks": [3]}, "TrainerCallback"),
        ({"eval_strategy": "steps"}, "give eval_dataset"),
        ({"report_to": "nowhere"}, "there is no tracker 'nowhere'"),
        ({"formatter": "x"}, "formatter must be"),
        ({"output_dir": ""}, "output_dir"),
        ({"output_dir": __file__}, "is a file"),
        ({"resume_from_checkpoint": 3}, "True or a path"),
        ({"lr_scheduler_type": "wavy"}, "wavy"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs lr_scheduler_kwargs.*num_decay"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 999}, "train nothing"),
    ],
)
def test_settings_that_cannot_work_are_refused(model, alpaca_rows, tmp_path, arguments, advice):
    folder = arguments.pop("output_dir", tmp_path / "out")
    with pytest.raises(ConfigError, match=advice):
        _train(model, alpaca_rows, folder, **arguments)
    assert model.record.training is None


def test_models_without_an_adapter_to_train_are_refused(tiny_llama, alpaca_rows, tmp_path):
    loaded = load_quantized(tiny_llama)
    with pytest.raises(ConfigError, match="attach_lora"):
        train_sft(loaded, alpaca_rows)
    attach_lora(loaded, r=2).model.save_pretrained(tmp_path / "adapter")
    frozen = load_quantized(tmp_path / "adapter", is_trainable=False)
    with pytest.raises(ConfigError, match="is_trainable=True"):
        train_sft(frozen, alpaca_rows)


def test_bad_rows_are_refused_before_training(model, tmp_path):
    with pytest.raises(DataError, match=r"(?i)empty|no rows"):
        _train(model, [], tmp_path)
    with pytest.raises(DataError, match="instruction"):
        _train(model, [{"question": "a", "answer": "b"}], tmp_path)
    with pytest.raises(DataError, match="needs rows"):
        train_sft(model, None, output_dir=tmp_path)
    assert not any(tmp_path.iterdir())


def test_plain_datasets_and_tokenized_rows_are_taken(make_model, alpaca_rows, tmp_path):
    from datasets import Dataset

    by_rows = _train(make_model(), alpaca_rows, tmp_path / "a")
    by_dataset = train_sft(
        make_model(), Dataset.from_list(alpaca_rows), output_dir=tmp_path / "b", **FAST
    )
    assert by_dataset.losses == again(by_rows.losses)
    model = make_model()
    formatter = AlpacaFormatter(model.tokenizer)
    encoded = formatter.encode(formatter.load(alpaca_rows), max_length=128).dataset
    tokenized = train_sft(model, encoded, output_dir=tmp_path / "c", **FAST)
    assert tokenized.losses == again(by_rows.losses)


def test_the_notebooks_text_column_is_taken_with_its_end_token(make_model, alpaca_rows, tmp_path):
    from datasets import Dataset

    by_rows = _train(make_model(), alpaca_rows, tmp_path / "a")
    model = make_model()
    formatter = AlpacaFormatter(model.tokenizer)
    for end in ("", model.tokenizer.eos_token):
        text = [
            f"{formatter.prompt(row['instruction'], row['input'])}{row['output']}{end}"
            for row in alpaca_rows
        ]
        result = train_sft(
            make_model(), Dataset.from_dict({"text": text}), output_dir=tmp_path / "b", **FAST
        )
        assert result.tokens_seen == pytest.approx(by_rows.tokens_seen, rel=0.02)
        assert result.losses[0] == pytest.approx(by_rows.losses[0], rel=0.02)


def test_eight_bit_adam_is_taken_where_it_runs(model, alpaca_rows, tmp_path):
    if model.model.device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    result = _train(model, alpaca_rows, tmp_path)
    assert result.optimizer == "adamw_8bit"
    assert result.optimizer_note == ""
    assert result.losses[-1] < result.losses[0]


def test_optimizers_fall_back_where_they_do_not_run(model, alpaca_rows, tmp_path, caplog):
    if model.model.device.type == "cuda":
        pytest.skip("8-bit Adam runs on this machine")
    with caplog.at_level("INFO"):
        result = _train(model, alpaca_rows, tmp_path, optim="adamw_8bit")
    assert result.optimizer == "adamw_torch"
    assert "adamw_8bit -> adamw_torch" in result.optimizer_note
    assert result.optimizer_note in caplog.text
    manifest = json.loads(result.manifest_path.read_text(encoding="utf-8"))
    assert manifest["result"]["optimizer_note"] == result.optimizer_note
    assert _train(model, alpaca_rows, tmp_path, optim="sgd").optimizer_note == ""


def test_optimizers_are_taken_by_transformers_own_names():
    import torch
    from transformers.training_args import OptimizerNames

    from qlora_kit.training.arguments import choose_optimizer

    cpu = torch.device("cpu")
    assert choose_optimizer(OptimizerNames.SGD, cpu).name == "sgd"
    assert choose_optimizer(OptimizerNames.ADAMW_8BIT, cpu).name == "adamw_torch"
    assert choose_optimizer("paged_ademamix_8bit", cpu).name == "adamw_torch"


def test_resuming_goes_on_as_if_it_had_not_stopped(make_model, alpaca_rows, tmp_path):
    whole = _train(
        make_model(), alpaca_rows, tmp_path / "a", max_steps=6, save_strategy="steps", save_steps=3
    )
    resumed = _train(
        make_model(), alpaca_rows, tmp_path / "a", max_steps=6, save_strategy="steps",
        save_steps=3, resume_from_checkpoint=tmp_path / "a" / "checkpoint-3",
    )  # fmt: skip
    assert resumed.steps == 6
    assert resumed.losses == again(whole.losses[3:], rel=1e-5)


def test_resuming_passes_over_what_is_not_whole_or_does_not_fit(
    make_model, tiny_llama, alpaca_rows, tmp_path
):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = _train(make_model(), alpaca_rows, tmp_path, **saving)
    # As a process that was killed while saving leaves it.
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    rest = _train(make_model(), alpaca_rows, tmp_path, resume_from_checkpoint=True, **saving)
    assert rest.losses == again(whole.losses[2:], rel=1e-5)
    # Any name will do.
    (tmp_path / "checkpoint-2").rename(tmp_path / "the good one")
    rest = _train(
        make_model(), alpaca_rows, tmp_path / "b", resume_from_checkpoint=tmp_path / "the good one"
    )
    assert rest.losses == again(whole.losses[2:], rel=1e-5)
    other = attach_lora(load_quantized(tiny_llama, 128, "float32"), r=8)
    with pytest.raises(ConfigError, match="r=4 and this adapter has 8"):
        _train(other, alpaca_rows, tmp_path, resume_from_checkpoint=tmp_path / "the good one")
    for name in ("adapter_config.json", "trainer_state.json"):
        path = tmp_path / "the good one" / name
        content = path.read_text()
        for damaged in ("{", "[1]"):
            path.write_text(damaged)
            with pytest.raises(ConfigError, match=f"{name} is damaged"):
                _train(make_model(), alpaca_rows, tmp_path, resume_from_checkpoint=path.parent)
        path.write_text(content)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": []}, r"row 2 \(index 1\): input_ids is empty"),
        ({"input_ids": [1, 384]}, "token id 384, where the model has 0 to 383"),
        ({"input_ids": [1, -1]}, "token id -1"),
    ],
)
def test_tokenized_rows_that_cannot_train_are_named(model, tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        train_sft(model, [{"input_ids": [1, 2, 3]}, row], output_dir=tmp_path, **FAST)


def test_labels_must_be_as_many_as_tokens(model, tmp_path):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2]}]
    with pytest.raises(DataError, match="2 labels for 3 input_ids"):
        train_sft(model, rows, output_dir=tmp_path, **FAST)


def test_callbacks_and_reports_reach_the_trainer(model, alpaca_rows, tmp_path, monkeypatch):
    from transformers import TrainerCallback, integrations

    seen = []

    class Watches(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(("callback", state.global_step, logs.get("loss")))

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(("report", state.global_step, logs.get("loss")))

    # The reporters of transformers need packages; this takes one's place behind its name.
    trackers = integrations.integration_utils
    monkeypatch.setitem(trackers.INTEGRATION_TO_CALLBACK, "dvclive", Reporter)
    monkeypatch.setattr(trackers, "is_dvclive_available", lambda: True)
    result = _train(
        model, alpaca_rows, tmp_path, callbacks=[Watches], report_to="dvclive", logging_steps=2
    )
    for kind in ("callback", "report"):
        steps = [step for who, step, loss in seen if who == kind and loss is not None]
        assert steps == [2, 4]
    (shown,) = [loss for who, step, loss in seen if who == "callback" and step == 4 and loss]
    assert shown == pytest.approx(sum(result.losses[2:]) / 2, rel=1e-3)


@pytest.mark.parametrize("plan", [None, False])
def test_a_run_that_diverges_says_so(model, alpaca_rows, tmp_path, caplog, plan):
    import torch

    with torch.no_grad():
        next(p for p in model.model.parameters() if p.requires_grad).fill_(math.nan)
    result = _train(model, alpaca_rows, tmp_path, max_steps=2, plan=plan)
    assert math.isnan(result.losses[0])
    assert "stopped being a number at step 1" in caplog.text
    assert json.loads(result.manifest_path.read_text())["result"]["losses"][0] == "nan"


def test_resuming_from_nothing_says_so(model, alpaca_rows, tmp_path):
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        _train(model, alpaca_rows, tmp_path, resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match=r"trainer_state\.json"):
        _train(model, alpaca_rows, tmp_path, resume_from_checkpoint="elsewhere")


def _interrupting(step, how):
    from transformers import TrainerCallback

    class Interrupts(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                how()

    return Interrupts()


def test_ctrl_c_saves_a_checkpoint_and_returns_what_was_done(
    make_model, alpaca_rows, tmp_path, caplog
):
    before = signal.getsignal(signal.SIGINT)
    callback = _interrupting(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    result = _train(make_model(), alpaca_rows, tmp_path, max_steps=6, callbacks=[callback])
    assert result.was_interrupted
    assert result.steps == len(result.losses) == 3
    assert result.checkpoint == tmp_path / "checkpoint-3"
    assert "interrupted after 3 steps" in str(result)
    assert "3 of 6 steps are done" in caplog.text
    assert "checkpoint-3' goes on from there" in caplog.text
    assert signal.getsignal(signal.SIGINT) is before
    whole = _train(make_model(), alpaca_rows, tmp_path / "whole", max_steps=6)
    rest = _train(make_model(), alpaca_rows, tmp_path, max_steps=6, resume_from_checkpoint=True)
    assert [*result.losses, *rest.losses] == again(list(whole.losses), rel=1e-5)


def test_an_interrupt_inside_a_step_keeps_the_finished_steps(model, alpaca_rows, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    result = _train(
        model, alpaca_rows, tmp_path, max_steps=6, callbacks=[_interrupting(2, interrupt)]
    )
    assert result.was_interrupted
    assert result.steps == len(result.losses) == 2
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert json.loads(result.manifest_path.read_text())["result"]["was_interrupted"] is True


@pytest.mark.parametrize("is_hard", [False, True])
def test_ctrl_c_in_the_last_evaluation_interrupts_no_training(
    model, alpaca_rows, tmp_path, is_hard
):
    from transformers import TrainerCallback

    pressed = []

    class Interrupts(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step == 2 and not pressed:
                pressed.append(True)
                if is_hard:
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGINT)

    result = _train(
        model, alpaca_rows, tmp_path, max_steps=2, callbacks=[Interrupts()],
        eval_dataset=alpaca_rows[:4],
    )  # fmt: skip
    assert pressed
    assert result.steps == len(result.losses) == 2
    assert not result.was_interrupted


@pytest.mark.parametrize(
    ("plan", "advice"),
    [
        ({"micro_batch_tokens": 96}, r"plan=\{.micro_batch_tokens.: 48, .checkpointing.: .full."),
        (False, "Lower per_device_train_batch_size"),
    ],
)
def test_out_of_memory_advice_is_for_the_step_that_ran(model, alpaca_rows, tmp_path, plan, advice):
    import torch

    from qlora_kit.errors import TrainingError

    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    callback = _interrupting(1, run_out)
    with pytest.raises(TrainingError, match=advice):
        _train(model, alpaca_rows, tmp_path, plan=plan, callbacks=[callback])


def test_another_runs_checkpoint_is_not_reported(make_model, alpaca_rows, tmp_path):
    saved = _train(
        make_model(), alpaca_rows, tmp_path, max_steps=2, save_strategy="steps", save_steps=2
    )
    assert saved.checkpoint == tmp_path / "checkpoint-2"
    assert _train(make_model(), alpaca_rows, tmp_path, max_steps=2).checkpoint is None


def test_a_reporter_that_is_not_installed_is_named(model, alpaca_rows, tmp_path):
    from importlib.util import find_spec

    from qlora_kit.errors import MissingDependencyError

    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed here")
    with pytest.raises(MissingDependencyError, match="wandb"):
        _train(model, alpaca_rows, tmp_path, report_to="wandb")


@pytest.mark.parametrize("plan", [None, False])
def test_a_trainer_that_is_refused_leaves_the_model_as_found(model, alpaca_rows, tmp_path, plan):
    import torch

    forward = model.model.get_base_model().forward.__func__
    trained = {n: p.detach().clone() for n, p in model.model.named_parameters() if p.requires_grad}
    with pytest.raises(ConfigError, match="nowhere"):
        _train(model, alpaca_rows, tmp_path, report_to="nowhere", plan=plan)
    for name, parameter in model.model.named_parameters():
        if name in trained:
            assert parameter.dtype is torch.float32, name
            assert torch.equal(parameter, trained[name]), name
    assert model.model.get_base_model().forward.__func__ is forward
    assert model.record.formatter is None
    _train(model, alpaca_rows, tmp_path, max_steps=1, plan=plan)
    assert model.record.formatter.tokenizer is model.tokenizer


@pytest.mark.parametrize("plan", [None, False])
def test_a_run_leaves_no_card_that_says_nothing(model, alpaca_rows, tmp_path, plan):
    (tmp_path / "README.md").write_text("The user's own.", encoding="utf-8")
    _train(
        model, alpaca_rows, tmp_path, max_steps=1, plan=plan, save_strategy="steps", save_steps=1
    )
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()
    cards = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("README.md")]
    assert cards == ["README.md"]
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "The user's own."


def test_training_touches_no_network(make_model, alpaca_rows, tmp_path, no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    _train(make_model(), alpaca_rows, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    assert no_network == []


def test_a_chat_template_of_ones_own_goes_into_exports(make_model, tmp_path):
    from transformers import AutoTokenizer

    from qlora_kit import ChatFormatter, export_model

    model = make_model()
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]
    rows = ChatFormatter(model.tokenizer, chat_template=template).load([{"messages": turns}] * 8)
    train_sft(model, rows, output_dir=tmp_path / "run", **{**FAST, "max_steps": 1})
    export_model(model, "lora", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_a_text_column_that_is_not_used_is_said(make_model, tmp_path, caplog):
    row = {"instruction": "Say hi.", "input": "", "output": "Hi.", "text": "Q: Say hi. A: Hi."}
    with caplog.at_level("WARNING"):
        train_sft(make_model(), [row] * 8, output_dir=tmp_path, **{**FAST, "max_steps": 1})
    assert "'text' is not used" in caplog.text


def test_a_finished_run_is_not_resumed(make_model, alpaca_rows, tmp_path):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    _train(make_model(), alpaca_rows, tmp_path, **saving)
    with pytest.raises(ConfigError, match="has done 2 steps already"):
        _train(make_model(), alpaca_rows, tmp_path, resume_from_checkpoint=True, **saving)


def _running_out(event):
    """A callback that runs out of memory in the middle of a run, as a device would."""
    import torch
    from transformers import TrainerCallback

    def run_out(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    return type("RunsOut", (TrainerCallback,), {event: run_out})


@pytest.mark.parametrize(
    ("event", "settings", "advice", "no_advice"),
    [
        ("on_init_end", {}, "attach a smaller r", "per_device"),
        ("on_train_begin", {}, "attach a smaller r", "per_device"),
        ("on_step_end", {"plan": {"weights": "cache"}}, "'weights': 'nf4'", "per_device"),
        (
            "on_step_end",
            {"plan": False, "per_device_train_batch_size": 1, "gradient_checkpointing": True},
            "Lower max_length.",
            "per_device",
        ),
        (
            "on_train_begin",
            {
                "plan": False,
                "per_device_train_batch_size": 2,
                "gradient_checkpointing": False,
            },
            "set gradient_checkpointing=True",
            "smaller r",
        ),
    ],
)
def test_out_of_memory_advice_can_be_followed(
    make_model, alpaca_rows, tmp_path, event, settings, advice, no_advice
):
    from qlora_kit.errors import TrainingError

    model = make_model()
    with pytest.raises(TrainingError, match="Tried to allocate 2 GiB") as caught:
        _train(model, alpaca_rows, tmp_path, callbacks=[_running_out(event)], **settings)
    assert advice in str(caught.value)
    assert no_advice not in str(caught.value)


@pytest.mark.parametrize("plan", [None, False])
def test_an_optimizer_that_is_not_installed_is_named(model, alpaca_rows, tmp_path, plan):
    from importlib.util import find_spec

    from qlora_kit.errors import MissingDependencyError

    if find_spec("lomo_optim") is not None:
        pytest.skip("lomo-optim is installed here")
    with pytest.raises(MissingDependencyError, match="lomo_optim"):
        _train(model, alpaca_rows, tmp_path, optim="lomo", plan=plan)


@pytest.mark.parametrize("plan", [{"compile": False}, False])
def test_no_forward_is_left_on_the_model(tiny_llama, alpaca_rows, tmp_path, plan):
    """In bfloat16 accelerate wraps it in autocast, and binds what it takes off."""
    loaded = load_quantized(tiny_llama, 128, dtype="bfloat16", load_in_4bit=False)
    model = attach_lora(loaded, r=4)
    before = {name for name, part in model.model.named_modules() if "forward" in part.__dict__}
    _train(model, alpaca_rows, tmp_path, plan=plan, max_steps=1)
    after = {name for name, part in model.model.named_modules() if "forward" in part.__dict__}
    assert after == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rate": 0.0}, "nothing will be learned"),
        ({"warmup_steps": 5}, "it warms up for 5 steps"),
        ({"fp16": True, "bf16": False}, "does nothing on a CPU"),
    ],
)
def test_runs_that_learn_little_say_so(model, alpaca_rows, tmp_path, caplog, settings, said):
    import torch

    if "fp16" in settings and torch.cuda.is_available():
        pytest.skip("a GPU has a loss scaler")
    _train(model, alpaca_rows, tmp_path, **{"max_steps": 1, **settings})
    assert said in caplog.text
