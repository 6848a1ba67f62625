"""The decoder writes what transformers' ``generate`` writes, one answer or several at a time."""

import contextlib

import pytest
import torch

from checkpoints import make_checkpoint, randomize
from qlora_kit.device import get_device
from qlora_kit.engines.native.decoding import cpu_step, decoders
from qlora_kit.engines.native.decoding.decoders import open_session, release_decoder
from qlora_kit.engines.native.layers.compilation import find_compile_obstacle
from qlora_kit.generation.settings import make_config

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], list(range(100, 130))]


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen2", "mistral"])
def family(request, tmp_path_factory):
    from qlora_kit import attach_lora, load_quantized

    folder = make_checkpoint(tmp_path_factory.mktemp("decoder") / request.param, request.param)
    loaded = load_quantized(folder, 256, "float32", engine="native")
    return randomize(attach_lora(loaded, r=4), std=0.05)


def _config(model, **fields):
    fields = {"max_new_tokens": 12, "do_sample": False, **fields}
    config = make_config(model, fields)
    config.eos_token_id = [10**6]  # no token: answers never end by themselves
    return config


def _generate(model, config, prompt):
    device = model.model.device
    ids = torch.tensor([prompt], device=device)
    out = model.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return out[0, len(prompt) :].tolist()


def _decode(model, config, prompts=PROMPTS, at_once=1, seed=None):
    answers = [[] for _ in prompts]
    with open_session(model.model, config, seed=seed, most_tokens=64, at_once=at_once) as session:
        assert not isinstance(session, str), session
        for index, token in session.answer(iter(prompts)):
            answers[index].append(token)
    return answers


def test_greedy_answers_are_transformers_own(family):
    for extra in ({}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}):
        config = _config(family, **extra)
        with family.engine.inference(family):
            expected = [_generate(family, config, prompt) for prompt in PROMPTS]
            for at_once in (1, 2, 4):
                assert _decode(family, config, at_once=at_once) == expected


def test_each_answer_ends_for_itself(make_adapted):
    adapted = make_adapted()
    config = _config(adapted)
    with adapted.engine.inference(adapted):
        whole = _decode(adapted, config)
        end = whole[0][4]
        config.eos_token_id = [end]
        cut = _decode(adapted, config, at_once=2)
    for answer, full in zip(cut, whole, strict=True):
        expected = full[: full.index(end) + 1] if end in full else full
        assert answer == expected


def test_sampling_repeats_whatever_is_written_beside_it(make_adapted):
    adapted = make_adapted()
    config = _config(adapted, do_sample=True, temperature=1.5)
    with adapted.engine.inference(adapted):
        state = torch.get_rng_state()
        alone = _decode(adapted, config, seed=3)
        assert _decode(adapted, config, seed=3, at_once=3) == alone
        assert _decode(adapted, config, seed=4) != alone
        assert torch.equal(torch.get_rng_state(), state)


def test_adapters_are_read_as_they_are_now(make_adapted):
    model = make_adapted()
    config = _config(model)
    with model.engine.inference(model):
        before = _decode(model, config)
        randomize(model, std=0.3)
        after = _decode(model, config)
        assert after == [_generate(model, config, prompt) for prompt in PROMPTS]
        assert after != before
        with model.model.disable_adapter():
            plain = _decode(model, config)
            assert plain == [_generate(model, config, prompt) for prompt in PROMPTS]
        assert plain != after


def test_dropout_does_nothing_while_answering(make_adapted):
    model = make_adapted(lora_dropout=0.5)
    config = _config(model)
    with model.engine.inference(model):
        assert _decode(model, config) == [_generate(model, config, p) for p in PROMPTS]


def test_nothing_is_kept_while_the_model_trains(make_adapted):
    model = make_adapted()
    decoders.begin_training(model.model)
    with model.engine.inference(model):
        _decode(model, _config(model))
    assert model.model not in decoders._kept
    decoders.end_training(model.model)
    with model.engine.inference(model):
        _decode(model, _config(model))
    assert model.model in decoders._kept
    release_decoder(model.model)
    assert model.model not in decoders._kept


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"max_time": 3.0}, "max_time"), ({"guidance_scale": 2.0}, "guidance_scale")],
)
def test_settings_it_does_not_honour_are_named(make_adapted, fields, said):
    adapted = make_adapted()
    config = _config(adapted, **fields)
    with open_session(adapted.model, config, seed=None, most_tokens=64, at_once=1) as session:
        assert isinstance(session, str)
        assert said in session


def test_models_it_does_not_cover_are_named(make_adapted):
    for options, said in (({"use_dora": True}, "Dora"), ({"modules_to_save": ["lm_head"]}, "head")):
        model = make_adapted(**options)
        with open_session(
            model.model, _config(model), seed=None, most_tokens=64, at_once=1
        ) as session:
            assert isinstance(session, str)
            assert said in session


def test_a_hook_is_not_passed_by(make_adapted):
    model = make_adapted()
    handle = model.model.get_input_embeddings().register_forward_hook(lambda *_: None)
    with (
        contextlib.closing(_closing(handle)),
        open_session(model.model, _config(model), seed=None, most_tokens=64, at_once=1) as session,
    ):
        assert "hook" in session


