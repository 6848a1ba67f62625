"""What only a GPU can show: graphs, variable-length kernels, optimizers that do not wait."""

import pytest
import torch

from qlora_kit.engines.native.fast.fused_model import FusedModel
from qlora_kit.engines.native.fast.layout import split_rows
from qlora_kit.engines.native.fast.plan import resolve_plan
from qlora_kit.engines.native.fast.plan_options import FastPlan
from qlora_kit.engines.native.fast.step_runner import StepRunner
from qlora_kit.engines.native.layers.attention import attend, make_block_mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def _make_runner(model, **options):
    plan = FastPlan(**options)
    fused_model = FusedModel(model, plan)
    runner = StepRunner(fused_model)
    fused_model.apply(
        resolve_plan(
            plan, fused_model.memory_model(), device_type="cuda", free_bytes=2**33,
            step_tokens=2000,
            longest=40, is_quantized=fused_model.is_quantized,
            supports_graphs=runner.supports_graphs(),
        )
    )  # fmt: skip
    return runner


def _gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("weights", ["nf4", "cache"])
def test_replayed_graphs_give_the_plain_steps(make_adapted, token_rows, kind, weights):
    model = make_adapted(kind, dtype="bfloat16").model
    graphs = _make_runner(model, weights=weights, compile=False)
    plain = _make_runner(model, weights=weights, compile=False, cuda_graphs=False)
    assert graphs.fused_model.plan.uses_cuda_graphs
    # Several sizes, each seen more than once: captured, then replayed with other rows.
    for start in (0, 8, 0, 16, 24, 8, 40):
        examples = split_rows(token_rows[start : start + 8])
        loss, stats = plain.run_step(examples, 200)
        expected = _gradients(model)
        model.zero_grad()
        graph_loss, graph_stats = graphs.run_step(examples, 200)
        torch.testing.assert_close(graph_loss, loss, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(graph_stats, stats, rtol=1e-3, atol=1.0)
        for name, gradient in _gradients(model).items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 0.02, (name, float(error))
        model.zero_grad()
    assert graphs._graphs._graphs
    assert not graphs._graphs._is_broken


@pytest.mark.parametrize("width", [64, 128, 256])
def test_kernels_for_capped_scores_can_be_used(width):
    from qlora_kit.engines.native.layers.capped_attention import find_kernel_obstacle

    device = torch.device("cuda")
    assert find_kernel_obstacle(device, torch.bfloat16, 8, 4, width) is None


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (70, 0.0), (0, 2.0), (70, 2.0)])
def test_variable_length_attention_has_the_masks_gradients(window, softcap):
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 130, 64, 300]
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    shapes = ((total, 8, 64), (total, 2, 64), (total, 2, 64))
    leaves = [
        torch.randn(shape, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
        for shape in shapes
    ]
    probe = torch.randn((total, 8, 64), generator=generator).to("cuda", torch.bfloat16)
    longest = torch.tensor(512, dtype=torch.int32)
    results = []
    reach = torch.tensor(window, dtype=torch.int32)
    for mask in (None, make_block_mask(bounds, total, window)):
        out = attend(*leaves, bounds, longest, mask, window=reach, softcap=softcap)
        results.append((out, *torch.autograd.grad((out * probe).sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        error = (found - expected).float().norm() / expected.float().norm()
        assert error < 0.01, float(error)


def test_a_changed_example_leaves_its_neighbours_bit_equal(make_adapted, token_rows):
    runner = _make_runner(make_adapted("qwen3", dtype="bfloat16").model, compile=False)
    runner.fused_model.begin_step()
    rows = [dict(row) for row in token_rows[:6]]

    def run():
        (batch,) = runner._lay_out(split_rows(rows))
        with torch.no_grad():
            return runner.fused_model.hidden_states(batch.to(runner.fused_model.device))

    before = run()
    rows[2] = {**rows[2], "input_ids": [(i + 7) % 300 for i in rows[2]["input_ids"]]}
    after = run()
    start = sum(len(row["input_ids"]) for row in rows[:2])
    end = start + len(rows[2]["input_ids"])
    total = sum(len(row["input_ids"]) for row in rows)
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:total], after[end:total])
    assert not torch.equal(before[start:end], after[start:end])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("columns", [30, 4096, 9001, 151936])
@pytest.mark.parametrize("softcap", [0.0, 6.0])
def test_fused_softmax_equals_the_plain_one(columns, dtype, tolerance, softcap):
    from qlora_kit.engines.native.layers.loss import plain_softmax_step
    from qlora_kit.engines.native.layers.softmax import fused_softmax_step

    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn((64, columns), generator=generator)).to("cuda", dtype)
    targets = torch.randint(0, columns, (64,), generator=generator).cuda()
    targets[3] = targets[10] = -100
    targets[0], targets[1] = logits[0].argmax(), columns - 1
    expected, sums = plain_softmax_step(logits.clone(), targets, softcap)
    gradient, found = fused_softmax_step(logits, targets, softcap)
    assert gradient is logits
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(found, sums, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("columns", [128, 1000, 9728])
def test_fused_gating_equals_the_plain_expression(columns):
    from qlora_kit.engines.native.layers.swiglu import swiglu

    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn((37, 2 * columns), generator=generator).cuda().requires_grad_()
    probe = torch.randn((37, columns), generator=generator).cuda()
    out = swiglu(gate_up)
    gate, up = gate_up.split(columns, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad((out * probe).sum(), gate_up)
    (reference,) = torch.autograd.grad((expected * probe).sum(), gate_up)
    torch.testing.assert_close(grad, reference)


def test_compiled_steps_equal_plain_ones(make_adapted, token_rows):
    model = make_adapted("qwen3", dtype="bfloat16").model
    examples = split_rows(token_rows[:12])
    results = []
    for compiled in (False, True):
        runner = _make_runner(model, compile=compiled, cuda_graphs=False)
        assert (runner.fused_model.shape.gated is not None) is compiled
        loss, _ = runner.run_step(examples, 200)
        results.append((loss, _gradients(model)))
        model.zero_grad()
    (loss, gradients), (compiled_loss, compiled_gradients) = results
    torch.testing.assert_close(compiled_loss, loss, rtol=5e-3, atol=1e-3)
    for name, gradient in gradients.items():
        error = (compiled_gradients[name] - gradient).norm() / gradient.norm()
        assert error < 0.03, (name, float(error))


def test_a_step_that_a_card_has_no_room_for_is_computed_anew(make_adapted, token_rows, caplog):
    """With a cap on the allocator; the gradients are those of the step computed whole."""
    model = make_adapted("qwen3", dtype="float32").model
    examples = split_rows(token_rows * 60)
    options = {"compile": False, "cuda_graphs": False, "micro_batch_tokens": 10**6}
    trained = sum(int((one.targets != -100).sum()) for one in examples)
    loss, _ = _make_runner(model, **options).run_step(examples, trained)
    expected = _gradients(model)
    model.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    runner = _make_runner(model, **options)
    before = torch.cuda.memory_reserved()
    runner.run_step(examples, trained)
    peak = torch.cuda.max_memory_reserved() - before
    model.zero_grad()
    capped = _make_runner(model, **options)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + peak // 2
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        again, _ = capped.run_step(examples, trained)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    tokens = sum(len(one.input_ids) for one in examples)
    assert capped.fused_model.plan.micro_batch_tokens <= tokens // 2
    assert caplog.text.count("Memory ran out in a step") == 1
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
