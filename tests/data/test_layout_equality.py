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


def _loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, Any, int]:
    """Summed loss over the batches, and its gradients."""
    model.zero_grad()
    total, tokens = 0.0, 0
    for batch in batches:
        loss = model(**batch, use_cache=False, num_items_in_batch=1).loss
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
    tokenizer: Any, shape: str, response_only: bool
) -> None:
    model = make_model(shape)
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
            assert difference <= 2e-5 * scale, (name, parameter, difference, scale)


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
    tokenizer: Any, shape: str, attention: Any
) -> None:
    model = make_model(shape).eval()
    examples = list(_encoded(tokenizer, response_only=False, count=4))
    collator = PackedCollator(0, attention)
    before = collator(examples)
    starts = [0]
    for example in examples:
        starts.append(starts[-1] + len(example["input_ids"]))
    with torch.no_grad():
        logits = model(**before, use_cache=False).logits[0]
        for changed in range(len(examples)):
            other = [dict(example) for example in examples]
            other[changed]["input_ids"] = [(i * 7 + 3) % 400 for i in other[changed]["input_ids"]]
            changed_logits = model(**collator(other), use_cache=False).logits[0]
            for index in range(len(examples)):
                part = slice(starts[index], starts[index + 1])
                is_same = torch.equal(logits[part], changed_logits[part])
                assert is_same == (index != changed), (changed, index)


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
