"""Streaming: the same tokens as plain generate, named ends, and nothing left behind."""

import gc
import threading

import pytest

from forward import logits_of
from qlora_kit import (
    AlpacaFormatter,
    attach_lora,
    generate_batch,
    generate_stream,
    load_quantized,
)
from qlora_kit.errors import ConfigError, UnknownOptionError


@pytest.fixture(scope="module")
def model(tiny_llama):
    loaded = load_quantized(tiny_llama, max_seq_length=256, dtype="float32", load_in_4bit=False)
    # A random model never ends by itself; tests that need an end force one.
    return attach_lora(loaded, r=4)


PROMPT = "Below is an instruction that describes a task"


def _text(model, prompt=PROMPT, **arguments):
    return "".join(chunk.text for chunk in generate_stream(model, prompt, **arguments))


def _threads():
    return [thread for thread in threading.enumerate() if "qlora_kit" in thread.name]


def test_the_text_is_what_plain_generate_decodes_to(model):
    ids = model.tokenizer(PROMPT, return_tensors="pt").to(model.model.device)
    plain = model.model.eval().generate(**ids, max_new_tokens=24, do_sample=False)
    new = plain[0, ids["input_ids"].shape[1] :]
    expected = model.tokenizer.decode(new, skip_special_tokens=True)
    chunks = list(generate_stream(model, PROMPT, max_new_tokens=24))
    assert "".join(chunk.text for chunk in chunks) == expected
    assert chunks[-1].token_count == len(new)
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason in ("length", "eos")
    assert chunks[-1].tokens_per_second > 0
    assert len(chunks) > 5, "text must come piece by piece"


def test_it_stops_at_the_end_token(model):
    first = next(iter(generate_stream(model, PROMPT, max_new_tokens=1)))
    ids = model.tokenizer(PROMPT)["input_ids"]
    token = int(logits_of(model.model, [ids])[0, -1].argmax())
    chunks = list(generate_stream(model, PROMPT, max_new_tokens=8, eos_token_id=token))
    assert [chunk.finish_reason for chunk in chunks] == ["eos"]
    assert chunks[0].text == ""
    assert chunks[0].token_count == 1
    assert first.finish_reason == "length"


@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_strings_end_the_answer_and_are_not_in_it(model, length):
    whole = _text(model, max_new_tokens=24)
    at = len(whole) // 2
    stop = whole[at : at + length]
    chunks = list(generate_stream(model, PROMPT, max_new_tokens=24, stop=[stop, "never seen"]))
    text = "".join(chunk.text for chunk in chunks)
    assert text == whole[: whole.find(stop)]
    assert chunks[-1].finish_reason == "stop"
    assert not _threads()


def test_a_special_token_named_as_a_stop_ends_the_answer(model):
    """An answer's text does not show special tokens, so as text it would never be found."""
    name = next(
        token.content
        for token_id, token in model.tokenizer.added_tokens_decoder.items()
        if token.special and token_id > 0 and token_id not in model.stop_token_ids
    )
    bias = [[[model.tokenizer.convert_tokens_to_ids(name)], 1000.0]]
    asked = {"max_new_tokens": 4, "sequence_bias": bias}
    assert [c.finish_reason for c in generate_stream(model, PROMPT, **asked)][-1] == "length"
    (chunk,) = generate_stream(model, PROMPT, stop=name, **asked)
    assert (chunk.text, chunk.token_count, chunk.finish_reason) == ("", 1, "stop")
    (answer,) = generate_batch(model, [PROMPT], stop=[name], **asked)
    assert (answer.text, answer.token_count, answer.finish_reason) == ("", 1, "stop")
    with pytest.raises(ConfigError, match="give it alone"):
        generate_stream(model, PROMPT, stop=f"{name}user")


def test_stop_strings_are_called_stop_here(model):
    with pytest.raises(ConfigError, match=r"Use stop="):
        generate_stream(model, PROMPT, stop_strings=["x"])


def test_prompts_beyond_the_length_the_model_was_loaded_for_are_told_of(model, caplog):
    ids = [5] * (model.max_seq_length + 44)
    generate_stream(model, ids, max_new_tokens=1)
    assert "A prompt of 300 tokens is longer than max_seq_length=256" in caplog.text
    caplog.clear()
    generate_batch(model, [ids[:200], ids[:9]], max_new_tokens=1)
    assert not caplog.text


