"""Every family's answers are those of transformers, on tiny random models in float32."""

import copy
import functools

import pytest
import torch

from family_cases import CASES, EXPERT_CASES, adapt, make_base, make_config
from gguf_tiny import make_wrapper
from qlora_kit.device import get_device
from qlora_kit.engines.native.decoding import decoders
from qlora_kit.engines.native.decoding.decoder import Decoder
from qlora_kit.engines.native.decoding.decoders import open_session
from qlora_kit.engines.native.decoding.model_layers import read_model
from qlora_kit.engines.native.layers.compilation import find_compile_obstacle

#: One of them is longer than windows of eight tokens, and all answers become so.
PROMPTS = [[5, 6, 7], list(range(30, 46)), [11, 12, 13, 14, 15, 16]]
NEW = 14


#: Stacks of experts that have adapters of their own.
ADAPTED = {"qwen3_moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@functools.cache
def _make_model(case):
    targets, fields = "all-linear", {}
    if case.startswith("seeing "):
        config = make_wrapper(case.removeprefix("seeing "))
        targets = r".*language_model.*_proj"
    else:
        config = make_config(case)
    if case in EXPERT_CASES:
        targets, fields = ["q_proj", "o_proj"], {"target_parameters": ADAPTED.get(case)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return adapt(make_base(config), targets, **fields).eval()


def _config():
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=[10**6], pad_token_id=0
    )


def _generate(model, prompt):
    ids = torch.tensor([prompt])
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # transformers' generate forgets the prompt where the frequencies change.
        for _ in range(NEW):
            scores = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat((ids, scores.argmax(-1, keepdim=True)), dim=1)
    else:
        ids = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=_config()
        )
    return ids[0, len(prompt) :].tolist()


def _decode(model, at_once):
    answers = [[] for _ in PROMPTS]
    with open_session(model, _config(), seed=None, most_tokens=32, at_once=at_once) as session:
        assert not isinstance(session, str), session
        for index, token in session.answer(iter(PROMPTS)):
            answers[index].append(token)
    return answers


@pytest.mark.parametrize("case", [*CASES, *EXPERT_CASES, "seeing gemma3"])
def test_greedy_answers_are_transformers_own(case):
    model = _make_model(case)
    with torch.no_grad():
        expected = [_generate(model, prompt) for prompt in PROMPTS]
        for at_once in (1, 3):
            assert _decode(model, at_once) == expected


@pytest.mark.parametrize("case", [*CASES, *EXPERT_CASES])
@torch.no_grad()
def test_scores_are_transformers_own(case):
    model = _make_model(case)
    decoder = Decoder(model, read_model(model))
    tokens = torch.arange(30, 50)
    expected = model(input_ids=tokens[None]).logits[0]
    assert (
        decoder._row_step is not None
        or case in EXPERT_CASES
        or find_compile_obstacle(decoder.device)
    )
    for row_step in (decoder._row_step, None):
        decoder._row_step = row_step
        cache, rotations = decoder.make_cache(2, 32), decoder.make_rotations(32)
        found = [decoder.read_prompts(cache, [0], [tokens[:4].tolist()])]
        found += [
            decoder.step(cache, tokens[at : at + 1], torch.tensor([at]), rotations, at + 1)
            for at in range(4, 20)
        ]
        torch.testing.assert_close(torch.cat(found), expected[3:], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(get_device().type != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", [*CASES, *EXPERT_CASES])
class TestOnAGpu:
    @torch.no_grad()
    def test_scores_are_transformers_own(self, case):
        model = copy.deepcopy(_make_model(case)).cuda()
        decoder = Decoder(model, read_model(model))
        tokens = torch.arange(30, 50, device="cuda")
        expected = model(input_ids=tokens[None]).logits[0]
        for count in (1, 2):
            cache, rotations = decoder.make_cache(2, 32), decoder.make_rotations(32)
            prompt = tokens[:4].tolist()
            found = [decoder.read_prompts(cache, list(range(count)), [prompt] * count)[:1]]
            for at in range(4, 20):
                token, position = (
                    tokens[at : at + 1].repeat(count),
                    torch.full_like(tokens[:count], at),
                )
                found.append(decoder.step(cache, token, position, rotations, 32)[:1])
            torch.testing.assert_close(torch.cat(found), expected[3:], rtol=2e-3, atol=2e-3)

    @torch.no_grad()
    @pytest.mark.parametrize("at_once", [1, 3])
    def test_replayed_graphs_write_the_plain_steps_tokens(self, case, at_once):
        model = copy.deepcopy(_make_model(case)).to("cuda", torch.bfloat16)
        graphed = _decode(model, at_once)
        slots = decoders._kept[model].idle
        assert slots._graphs
        slots._can_capture, slots._graphs = False, {}
        assert _decode(model, at_once) == graphed
