"""One forward pass, wherever the model is."""

from typing import Any

IDS = [[5, 6, 7, 8, 9, 40, 41, 300]]


def logits_of(model: Any, ids: list[list[int]] = IDS) -> Any:
    """Logits in evaluation mode: float32 on the CPU, so that models on two devices compare."""
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(ids, device=model.device)).logits.float().cpu()


def tolerance(cpu: float, gpu: float) -> float:
    """How far two runs may lie apart: a GPU adds in an order that differs from run to run."""
    import torch

    return gpu if torch.cuda.is_available() else cpu


def are_same(first: Any, second: Any) -> bool:
    """Whether two models' logits are the same: to the bit, unless one is computed on a GPU."""
    import torch

    return torch.allclose(first, second, rtol=0, atol=tolerance(0.0, 1e-5))
