"""What ends an answer, and what a reloaded handle says of its adapter."""

import json

import pytest

from qlora_kit import (
    AlpacaFormatter,
    ChatFormatter,
    attach_lora,
    export_model,
    generate_stream,
    load_quantized,
    train_sft,
)
from qlora_kit.errors import ConfigError

QUICK = {"max_steps": 1, "disable_tqdm": True, "plan": False}


@pytest.fixture
def loaded(tiny_llama):
    return load_quantized(tiny_llama, 64, "float32", engine="native")


class Ending:
    """A formatter as far as its end is concerned."""

    def __init__(self, end, stop=()):
        self.spec = {"kind": "ending", "eos_token": end, "stop": [end, *stop]}

    def template_spec(self):
        return self.spec


def test_the_base_s_stops_come_first_then_those_that_were_trained(loaded):
    base = loaded.base.stop_token_ids
    assert loaded.stop_token_ids == base
    others = [t for t in loaded.tokenizer.added_tokens_encoder if t not in
              loaded.tokenizer.convert_ids_to_tokens(list(base))]  # fmt: skip
    loaded.record.formatter = Ending(others[0], [others[-1], "###", ""])
    ids = loaded.tokenizer.convert_tokens_to_ids([others[0], others[-1]])
    assert loaded.stop_token_ids == tuple(dict.fromkeys((*base, *ids)))
    assert loaded.stop_strings == ("###",)


def test_an_end_token_that_is_none_is_refused_by_whoever_asks(loaded, tmp_path):
    loaded.record.formatter = Ending("<|nowhere|>")
    with pytest.raises(ConfigError, match=r"'<\|nowhere\|>', which is no token of this model"):
        loaded.stop_token_ids  # noqa: B018
    with pytest.raises(ConfigError, match="no answer could end"):
        generate_stream(loaded, "Hi")
    with pytest.raises(ConfigError, match="no answer could end"):
        export_model(loaded, "merged_16bit", tmp_path / "out")


def test_a_formatter_of_another_tokenizer_is_refused_before_rows_are_read(loaded, tiny_llama):
    other = load_quantized(tiny_llama, 64, "float32", engine="native").tokenizer
    other.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    formatter = AlpacaFormatter(other, eos_token="<|done|>")
    with pytest.raises(ConfigError, match="which is no token") as caught:
        train_sft(attach_lora(loaded), "/there/are/none.json", formatter=formatter)
    assert (caught.value.parameter, caught.value.value) == ("eos_token", "<|done|>")


def test_an_end_token_without_an_embedding_is_refused(loaded):
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    for number in range(rows - len(loaded.tokenizer) + 1):
        loaded.tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{number}|>"]})
    last = loaded.tokenizer.convert_ids_to_tokens(rows)
    with pytest.raises(ConfigError, match=f"embeddings for {rows} tokens only"):
        loaded.find_end_token_id(AlpacaFormatter(loaded.tokenizer, eos_token=last))


def test_a_trained_stop_string_ends_an_answer(loaded):
    greedy = {"max_new_tokens": 12, "do_sample": False}
    whole = "".join(chunk.text for chunk in generate_stream(loaded, "Hi", **greedy))
    middle = whole[3:5]
    loaded.record.formatter = Ending(loaded.tokenizer.eos_token, [middle])
    chunks = list(generate_stream(loaded, "Hi", **greedy))
    assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(middle)]
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("place", ["export", "checkpoint"])
def test_a_reloaded_adapter_says_how_it_was_attached(tiny_llama, alpaca_rows, tmp_path, place):
    base = load_quantized(tiny_llama, 64, "float32", load_in_4bit=False, engine="native")
    asked = {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian", "random_state": 7,
             "use_gradient_checkpointing": True, "use_rslora": True, "layers_to_transform": [0],
             "rank_pattern": {"q_proj": 2}}  # fmt: skip
    model = attach_lora(base, **asked)
    if place == "export":
        path = export_model(model, "lora", tmp_path / "lora").path
    else:
        train_sft(model, alpaca_rows, output_dir=tmp_path, save_steps=1, **QUICK)
        path = tmp_path / "checkpoint-1"
    again = load_quantized(path, 64, "float32", load_in_4bit=False, engine="native").adapter
    assert again.init_lora_weights == "gaussian"
    assert (again.random_state, again.use_gradient_checkpointing) == (7, True)
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "bias", "lora_dropout"):
        assert getattr(again, name) == getattr(model.adapter, name), name
    assert list(again.layers_to_transform) == [0]
    assert set(again.target_modules) == set(model.adapter.target_modules)


def test_a_manifest_that_is_not_this_adapter_s_changes_nothing(adapted, tmp_path, caplog):
    path = export_model(adapted, "lora", tmp_path / "lora").path
    manifest = json.loads((path / "qlora_kit_manifest.json").read_text(encoding="utf-8"))
    for values, said in (({"r": 99, "random_state": 5}, ""), ({"random_state": "x"}, "cannot be")):
        changed = {**manifest, "adapter": {**manifest["adapter"], **values}}
        text = json.dumps(changed)
        (path / "qlora_kit_manifest.json").write_text(text, encoding="utf-8")
        caplog.clear()
        again = load_quantized(path, 64, "float32", engine="native")
        assert again.adapter.random_state == 3407
        assert said in caplog.text


def test_a_chat_formatter_s_end_is_the_model_s_too(loaded):
    if loaded.tokenizer.chat_template is None:
        pytest.skip("this tokenizer has no chat template")
    formatter = ChatFormatter(loaded.tokenizer)
    assert loaded.find_end_token_id(formatter) == formatter.eos_token_id


def test_a_method_of_another_library_names_the_call_here(adapted):
    from qlora_kit.errors import ConfigError

    for name, call in (("generate", "generate_stream"), ("save_pretrained", "export_model"),
                       ("print_trainable_parameters", "trainable_parameters")):  # fmt: skip
        assert not hasattr(adapted, name)
        with pytest.raises(ConfigError, match=call):
            getattr(adapted, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adapted.nothing


def test_attaching_the_same_again_keeps_the_adapter(adapted, caplog):
    from qlora_kit import attach_lora
    from qlora_kit.errors import ConfigError

    with caplog.at_level("INFO", "qlora_kit.adapters"):
        assert attach_lora(adapted, r=4) is adapted
    assert "already has this adapter" in caplog.text
    with pytest.raises(ConfigError, match=r"r=8 \(it has 4\)"):
        attach_lora(adapted, r=8)
    with pytest.raises(ConfigError, match="target_modules='attention'"):
        attach_lora(adapted, r=4, target_modules="attention")
    model, _ = adapted
    with pytest.raises(ConfigError, match="Pass the handle on whole"):
        attach_lora(model)
