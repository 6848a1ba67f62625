"""Rows become micro-batches that hold every token and every target once."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_kit.engines.native.fast.layout import lay_out, split_rows

ROWS = [
    {"input_ids": [10, 11, 12], "labels": [-100, 11, 12]},
    {"input_ids": [20, 21, 30, 31, 32], "labels": [20, 21, -100, 31, 32], "seq_lengths": [2, 3]},
]


def test_rows_are_split_into_examples_with_shifted_targets():
    examples = split_rows(ROWS)
    assert [example.input_ids.tolist() for example in examples] == [
        [10, 11, 12], [20, 21], [30, 31, 32],
    ]  # fmt: skip
    # What one example ends with is never asked to predict the next one's beginning.
    assert [example.targets.tolist() for example in examples] == [
        [11, 12, -100], [21, -100], [31, 32, -100],
    ]  # fmt: skip


def test_micro_batch_of_everything():
    (batch,) = lay_out(split_rows(ROWS), 100)
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21, 30, 31, 32]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.bounds.tolist() == [0, 3, 5, 8]
    assert batch.trained.tolist() == [0, 1, 3, 5, 6]
    assert batch.targets.tolist() == [11, 12, 21, 31, 32]
    assert (batch.tokens, batch.trained_tokens, int(batch.longest)) == (8, 5, 3)


def test_fillers_attend_among_themselves_and_carry_no_loss():
    (batch,) = lay_out(
        split_rows(ROWS), 100, round_tokens=lambda n: 16, round_count=lambda n: 12,
        round_trained=lambda n, tokens: 12,
        round_longest=lambda n: 5,
    )  # fmt: skip
    assert len(batch.input_ids) == 16
    assert batch.bounds.tolist() == [0, 3, 5, 8, 13, 16, *[16] * 6]
    assert batch.trained.tolist() == [0, 1, 3, 5, 6, *[6] * 7]
    assert batch.targets.tolist() == [11, 12, 21, 31, 32, *[-100] * 7]
    assert batch.bounds.dtype == torch.int32
    assert (batch.tokens, batch.trained_tokens) == (8, 5)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), most=st.integers(1, 100))
def test_nothing_is_lost_or_repeated(lengths, most):
    rows, token = [], 0
    for length in lengths:
        rows.append({"input_ids": list(range(token, token + length)), "labels": [0] * length})
        token += length
    batches = lay_out(split_rows(rows), most)
    assert torch.cat([batch.input_ids for batch in batches]).tolist() == list(range(token))
    assert sum(batch.trained_tokens for batch in batches) == token - len(lengths)
    for batch in batches:
        assert batch.tokens <= most or len(batch.bounds) == 2
        assert int(batch.longest) == int(batch.bounds.diff().max())


def test_a_row_without_loss_is_laid_out_all_the_same():
    (batch,) = lay_out(split_rows([{"input_ids": [1, 2], "labels": [-100, -100]}]), 8)
    assert batch.trained_tokens == 0
    assert batch.targets.numel() == 0


@pytest.mark.parametrize("most", [3, 8, 1000])
def test_micro_batches_are_of_even_size(most):
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}] * 10
    sizes = [batch.tokens for batch in lay_out(split_rows(rows), most)]
    assert max(sizes) - min(sizes) <= 4