def _closing(handle):
    handle.close = handle.remove
    return handle


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_16_bit_answers_are_near_float32s(make_adapted, load_in_4bit):
    """Logits of a step: one rounding per projection, on every device."""
    import math

    from qlora_kit.engines.native.decoding.decoder import Decoder
    from qlora_kit.engines.native.decoding.model_layers import read_model

    logits = {}
    for dtype in ("float32", "bfloat16"):
        model = make_adapted("qwen3", dtype=dtype, load_in_4bit=load_in_4bit).model
        decoder = Decoder(model, read_model(model))
        cache, rotation = decoder.make_cache(2, 64), decoder.make_rotations(64)
        with torch.no_grad():
            decoder.read_prompts(cache, [0], [PROMPTS[2]])
            token = torch.tensor([7], device=decoder.device)
            at = torch.tensor([30], device=decoder.device)
            logits[dtype] = decoder.step(cache, token, at, rotation, 31).float().cpu()
    distance = (logits["bfloat16"] - logits["float32"]).norm() / logits["float32"].norm()
    assert math.isfinite(distance)
    assert distance < 0.02


def _step_row(decoder, positions=range(30, 36)):
    """Logits of single tokens after a prompt, and the cache they leave."""
    cache, rotation = decoder.make_cache(1, 64), decoder.make_rotations(64)
    with torch.no_grad():
        decoder.read_prompts(cache, [0], [PROMPTS[2]])
        found = [
            decoder.step(cache, torch.tensor([at]), torch.tensor([at]), rotation, at + 1).float()
            for at in positions
        ]
    return torch.cat(found), torch.stack([*cache.keys, *cache.values]).float()


def _check_kernel(model):
    """The compiled step against torch's operations, on any number of threads."""
    from qlora_kit.engines.native.decoding.decoder import Decoder
    from qlora_kit.engines.native.decoding.model_layers import read_model

    decoder = Decoder(model, read_model(model))
    assert decoder._row_step is not None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        ours, kept = _step_row(decoder)
        torch.set_num_threads(1)
        alone, _ = _step_row(decoder)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ours, alone)
    decoder._row_step = None
    theirs, wanted = _step_row(decoder)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    get_device().type != "cpu" or find_compile_obstacle(get_device()) is not None
    or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="needs a CPU with AVX2 and a compiler",
)  # fmt: skip
class TestKernelOfTheCpu:
    def test_it_computes_what_torchs_operations_compute(self, family):
        _check_kernel(family.model)

    def test_16_and_32_bit_weights_and_answers_without_adapters(self, make_adapted):
        model = make_adapted("qwen3", load_in_4bit=False).model
        _check_kernel(model)
        with model.disable_adapter():
            _check_kernel(model)

    @pytest.mark.parametrize("load_in_4bit", [True, False])
    def test_it_is_nearer_to_float32_than_torchs_operations(self, make_adapted, load_in_4bit):
        from qlora_kit.engines.native.decoding.decoder import Decoder
        from qlora_kit.engines.native.decoding.model_layers import read_model

        def far(decoder):
            return (_step_row(decoder)[0] - exact).norm() / exact.norm()

        plain = make_adapted("qwen3", load_in_4bit=load_in_4bit).model
        exact, _ = _step_row(Decoder(plain, read_model(plain)))
        model = make_adapted("qwen3", load_in_4bit=load_in_4bit, dtype="bfloat16").model
        decoder = Decoder(model, read_model(model))
        assert decoder._row_step is not None
        near = far(decoder)
        decoder._row_step = None
        assert near < far(decoder)

    @pytest.mark.slow  # compiles for another processor
    def test_processors_of_narrower_registers(self, family, monkeypatch):
        monkeypatch.setattr(cpu_step, "_load", lambda: cpu_step._compile("QLORA_KIT_NARROW"))
        _check_kernel(family.model)

    def test_what_it_does_not_read_goes_through_torch(self, make_adapted, caplog):
        from qlora_kit.engines.native.decoding.decoder import Decoder
        from qlora_kit.engines.native.decoding.model_layers import read_model

        model = make_adapted(load_in_4bit=False).model
        model.get_base_model().model.norm.double()
        decoder = Decoder(model, read_model(model))
        with caplog.at_level("INFO"):
            assert decoder._row_step is None
        assert "several dtypes" in caplog.text


@pytest.mark.skipif(get_device().type != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_replayed_graphs_write_the_plain_steps_tokens(make_adapted, kind, load_in_4bit):
    model = make_adapted(kind, dtype="bfloat16", load_in_4bit=load_in_4bit)
    config = _config(model, max_new_tokens=40)
    with model.engine.inference(model):
        for at_once in (1, 4):
            graphed = _decode(model, config, at_once=at_once)
            slots = decoders._kept[model.model].idle
            assert slots._graphs
            slots._can_capture, slots._graphs = False, {}
            plain = _decode(model, config, at_once=at_once)
            assert graphed == plain
            release_decoder(model.model)