def test_prompts_beyond_every_position_are_refused(model):
    for prompt in ([5] * 600, "x y " * 600):
        with pytest.raises(ConfigError, match=r"reads at most 512 tokens.*larger max_seq_length"):
            generate_stream(model, prompt)


def test_text_that_only_begins_like_a_stop_string_is_kept(model):
    whole = _text(model, max_new_tokens=16)
    assert _text(model, max_new_tokens=16, stop=whole[-1] + "\x00never") == whole


def test_leaving_early_leaves_no_thread_and_no_memory(model):
    import psutil

    for _ in generate_stream(model, PROMPT, max_new_tokens=200):
        break
    gc.collect()
    assert not _threads()
    before = psutil.Process().memory_info().rss
    for _ in range(20):
        for chunk in generate_stream(model, PROMPT, max_new_tokens=200):
            if chunk.token_count > 3:
                break
    gc.collect()
    assert not _threads()
    assert psutil.Process().memory_info().rss - before < 64 * 1024**2


def test_leaving_early_ends_generation_within_a_token(model):
    steps = []
    hook = model.model.get_input_embeddings().register_forward_hook(lambda *_: steps.append(1))
    try:
        stream = generate_stream(model, PROMPT, max_new_tokens=400)
        chunk = next(stream)
        stream.close()
    finally:
        hook.remove()
    # The worker runs ahead of a slow reader, and not on to the end.
    assert chunk.token_count <= len(steps) < 100
    assert not _threads()


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_in_the_mode_it_was_found_in(model, mode):
    model.model.train(mode)
    model.model.config.use_cache = False
    try:
        _text(model, max_new_tokens=3)
        assert model.model.training is mode
        assert model.model.config.use_cache is False
        assert all(
            parameter.requires_grad == ("lora_" in name)
            for name, parameter in model.model.named_parameters()
        )
    finally:
        model.model.train(False)
        model.model.config.use_cache = True


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_streams_that_overlap_leave_the_model_as_the_first_one_found_it(model, first_to_leave):
    model.model.train()
    model.model.config.use_cache = False
    try:
        streams = [generate_stream(model, PROMPT, max_new_tokens=50) for _ in range(2)]
        for stream in streams:
            next(stream)
        streams[first_to_leave].close()
        assert not any(part.training for part in model.model.modules())
        assert model.model.config.use_cache is True
        streams[1 - first_to_leave].close()
        assert all(part.training for part in model.model.modules())
        assert model.model.config.use_cache is False
    finally:
        model.model.train(False)
        model.model.config.use_cache = True


def test_training_under_an_open_stream_goes_on_after_another_one(model):
    stream = generate_stream(model, PROMPT, max_new_tokens=50)
    next(stream)
    try:
        model.model.train()
        _text(model, max_new_tokens=2)
        assert all(part.training for part in model.model.modules())
    finally:
        stream.close()
        model.model.train(False)


def test_sampling_repeats_with_a_seed_and_leaves_torchs_generator_alone(model):
    import torch

    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = _text(model, max_new_tokens=12, temperature=1.5, seed=7)
    assert torch.equal(torch.rand(1), expected)
    assert first == _text(model, max_new_tokens=12, temperature=1.5, seed=7)
    assert first != _text(model, max_new_tokens=12, temperature=1.5, seed=8)
    assert _text(model, max_new_tokens=12) == _text(model, max_new_tokens=12)


def test_prompts_of_every_kind(model):
    formatter = AlpacaFormatter(model.tokenizer)
    prompt = formatter.prompt("Continue the fibonacci sequence.", "1, 1, 2, 3, 5, 8")
    by_prompt = _text(model, prompt, max_new_tokens=6)
    assert by_prompt == _text(model, prompt.token_ids, max_new_tokens=6)
    assert by_prompt == _text(model, str(prompt), max_new_tokens=6)
    messages = [{"role": "user", "content": "Hello"}]
    chat = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert _text(model, messages, max_new_tokens=6) == _text(model, chat, max_new_tokens=6)


