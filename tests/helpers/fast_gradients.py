"""A step's loss and gradients, through peft and through the fast step."""

import torch

from qlora_kit.engines.native.fast.fused_model import FusedModel
from qlora_kit.engines.native.fast.layout import split_rows
from qlora_kit.engines.native.fast.plan import resolve_plan
from qlora_kit.engines.native.fast.plan_options import FastPlan
from qlora_kit.engines.native.fast.step_runner import StepRunner


def compute_reference(model, rows):
    """Mean loss per trained token and its gradients, one row at a time through peft."""
    model.train()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        labels = torch.tensor(row["labels"], device=model.device)[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    return float(total.detach() / count), take_gradients(model), count


def take_gradients(model):
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad()
    return gradients


def compute_fast(model, rows, count, **options):
    plan = FastPlan(**{"compile": False, **options})
    fused_model = FusedModel(model, plan)
    fused_model.apply(
        resolve_plan(
            plan, fused_model.memory_model(), device_type="cpu", free_bytes=2**33, step_tokens=200,
            longest=40, is_quantized=fused_model.is_quantized, supports_graphs=False,
        )
    )  # fmt: skip
    loss, stats = StepRunner(fused_model).run_step(split_rows(rows), count)
    return float(loss), take_gradients(model), stats, fused_model


def assert_gradients_equal(gradients, reference, tolerance):
    assert gradients.keys() == reference.keys()
    for name, expected in reference.items():
        assert expected.norm() > 0, name
        error = (gradients[name] - expected).norm() / expected.norm()
        assert error < tolerance, (name, float(error))
