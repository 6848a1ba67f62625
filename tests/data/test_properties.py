"""What holds for every text: arbitrary Unicode, and text that is the name of a special token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_kit.data import (
    AlpacaFormatter,
    ChatFormatter,
    PackedCollator,
    PaddedCollator,
    pack_examples,
)
from qlora_kit.data.batches.packing import plan_packs
from qlora_kit.errors import DataError

from .conftest import SPECIALS, make_model

KINDS = ("bytes", "bos", "metaspace", "words")
many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

fragments = st.one_of(
    st.text(min_size=1, max_size=20),
    st.sampled_from(
        [*SPECIALS, "<unk>", "### Response:\n", "### Instruction:", "\n\n", " ", "Hello", "你好",
         "<|im_", "end|>", "\u2028", "\ufeff", "{output}", "{}", "⟦"]
    ),
)  # fmt: skip
texts = st.lists(fragments, min_size=1, max_size=5).map("".join)
filled = texts.filter(lambda text: bool(text.strip()))
rows = st.fixed_dictionaries(
    {"instruction": filled, "input": st.one_of(st.just(""), texts), "output": filled}
)


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    return make_model("qwen3").train()


def _special_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids(SPECIALS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["alpaca", "alpaca-zh"])
@many
@given(row=rows)
def test_the_answer_and_its_end_carry_loss_and_nothing_else_does(
    tokenizers: dict[str, Any], kind: str, template: str, row: dict[str, str]
) -> None:
    tokenizer = tokenizers[kind]
    formatter = AlpacaFormatter(tokenizer, template, response_only=True)
    (example,) = formatter.encode([row], max_length=100_000).dataset
    ids, labels = example["input_ids"], example["labels"]
    prompt = formatter.prompt(row["instruction"], row["input"])
    size = len(prompt.token_ids)
    assert ids[:size] == prompt.token_ids
    assert labels == [-100] * size + ids[size:]
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    bos = [tokenizer.bos_token_id] if kind in ("bos", "metaspace") else []
    assert ids[: len(bos)] == bos
    assert _special_ids(tokenizer).isdisjoint(ids[len(bos) : -1])
    if kind in ("bytes", "bos"):
        assert tokenizer.decode(ids[size:-1]) == row["output"]
        assert tokenizer.decode(ids[len(bos) : size]) == prompt

    (whole,) = AlpacaFormatter(tokenizer, template).encode([row], max_length=100_000).dataset
    assert whole["input_ids"] == ids
    assert whole["labels"] == [-100, *ids[1:]]


@pytest.mark.parametrize("kind", KINDS)
@many
@given(row=rows)
def test_a_prompt_has_the_ids_that_the_tokenizer_gives_its_text(
    tokenizers: dict[str, Any], kind: str, row: dict[str, str]
) -> None:
    tokenizer = tokenizers[kind]
    prompt = AlpacaFormatter(tokenizer).prompt(row["instruction"], row["input"])
    if not any(name in prompt for name in [*SPECIALS, "<unk>"]):
        assert prompt.token_ids == tokenizer(str(prompt))["input_ids"]


@many
@given(row=rows, limit=st.integers(2, 120), response_only=st.booleans())
def test_truncation_is_counted_to_the_token(
    tokenizer: Any, row: dict[str, str], limit: int, response_only: bool
) -> None:
    formatter = AlpacaFormatter(tokenizer, "{instruction}|{input}|{output}")
    formatter.response_only = response_only
    whole = formatter.encode([row], max_length=100_000)
    (example,) = whole.dataset
    size = len(example["input_ids"])
    keeper = {"instruction": "a", "input": "", "output": "b"}
    both = formatter.encode([row, keeper], max_length=max(limit, 6))
    limit = max(limit, 6)
    report = both.report
    kept = both.dataset[:]["input_ids"]
    if size <= limit:
        assert (report.truncated, report.without_trained_tokens, report.lost_tokens) == (0, 0, 0)
        assert kept[0] == example["input_ids"]
    elif any(label != -100 for label in example["labels"][:limit]):
        assert (report.truncated, report.without_trained_tokens) == (1, 0)
        assert kept[0] == example["input_ids"][:limit]
        assert report.lost_tokens == size - limit
    else:
        assert (report.truncated, report.without_trained_tokens, len(kept)) == (0, 1, 1)
        assert report.lost_tokens == size
        with pytest.raises(DataError, match="leaves a token to learn"):
            formatter.encode([row], max_length=limit)
    assert report.longest >= size
    assert report.tokens == sum(map(len, kept))
    assert report.trained_tokens == sum(
        label != -100 for labels in both.dataset[:]["labels"] for label in labels
    )


@many
@given(
    rows=st.lists(rows, min_size=1, max_size=12),
    strategy=st.sampled_from(["bfd", "sequential"]),
    extra=st.integers(0, 300),
)
def test_packing_keeps_every_example_whole(
    tokenizer: Any, rows: list[dict[str, str]], strategy: str, extra: int
) -> None:
    dataset = (
        AlpacaFormatter(tokenizer, "{instruction}{input}{output}", response_only=True)
        .encode(rows, max_length=100_000)
        .dataset
    )
    longest = max(len(row["input_ids"]) for row in dataset)
    packed = pack_examples(dataset, longest + extra, strategy=strategy)
    unpacked = []
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        assert len(row["input_ids"]) <= longest + extra
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            unpacked.append((row["input_ids"][part], row["labels"][part]))
            start += length
    assert sorted(unpacked) == sorted((row["input_ids"], row["labels"]) for row in dataset)


@many
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_best_fit_decreasing_is_within_its_proven_bound(lengths: list[int]) -> None:
    packs = plan_packs(lengths, 50)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= 50 for pack in packs)
    # Johnson 1973: at most 11/9 of the optimum plus 4, and no packing beats the optimum.
    assert len(packs) <= 11 / 9 * len(plan_packs(lengths, 50, strategy="sequential")) + 4
    # Two packs that are at most half full would have been one.
    assert sum(sum(lengths[i] for i in pack) * 2 <= 50 for pack in packs) <= 1


@many
@given(rows=st.lists(rows, min_size=1, max_size=6), multiple=st.sampled_from([None, 1, 8, 64]))
def test_every_layout_holds_the_same_tokens_and_labels(
    tokenizer: Any, rows: list[dict[str, str]], multiple: int | None
) -> None:
    formatter = AlpacaFormatter(tokenizer, "{instruction}{input}{output}", response_only=True)
    examples = list(formatter.encode(rows, max_length=100_000).dataset)
    padded = PaddedCollator(tokenizer.pad_token_id, multiple)(examples)
    flat = PackedCollator(tokenizer.pad_token_id, "varlen", multiple)(examples)
    start = 0
    for index, example in enumerate(examples):
        size = len(example["input_ids"])
        part = slice(start, start + size)
        mask = padded["attention_mask"][index].bool()
        assert padded["input_ids"][index][mask].tolist() == example["input_ids"]
        assert padded["labels"][index][mask].tolist() == example["labels"]
        assert (padded["labels"][index][~mask] == -100).all()
        assert flat["input_ids"][0, part].tolist() == example["input_ids"]
        assert flat["labels"][0, part].tolist() == example["labels"]
        assert flat["position_ids"][0, part].tolist() == list(range(size))
        assert flat["cu_seq_lens_q"][index].item() == start
        start += size
    assert (flat["labels"][0, start:] == -100).all()
    assert flat["cu_seq_lens_k"][-1].item() == flat["input_ids"].shape[1]
    trained = sum(label != -100 for example in examples for label in example["labels"])
    for batch in (padded, flat):
        assert int((batch["labels"][:, 1:] != -100).sum()) == trained
        assert multiple is None or batch["input_ids"].shape[1] % multiple == 0


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(rows, min_size=2, max_size=5),
    splits=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    layout=st.sampled_from(["padded", "padding-free", "packed", "block mask"]),
    response_only=st.booleans(),
)
def test_any_split_and_layout_of_any_rows_is_the_same_step(
    tokenizer: Any,
    tiny_model: Any,
    rows: list[dict[str, str]],
    splits: list[int],
    layout: str,
    response_only: bool,
) -> None:
    """The mean over all trained tokens, and its gradient, against one example at a time."""
    formatter = AlpacaFormatter(
        tokenizer, "{instruction}|{input}|{output}", response_only=response_only
    )
    keeper = {"instruction": "a", "input": "", "output": "b"}
    dataset = formatter.encode([*rows, keeper], max_length=96).dataset
    examples = list(dataset)
    trained = sum(label != -100 for row in examples for label in row["labels"])
    if layout == "packed":
        examples = list(pack_examples(dataset, 128))
    micro_batches, start = [], 0
    while start < len(examples):
        size = splits[len(micro_batches) % len(splits)]
        micro_batches.append(examples[start : start + size])
        start += size
    collator = {
        "padded": PaddedCollator(0),
        "padding-free": PackedCollator(0),
        "packed": PackedCollator(0, pad_to_multiple_of=8),
        "block mask": PackedCollator(0, "block_mask"),
    }[layout]

    def step(batches: list[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
        tiny_model.zero_grad()
        total = 0.0
        for batch in batches:
            loss = tiny_model(**batch, use_cache=False, num_items_in_batch=trained).loss
            loss.backward()
            total += loss.item()
        return total, {n: p.grad.clone() for n, p in tiny_model.named_parameters()}

    loss, gradients = step([PaddedCollator(0)([row]) for row in dataset])
    other_loss, others = step([collator(batch) for batch in micro_batches])
    assert other_loss == pytest.approx(loss, rel=2e-6)
    for name, gradient in gradients.items():
        difference = (others[name] - gradient).abs().max().item()
        assert difference <= 1e-4 * gradient.abs().max().item() + 1e-9, name


messages = st.lists(
    st.tuples(filled, filled).map(
        lambda pair: [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    ),
    min_size=1,
    max_size=3,
).map(lambda turns: [message for turn in turns for message in turn])


@pytest.mark.parametrize("markers", [False, True])
@many
@given(conversation=messages)
def test_a_conversation_trains_the_assistants_words_and_their_ends(
    tokenizer: Any, markers: bool, conversation: list[dict[str, str]]
) -> None:
    template = tokenizer.chat_template
    if markers:
        template = template.replace(
            "{{ message['content'] }}<|im_end|>\n",
            "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
            "{% endgeneration %}<|im_end|>\n{% else %}{{ message['content'] }}<|im_end|>\n"
            "{% endif %}",
        )
        assert template != tokenizer.chat_template
    formatter = ChatFormatter(tokenizer, chat_template=template)
    (example,) = formatter.encode([{"messages": conversation}], max_length=100_000).dataset
    eos = tokenizer.eos_token_id
    expected_ids: list[int] = []
    trained: list[bool] = []
    for message in conversation:
        start = [tokenizer.convert_tokens_to_ids("<|im_start|>")]
        head = tokenizer(message["role"] + "\n", add_special_tokens=False)["input_ids"]
        is_answer = message["role"] == "assistant"
        content = message["content"]
        if not is_answer:
            head = []
            content = f"user\n{content}"
        body = tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for piece, is_trained in ((start, False), (head, False), (body, is_answer),
                                  ([eos], is_answer)):  # fmt: skip
            expected_ids += piece
            trained += [is_trained] * len(piece)
        if message is not conversation[-1]:
            line = tokenizer("\n", add_special_tokens=False)["input_ids"]
            expected_ids += line
            trained += [False] * len(line)
    assert example["input_ids"] == expected_ids
    assert example["labels"] == [
        token if is_trained else -100
        for token, is_trained in zip(expected_ids, trained, strict=True)
    ]
    prompt = formatter.prompt(conversation[:-1])
    assert example["input_ids"][: len(prompt.token_ids)] == prompt.token_ids