def test_characters_of_several_tokens_come_whole(model):
    from qlora_kit.generation.detokenization import TextAssembler

    text = "naïve 你好 🦊 end"
    for stops in ((), ("🦊 end",)):
        assembler = TextAssembler(model.tokenizer, stops)
        pieces, ended = [], False
        for token in model.tokenizer(text)["input_ids"]:
            piece, ended = assembler.add(token)
            pieces.append(piece)
            if ended:
                break
        if not ended:
            pieces.append(assembler.finish()[0])
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == (text if not stops else "naïve 你好 ")
        assert ended is bool(stops)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens"),
        ({"temperature": 0}, ConfigError, "do_sample=False"),
        ({"max_new_token": 5}, UnknownOptionError, "'max_new_tokens'"),
        ({"stop": [""]}, ConfigError, "stop"),
        ({"top_p": 3.0}, ConfigError, "top_p"),
        ({"prompt": ""}, ConfigError, "empty"),
        ({"prompt": []}, ConfigError, "prompt"),
        ({"prompt": 3}, ConfigError, "prompt"),
        ({"prompt": "hi \udcff"}, ConfigError, "character 4 .*not UTF-8"),
        ({"prompt": [1, "a"]}, ConfigError, "whole numbers"),
        ({"prompt": [-1]}, ConfigError, "Token id -1"),
        ({"prompt": [384]}, ConfigError, "0 to 383"),
        ({"prompt": [{"role": "user"}]}, ConfigError, "content"),
        ({"max_new_tokens": True}, ConfigError, "max_new_tokens"),
        ({"temperature": "hot"}, ConfigError, "temperature"),
        ({"top_k": -3}, ConfigError, "top_k"),
        ({"min_p": 2}, ConfigError, "min_p"),
        ({"repetition_penalty": -1}, ConfigError, "repetition_penalty"),
        ({"seed": "x"}, ConfigError, "seed"),
        ({"stop": 3}, ConfigError, "stop"),
        ({"do_sample": False, "top_p": 0.5}, ConfigError, "whatever top_p is"),
        ({"num_beams": 4}, ConfigError, "Beam search"),
        ({"num_return_sequences": 2}, ConfigError, "one answer"),
        ({"max_length": 50}, ConfigError, "max_new_tokens"),
        ({"eos_token_id": "x"}, ConfigError, "eos_token_id"),
        ({"length_penalty": 0.5}, ConfigError, "change nothing. It belongs to beam search"),
        ({"assistant_early_exit": 2}, ConfigError, "change nothing. It belongs to assisted"),
        ({"output_scores": True}, ConfigError, "change nothing. Chunks"),
        ({"cache_config": {"nbits": 4}}, ConfigError, "change nothing. It needs cache_impl"),
    ],
)
def test_what_cannot_work_is_refused_at_the_call(model, arguments, error, said):
    with pytest.raises(error, match=said):
        generate_stream(model, **{"prompt": PROMPT, **arguments})


