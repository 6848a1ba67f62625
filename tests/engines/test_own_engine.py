"""An engine of one's own: plain transformers, peft and TRL, and what is said of one that lacks."""

import contextlib
import json
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from qlora_kit import (
    AdaptedModel,
    LoadedModel,
    attach_lora,
    export_model,
    generate_stream,
    load_quantized,
    train_sft,
)
from qlora_kit.engines.base import (
    TrainerBase,
    attach_saved_adapter,
    inference_mode,
    make_adapted,
    settle_stop_tokens,
)
from qlora_kit.errors import ConfigError, EngineError
from qlora_kit.handles import BaseInfo


class PlainTrainer(TrainerBase, SFTTrainer):
    pass


class PlainEngine:
    name = "plain"
    trainer_class = PlainTrainer

    def load(self, config):
        model = AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(config.model_name)
        base = BaseInfo(config.model_name, Path(config.model_name), None, "float32",
                        stop_token_ids=settle_stop_tokens(model, tokenizer))  # fmt: skip
        return LoadedModel(model, tokenizer, self, base, config)

    def attach(self, loaded, config):
        lora = LoraConfig(r=config.r, target_modules=list(config.target_modules))
        return make_adapted(loaded, get_peft_model(loaded.model, lora), config)

    def attach_saved(self, loaded, folder, *, is_trainable):
        return attach_saved_adapter(loaded, folder, is_trainable=is_trainable)

    def make_trainer(self, model, job):
        return self.trainer_class(
            model=model.model, args=job.args, train_dataset=job.train_dataset,
            eval_dataset=job.eval_dataset, processing_class=model.tokenizer,
            data_collator=job.collator, callbacks=list(job.callbacks),
        )  # fmt: skip

    @contextlib.contextmanager
    def inference(self, model):
        with inference_mode(model.model, model.tokenizer):
            yield model.model


FAST = {"max_steps": 2, "save_strategy": "no", "disable_tqdm": True}


def _attach(folder, engine):
    return attach_lora(load_quantized(folder, 64, load_in_4bit=False, engine=engine), r=2)


def test_an_engine_of_plain_trl_trains_answers_and_reports(tiny_llama, alpaca_rows, tmp_path):
    model = _attach(tiny_llama, PlainEngine())
    result = train_sft(model, alpaca_rows, output_dir=tmp_path, **FAST)
    assert len(result.losses) == result.steps == 2
    assert 0 < result.trained_tokens <= result.tokens_seen
    assert result.plan == "TRL and peft"
    manifest = json.loads(result.manifest_path.read_text(encoding="utf-8"))
    assert manifest["result"]["losses"] == list(result.losses)
    assert "forward" not in model.model.get_base_model().__dict__
    loaded = load_quantized(export_model(model, "lora", tmp_path / "a").path, engine=PlainEngine())
    assert isinstance(loaded, AdaptedModel)
    chunks = list(generate_stream(model, "Say the number 3.", max_new_tokens=3))
    assert chunks[-1].finish_reason is not None


def test_a_trainer_that_lacks_something_is_refused_before_the_first_step(
    tiny_llama, alpaca_rows, tmp_path
):
    engine = PlainEngine()
    engine.trainer_class = SFTTrainer
    with pytest.raises(EngineError) as caught:
        train_sft(_attach(tiny_llama, engine), alpaca_rows, output_dir=tmp_path, **FAST)
    said = str(caught.value)
    assert "Engine 'plain' made a SFTTrainer without" in said
    for name in ("step_losses", "tokens_seen", "trained_tokens", "fast_plan", "uses_fast_step",
                 "save_checkpoint", "release"):  # fmt: skip
        assert name in said
    assert " train," not in said
    assert "TrainerBase" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", [None, types.SimpleNamespace(train=3)])
def test_what_is_no_trainer_is_refused(tiny_llama, alpaca_rows, tmp_path, made):
    engine = PlainEngine()
    engine.make_trainer = lambda model, job: made
    with pytest.raises(EngineError, match=r"without args, state, .*train"):
        train_sft(_attach(tiny_llama, engine), alpaca_rows, output_dir=tmp_path, **FAST)


def test_engines_are_checked_when_they_are_given(tiny_llama):
    half = types.SimpleNamespace(name="half", load=print, attach=print, inference="no method")
    for engine, said in (
        (PlainEngine, r"the class PlainEngine\. Give an object: PlainEngine\(\)"),
        (half, r"SimpleNamespace, which lacks attach_saved, make_trainer, inference\(\)"),
        (3, "got int, which lacks name, load"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_quantized(tiny_llama, engine=engine)
    nameless = PlainEngine()
    nameless.name = None
    with pytest.raises(ConfigError, match="must be text, got None"):
        load_quantized(tiny_llama, engine=nameless)


def test_what_an_engine_returns_is_checked(tiny_llama):
    engine = PlainEngine()
    loaded = load_quantized(tiny_llama, 64, load_in_4bit=False, engine=engine)
    engine.attach = lambda loaded, config: loaded
    with pytest.raises(EngineError, match="attach returned LoadedModel"):
        attach_lora(loaded, r=2)
    engine.inference = lambda model: contextlib.nullcontext(object())
    with pytest.raises(EngineError, match="yields object, which has no generate"):
        list(generate_stream(loaded, "Hello", max_new_tokens=2))
    engine.load = lambda config: (loaded.model, loaded.tokenizer)
    with pytest.raises(EngineError, match="load returned tuple"):
        load_quantized(tiny_llama, 64, load_in_4bit=False, engine=engine)
