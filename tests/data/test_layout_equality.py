"""Padded, padding-free and packed batches are the same training, and packed rows never mix."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from qlora_kit.data import AlpacaFormatter, PackedCollator, PaddedCollator, pack_examples

from .conftest import make_model

SHAPES = ("llama", "qwen3")


def _rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    words = ["hello", "world", "fox", "dog", "你好", "the", "quick", "brown", "lazy", "12", "34"]
    return [
        {
            "instruction": " ".join(rng.choices(words, k=rng.randint(1, 5))),
            "input": " ".join(rng.choices(words, k=rng.randint(0, 4))),
            "output": " ".join(rng.choices(words, k=rng.randint(1, 20))),
        }
        for _ in range(count)
    ]


def _encoded(tokenizer: Any, *, response_only: bool, count: int = 6) -> Any:
    formatter = AlpacaFormatter(tokenizer, response_only=response_only)
    return formatter.encode(_rows(count), max_length=256).dataset


def _move(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, Any, int]:
    """Summed loss over the batches, and its gradients."""
    model.zero_grad()
    total, tokens = 0.0, 0
    for batch in batches:
        loss = model(**_move(batch, model.device), use_cache=False, num_items_in_batch=1).loss
        loss.backward()
        total += loss.item()
        tokens += int((batch["labels"][:, 1:] != -100).sum())
    return total, {n: p.grad.clone() for n, p in model.named_parameters()}, tokens


def _layouts(dataset: Any) -> dict[str, list[dict[str, Any]]]:
    examples = list(dataset)
    packed = list(pack_examples(dataset, 256))
    assert len(packed) < len(examples)
    layouts = {
        "one by one": [PaddedCollator(0)([example]) for example in examples],
        "padded": [PaddedCollator(0)(examples)],
        "padded to 16": [PaddedCollator(0, pad_to_multiple_of=16)(examples)],
    }
    for attention in ("position_ids", "block_mask", "varlen"):
        collator = PackedCollator(0, attention)
        layouts[f"padding-free, {attention}"] = [collator(examples)]
        layouts[f"packed, {attention}"] = [collator([row]) for row in packed]
        layouts[f"packed to 16, {attention}"] = [
            PackedCollator(0, attention, pad_to_multiple_of=16)(packed)
        ]
    return layouts


@pytest.mark.parametrize("response_only", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_has_the_same_loss_and_gradients(
    tokenizer: Any, shape: str, response_only: bool, device: str
) -> None:
    model = make_model(shape).to(device)
    tolerance = 2e-5 if device == "cpu" else 1e-4
    dataset = _encoded(tokenizer, response_only=response_only)
    layouts = _layouts(dataset)
    loss, gradients, tokens = _loss_and_gradients(model, layouts.pop("one by one"))
    assert tokens == sum(label != -100 for row in dataset for label in row["labels"])
    for name, batches in layouts.items():
        other_loss, other_gradients, other_tokens = _loss_and_gradients(model, batches)
        assert other_tokens == tokens, name
        assert other_loss == pytest.approx(loss, rel=1e-6), name
        for parameter, gradient in gradients.items():
            scale = gradient.abs().max().item()
            difference = (other_gradients[parameter] - gradient).abs().max().item()
            assert difference <= tolerance * scale, (name, parameter, difference, scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_checkpointing_keeps_examples_apart(tokenizer: Any, shape: str) -> None:
    dataset = _encoded(tokenizer, response_only=False)
    batch = PackedCollator(0)(list(dataset))
    plain = make_model(shape)
    plain.train()
    loss, gradients, _ = _loss_and_gradients(plain, [batch])
    checkpointed = make_model(shape)
    checkpointed.train()
    checkpointed.gradient_checkpointing_enable()
    other_loss, other_gradients, _ = _loss_and_gradients(checkpointed, [batch])
    assert other_loss == loss
    assert all(torch.equal(gradients[n], other_gradients[n]) for n in gradients)


@pytest.mark.parametrize("attention", ["position_ids", "block_mask", "varlen"])
@pytest.mark.parametrize("shape", SHAPES)
def test_changing_one_example_leaves_the_others_logits_bit_equal(
    tokenizer: Any, shape: str, attention: Any, device: str
) -> None:
    model = make_model(shape).eval().to(device)
    examples = list(_encoded(tokenizer, response_only=False, count=4))
    collator = PackedCollator(0, attention)
    before = collator(examples)
    starts = [0]
    for example in examples:
        starts.append(starts[-1] + len(example["input_ids"]))
    with torch.no_grad():
        logits = model(**_move(before, device), use_cache=False).logits[0]
        for changed in range(len(examples)):
            other = [dict(example) for example in examples]
            other[changed]["input_ids"] = [(i * 7 + 3) % 400 for i in other[changed]["input_ids"]]
            batch = _move(collator(other), device)
            changed_logits = model(**batch, use_cache=False).logits[0]
            for index in range(len(examples)):
                part = slice(starts[index], starts[index + 1])
                is_same = torch.equal(logits[part], changed_logits[part])
                assert is_same == (index != changed), (changed, index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_variable_length_attention_keeps_examples_apart(dtype: torch.dtype, device: str) -> None:
    """The kernels of the native engine's training step, against attention of each example alone."""
    from qlora_kit.engines.native.layers.attention import attend, choose_attention, make_block_mask

    sizes = [5, 1, 40, 17]
    rows = [{"input_ids": [1] * size, "labels": [1] * size} for size in sizes]
    batch = PackedCollator(0, "varlen")(rows)
    bounds = batch["cu_seq_lens_q"].to(device)
    longest = torch.tensor(batch["max_length_q"], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((sum(sizes), heads, 16), generator=generator).to(device, dtype)
        for heads in (4, 2, 2)
    )
    has_kernel = choose_attention(torch.device(device), dtype, 16) == "varlen"
    mask = None if has_kernel else make_block_mask(bounds, sum(sizes))

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        out = attend(*leaves, bounds, longest, mask)  # type: ignore[call-arg, misc]
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    def run_alone() -> list[torch.Tensor]:
        leaves = [tensor.detach().float().requires_grad_() for tensor in (q, k, v)]
        outputs = []
        for size, end in zip(sizes, bounds[1:].tolist(), strict=True):
            parts = [leaf[end - size : end] for leaf in leaves]
            heads = [part.repeat_interleave(4 // part.shape[1], 1).transpose(0, 1)[None]
                     for part in parts]  # fmt: skip
            out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            outputs.append(out[0].transpose(0, 1))
        out = torch.cat(outputs)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    rounding = 2e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    together = run(q, k, v)
    for packed, alone in zip(together, run_alone(), strict=True):
        error = (packed.float() - alone).abs().max().item()
        assert error <= rounding * alone.abs().max().item()
    changed = run(*(torch.cat([t[:6], 2 * t[6:46] + 1, t[46:]]) for t in (q, k, v)))
    for before, after in zip(together, changed, strict=True):
        for part in (slice(0, 6), slice(46, None)):
            assert torch.equal(before[part], after[part])
        assert not torch.equal(before[6:46], after[6:46])


def test_the_check_above_notices_a_leak(tokenizer: Any) -> None:
    """Positions alone keep nothing apart when an attention mask comes along."""
    model = make_model("llama").eval()
    examples = list(_encoded(tokenizer, response_only=False, count=2))
    collator = PackedCollator(0)
    second = slice(len(examples[0]["input_ids"]), None)
    leaking = collator(examples)
    leaking["attention_mask"] = torch.ones_like(leaking["input_ids"])
    with torch.no_grad():
        apart = model(**collator(examples), use_cache=False).logits[0, second]
        mixed = model(**leaking, use_cache=False).logits[0, second]
        cached = model(**collator(examples), use_cache=True).logits[0, second]
    assert not torch.allclose(apart, mixed, atol=1e-3)
    # With a key/value cache transformers looks no further than the cache; the trainer turns it off.
    assert not torch.allclose(apart, cached, atol=1e-3)


def test_one_token_examples_stay_apart() -> None:
    """Positions 0, 0, 0: the boundary that is hardest to see from positions alone."""
    model = make_model("llama").eval()
    rows = [{"input_ids": [5], "labels": [5]}, {"input_ids": [6], "labels": [6]}] * 2
    rows.append({"input_ids": [7, 8, 9], "labels": [7, 8, 9]})
    batch = PackedCollator(0)(rows)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        alone = torch.cat(
            [
                model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
                for row in rows
            ]
        )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def _sliding_model() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
        attn_implementation="sdpa",
    )  # fmt: skip
    return MistralForCausalLM(config).float()


def test_positions_also_serve_eager_attention_and_sliding_windows(tokenizer: Any) -> None:
    dataset = _encoded(tokenizer, response_only=True)
    one_by_one = [PaddedCollator(0)([example]) for example in dataset]
    flat = PackedCollator(0)(list(dataset))
    for model in (make_model("llama", attention="eager"), _sliding_model()):
        loss, _, _ = _loss_and_gradients(model, one_by_one)
        flat_loss, _, _ = _loss_and_gradients(model, [flat])
        assert flat_loss == pytest.approx(loss, rel=1e-6)


def test_a_ready_made_mask_serves_neither(tokenizer: Any) -> None:
    """Why ``position_ids`` is the default: transformers takes a 4D mask as it is."""
    dataset = _encoded(tokenizer, response_only=True)
    one_by_one = [PaddedCollator(0)([example]) for example in dataset]
    flat = PackedCollator(0, "block_mask")(list(dataset))
    for model in (make_model("llama", attention="eager"), _sliding_model()):
        loss, _, _ = _loss_and_gradients(model, one_by_one)
        flat_loss, _, _ = _loss_and_gradients(model, [flat])
        assert flat_loss != pytest.approx(loss, rel=1e-4)