def test_errors_in_the_thread_reach_the_reader(model, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("inside the model")

    with monkeypatch.context() as patched:
        patched.setattr(model.model.get_base_model().model.norm, "forward", fail)
        with pytest.raises(ZeroDivisionError, match="inside the model"):
            list(generate_stream(model, PROMPT, max_new_tokens=2))
    assert not _threads()
    assert _text(model, max_new_tokens=2)


def test_settings_that_transformers_finds_wrong_only_when_it_starts(model):
    chunks = generate_stream(model, PROMPT, max_new_tokens=2, sequence_bias={(10**6,): 1.0})
    with pytest.raises(ConfigError, match="transformers cannot generate with these settings"):
        list(chunks)
    assert not _threads()


def test_a_stop_string_is_found_across_chunk_borders(model):
    from qlora_kit.generation.detokenization import TextAssembler

    text = "one two STOP three STO"
    tokens = model.tokenizer(text)["input_ids"]
    assert len(model.tokenizer("STOP")["input_ids"]) > 1, "the border lies inside the stop string"

    def read(tokens, stops):
        assembler, pieces = TextAssembler(model.tokenizer, stops), []
        for token in tokens:
            piece, ended = assembler.add(token)
            pieces.append(piece)
            assert not any("STOP".startswith(p.strip()) and p.strip() for p in pieces[-1:])
            if ended:
                return "".join(pieces), True
        rest, ended = assembler.finish()
        return "".join(pieces) + rest, ended

    assert read(tokens, ("STOP",)) == ("one two ", True)
    # Held back, and given at the end when nothing came of it.
    assert read(tokens[: -len(model.tokenizer("STO")["input_ids"])], ("STOPPED",))[1] is False
    assert read(model.tokenizer("two STO")["input_ids"], ("STOP",)) == ("two STO", False)


def test_hooks_and_gradients_are_as_before(model):
    def hooks():
        return [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.model.named_modules()
            if module._forward_hooks or module._forward_pre_hooks
        ]

    before = hooks()
    stream = generate_stream(model, PROMPT, max_new_tokens=50)
    next(stream)
    stream.close()
    assert hooks() == before
    assert not _threads()


@pytest.mark.parametrize("settings", [{}, {"max_time": 60.0}])
def test_a_batch_is_what_streams_answer(model, settings):
    """With the decoder, and with what it leaves to ``generate``."""
    prompts = [PROMPT, "One", [7, 8, 9], "Two and three", PROMPT[:20]]
    whole = [_text(model, prompt, max_new_tokens=24) for prompt in prompts]
    stop = whole[1][4:6]
    answers = list(
        generate_batch(model, prompts, at_once=2, max_new_tokens=24, stop=stop, **settings)
    )
    assert [answer.index for answer in answers] == list(range(len(prompts)))
    for answer, text in zip(answers, whole, strict=True):
        assert answer.text == (text[: text.index(stop)] if stop in text else text)
        assert answer.finish_reason == ("stop" if stop in text else "length")
    assert answers[1].finish_reason == "stop"


def test_answers_come_as_they_end_when_asked(model):
    long, short = PROMPT, "One"
    stop = _text(model, short, max_new_tokens=24)[:8]
    assert stop not in _text(model, long, max_new_tokens=24)
    asked = {"max_new_tokens": 24, "stop": stop, "at_once": 2}
    ended = [
        answer.index for answer in generate_batch(model, [long, short], **asked, in_order=False)
    ]
    assert ended == [1, 0]
    assert [answer.index for answer in generate_batch(model, [long, short], **asked)] == [0, 1]
    assert list(generate_batch(model, [])) == []
    with pytest.raises(ConfigError, match="at_once"):
        generate_batch(model, [short], at_once=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("typical_p", float("nan")), ("bad_words_ids", [[]]), ("no_repeat_ngram_size", -1),
        ("do_sample", "x"), ("eos_token_id", 1.5), ("eos_token_id", [10**9]), ("pad_token_id", 5),
        ("max_time", 0), ("suppress_tokens", [10**6]), ("min_new_tokens", 300),
        ("max_new_tokens", 2**40), ("exponential_decay_length_penalty", [1, "x"]),
        ("forced_eos_token_id", "x"),
    ],
)  # fmt: skip
def test_settings_of_another_kind_are_refused_before_anything_is_computed(adapted16, name, value):
    with pytest.raises(ConfigError, match=name):
        generate_stream(adapted16, "a", **{name: value})


@pytest.mark.parametrize("value", ["no", 0, 1])
@pytest.mark.parametrize("name", ["do_sample", "use_cache", "in_order", "progress"])
def test_flags_are_true_or_false(model, name, value):
    with pytest.raises(ConfigError, match=f"{name} must be True"):
        generate_batch(model, [PROMPT], **{name: value})


@pytest.mark.parametrize("prompts", ["one text", {"a": 1}, None, b"x"])
def test_one_prompt_is_no_batch(model, prompts):
    with pytest.raises(ConfigError, match="prompts must be several prompts"):
        generate_batch(model, prompts)


def test_how_many_are_answered_at_once_has_a_name(model):
    with pytest.raises(UnknownOptionError, match=r"^generate_batch and .*'batch_size'.*at_once"):
        generate_batch(model, ["one"], batch_size=0)


def test_what_compiling_says_of_a_gpu_that_is_not_there_is_not_shown(adapted, caplog, monkeypatch):
    import logging

    chatty = logging.getLogger("torch.utils.cpp_extension")
    # Programs drop it until the process ends, and other tests run some in this one.
    monkeypatch.setattr(chatty, "filters", [])
    stream = generate_stream(adapted, "Hi", max_new_tokens=4)
    next(stream)
    chatty.warning("No CUDA runtime is found, using CUDA_HOME='/usr/local'")
    chatty.warning("something else")
    stream.close()
    assert "No CUDA runtime" not in caplog.text
    assert "something else" in caplog.text
    chatty.warning("No CUDA runtime is found, using CUDA_HOME='/usr/local'")
    assert "No CUDA runtime" in caplog.text
