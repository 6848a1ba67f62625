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
from qlora_kit.engines.native.fast.step_memory import count_state_bytes

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


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("rmsprop", torch.optim.RMSprop),
        ("sgd", torch.optim.SGD),
    ],
)
def test_gradients_and_states_take_what_was_predicted(wide, name, make):
    model = wide("float32").model
    fused_model = FusedModel(model, FastPlan(compile=False))
    fused_model.state_bytes = count_state_bytes(name)
    memory = fused_model.memory_model()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = make(trained, lr=1e-3)
    for one in trained:
        one.grad = torch.ones_like(one)
    optimizer.step()
    states = [one for kept in optimizer.state.values() for one in kept.values() if one.dim()]
    taken = sum(one.grad.nbytes for one in trained) + sum(one.nbytes for one in states)
    assert memory.optimizer == taken
    step = memory.predict_step(64, 0, caches=False, loss_chunk=64)
    predicted = memory.predict(64, 0, caches=False, loss_chunk=64)
    assert predicted == step + memory.standing + taken
