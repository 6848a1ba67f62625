"""Memory that runs out in a step: the step is computed anew with less, to the same gradients.

On a card, see test_cuda.py.
"""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.engines.native.fast.layout import split_rows
from qlora_kit.engines.native.fast.plan import ResolvedPlan, shrink_plan


class LimitedMemory(TorchDispatchMode):
    """An allocator that has no room for a tensor beyond so many bytes, as a full card has none."""

    def __init__(self, most_bytes):
        super().__init__()
        self.most_bytes, self.refused = most_bytes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        taken = {id(one.untyped_storage()) for one in args if isinstance(one, torch.Tensor)}
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, torch.Tensor) and not func.is_view:
                storage = one.untyped_storage()
                if id(storage) not in taken and storage.nbytes() > self.most_bytes:
                    self.refused += 1
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes."
                    )
        return found


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="models are on the card")


@pytest.fixture
def train(make_adapted, make_trainer):
    """Train a few steps with so much memory; weights, plan, losses and refused allocations."""

    def run(most_bytes=2**40):
        adapted = make_adapted(load_in_4bit=False)
        plan = {"compile": False, "loss_chunk_tokens": 16}
        trainer = make_trainer(adapted, plan, max_steps=3, use_cpu=True)
        memory = LimitedMemory(most_bytes)
        with memory:
            trainer.train()
        resolved, losses = trainer.fast_plan, trainer.step_losses
        trainer.release()
        weights = [one.detach() for one in adapted.model.parameters() if one.requires_grad]
        return weights, resolved, losses, memory.refused

    return run


def test_a_step_that_does_not_fit_is_computed_anew_in_smaller_parts(train, token_rows, caplog):
    whole, plan, losses, _ = train()
    tokens = sum(len(row["input_ids"]) for row in token_rows[:8])
    # The MLP's gate and up projections of a token are 2 x 128 float32 numbers: a quarter fits.
    with caplog.at_level(logging.WARNING):
        parts, smaller, again, refused = train(most_bytes=tokens * 2 * 128)
    assert refused >= 1
    assert smaller.micro_batch_tokens <= plan.micro_batch_tokens // 2
    assert smaller.predicted_bytes < plan.predicted_bytes
    said = [record for record in caplog.records if "Memory ran out in a step" in record.message]
    assert 1 <= len(said) <= 2
    assert "The effective batch is the same." in said[0].message
    assert again == pytest.approx(losses, rel=1e-5)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_no_plan_fits_ends_with_the_allocator_s_own_error(train):
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        train(most_bytes=4000)


def test_plans_shrink_to_the_longest_example_and_then_by_what_is_left(make_adapted, token_rows):
    from qlora_kit.engines.native.fast.fused_model import FusedModel
    from qlora_kit.engines.native.fast.plan_options import FastPlan

    memory = FusedModel(make_adapted().model, FastPlan(compile=False)).memory_model()
    longest = max(len(example.input_ids) for example in split_rows(token_rows[:8]))
    plan = ResolvedPlan(10**6, 0, 2, True, 4096, 300, 10**9, 10**9)
    seen = []
    while plan is not None:
        seen.append(plan)
        plan = shrink_plan(plan, memory, largest=200, longest=longest)
    tokens = [plan.micro_batch_tokens for plan in seen]
    assert tokens[:2] == [10**6, 100]
    assert tokens[-1] == longest
    assert seen[-1].graph_tokens <= longest
    assert (seen[-1].checkpointed_layers, seen[-1].loss_chunk_tokens) == (2, 256)
    assert not seen[-1].caches_weights
    predicted = [plan.predicted_bytes for plan in seen[1:]]
    assert predicted == sorted(predicted, reverse=True)
