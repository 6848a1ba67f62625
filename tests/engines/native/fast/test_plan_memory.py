"""What is predicted of a micro-batch against what its tensors take, by torch's own count."""

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qlora_kit import attach_lora, load_quantized
from qlora_kit.engines.native.fast.fused_model import FusedModel
from qlora_kit.engines.native.fast.layout import Example, lay_out
from qlora_kit.engines.native.fast.plan import resolve_plan
from qlora_kit.engines.native.fast.plan_options import FastPlan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts a CPU's allocations")

LAYERS, TOKENS = 4, 1024


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    from checkpoints import make_checkpoint

    folder = make_checkpoint(
        tmp_path_factory.mktemp("wide") / "base", "llama", hidden_size=128, intermediate_size=320,
        num_attention_heads=8, num_hidden_layers=LAYERS,
    )  # fmt: skip

    def load(dtype):
        base = load_quantized(folder, 2048, dtype, load_in_4bit=False, engine="native")
        return attach_lora(base, r=4)

    return load


def _measure_peak(compute):
    """Most bytes that were allocated at a time, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    return int(
        np.cumsum([one.nbytes() for one in sorted(events, key=lambda e: e.start_ns())]).max()
    )


@pytest.mark.parametrize(
    ("dtype", "recomputed"), [("float32", 0), ("bfloat16", 1), ("bfloat16", LAYERS)]
)
def test_a_micro_batch_takes_what_was_predicted(wide, dtype, recomputed):
    model = wide(dtype).model
    how = {0: "none", 1: "selective", LAYERS: "full"}[recomputed]
    asked = FastPlan(
        compile=False, checkpointing=how, loss_chunk_tokens=64,
        checkpointed_layers=1 if how == "selective" else None,
    )  # fmt: skip
    fused_model = FusedModel(model, asked)
    memory = fused_model.memory_model()
    plan = resolve_plan(
        asked, memory, device_type="cpu", free_bytes=2**34, step_tokens=TOKENS, longest=TOKENS,
        is_quantized=False, supports_graphs=False,
    )  # fmt: skip
    fused_model.apply(plan)
    ids = np.random.default_rng(0).integers(5, 300, TOKENS)
    (batch,) = lay_out([Example(ids, np.roll(ids, -1))], TOKENS)

    def compute():
        loss, _ = fused_model.loss(batch)
        loss.backward()
        fused_model.end_micro_batch()

    fused_model.begin_step()
    compute()
    taken = _measure_peak(compute)
    assert plan.predicted_bytes == plan.step_bytes + memory.hold(caches=False)
    assert 0.8 * plan.step_bytes < taken <= plan.step_bytes
