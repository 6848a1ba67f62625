"""CUDA graphs of whole micro-batches: one launch instead of thousands.

The first micro-batch runs plainly, which warms every kernel up, and is captured afterwards;
later ones of sizes not seen before are captured at once and replayed. All graphs share one
memory pool; their gradients are added to the adapter copies inside the graph.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.device import can_reserve
from qlora_kit.engines.native.fast.fused_model import FusedModel
from qlora_kit.engines.native.fast.layout import MicroBatch

__all__ = ["GraphPool"]

logger = logging.getLogger(__name__)

#: Beyond this many, further sizes run plainly: each graph takes time to capture.
_MOST_GRAPHS = 32

_INPUTS = ("input_ids", "position_ids", "bounds", "trained", "targets")


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    batch: MicroBatch
    share: Tensor
    loss: Tensor
    stats: Tensor


class GraphPool:
    """Captures and replays micro-batches.

    Args:
        fused_model: A planned model on CUDA.
    """

    def __init__(self, fused_model: FusedModel) -> None:
        self._fused_model = fused_model
        self._graphs: dict[tuple[int, ...], _Captured] = {}
        self._pool: tuple[int, int] | None = None
        self._is_broken = False
        self._captures_cold = True

    def run(self, batch: MicroBatch, trained: int) -> tuple[Tensor, Tensor]:
        """Forward, backward and gathering of gradients.

        Args:
            batch: In host memory.
            trained: Trained tokens of the whole effective batch.

        Returns:
            The micro-batch's share of the mean loss, and ``[hits, entropy]``.
        """
        # Whatever changes a kernel's launch; contents are copied into the captured tensors.
        key = (len(batch.input_ids), len(batch.bounds), len(batch.trained), int(batch.longest))
        captured = self._graphs.get(key)
        if captured is None:
            moved = batch.to(self._fused_model.device)
            share = torch.full((), 1.0 / trained, device=self._fused_model.device)
            if self._graphs and self._captures_cold and len(self._graphs) < _MOST_GRAPHS:
                captured = self._capture(key, moved, share)
                self._captures_cold = captured is not None
            if captured is None:
                result = self._compute(moved, share)
                if not self._is_broken and len(self._graphs) < _MOST_GRAPHS:
                    self._is_broken = self._capture(key, moved, share) is None
                return result
        else:
            for name in _INPUTS:
                source = getattr(batch, name).pin_memory()
                getattr(captured.batch, name).copy_(source, non_blocking=True)
            captured.share.fill_(1.0 / trained)
        captured.graph.replay()
        return captured.loss, captured.stats

    def _compute(self, batch: MicroBatch, share: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = self._fused_model.loss(batch)
        loss = loss * share
        loss.backward()
        self._fused_model.end_micro_batch()
        return loss.detach(), stats

    def _capture(self, key: tuple[int, ...], batch: MicroBatch, share: Tensor) -> _Captured | None:
        """Record a micro-batch without running it; ``None`` when that failed."""
        graph = torch.cuda.CUDAGraph()
        device, room = self._fused_model.device, self._fused_model.plan.graph_bytes
        if self._pool is not None or not can_reserve(device, room):
            room = 0
        torch.cuda.synchronize(self._fused_model.device)
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                if room:
                    # In the pool that all graphs share; given back at once, and used from then on.
                    torch.empty(room, dtype=torch.uint8, device=self._fused_model.device)
                loss, stats = self._compute(batch, share)
        except RuntimeError as error:
            logger.warning("Capturing a CUDA graph failed: %s", str(error).splitlines()[0])
            torch.cuda.synchronize(self._fused_model.device)
            for copies in self._fused_model.gathered:
                copies.drop_gradients()
            return None
        self._pool = self._pool or graph.pool()
        logger.debug("Captured a CUDA graph for %s tokens.", len(batch.input_ids))
        # The graph goes on reading these very tensors.
        self._graphs[key] = _Captured(graph, batch, share, loss, stats)
        return self._graphs[key]
