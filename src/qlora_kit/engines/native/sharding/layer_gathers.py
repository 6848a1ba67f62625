"""Decoder layers that other ranks hold, brought here one ahead of their computation.

Two buffers take turns. While a layer is computed from one, its neighbour's weights arrive in the
other, on a stream of their own; backward passes and recomputations read the same buffers, into
which each layer's weights have been brought again by then. Every rank of a machine does this in
the same order, whether it has anything to compute or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from qlora_kit.engines.native.sharding.shards import find_owner
from qlora_kit.ranks import Node

__all__ = ["LayerGathers", "measure_buffers"]

#: Kernels want their inputs at such addresses.
_ALIGNMENT = 256
_BUFFERS = 2


class LayerGathers:
    """Brings the frozen weights of layers to every rank of a machine.

    Args:
        layers: What each layer reads: named tuples of groups, whose ``weights`` and ``scales`` are
            lists of tensors; absent ones where another rank holds them.
        node: The ranks that hold them.
        device: Where they are computed.
    """

    def __init__(self, layers: Sequence[Any], node: Node, device: torch.device) -> None:
        self._node = node
        frozen = [list(_list_frozen(layer)) for layer in layers]
        self._sizes = [_measure(layer) for layer in layers]
        self._buffers = [
            torch.empty(max(self._sizes), dtype=torch.uint8, device=device) for _ in range(_BUFFERS)
        ]
        #: What to compute with: the same layers over the buffers.
        self.layers = [
            _with_frozen(layer, _view(tensors, self._buffers[index % _BUFFERS]))
            for index, (layer, tensors) in enumerate(zip(layers, frozen, strict=True))
        ]
        # Written through views of their own: autograd keeps the others, and would take them for
        # changed.
        self._own = {
            index: (list(_view(tensors, self._buffers[index % _BUFFERS])), tensors)
            for index, tensors in enumerate(frozen)
            if find_owner(index, node) == node.position
        }
        self._held: list[int | None] = [None] * _BUFFERS
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrivals: list[Any] = [None] * _BUFFERS
        self._rest: list[tuple[Callable[[int], None], int]] = []

    def begin(self, micro_batches: int, *, with_backward: bool) -> None:
        """Start a step of so many micro-batches on this rank; others may have more.

        Each takes all layers forward, and back where there are gradients.
        """
        once: list[tuple[Callable[[int], None], int]]
        once = [(self._bring_forward, index) for index in range(len(self.layers))]
        if with_backward:
            once += [(self._bring_backward, index) for index in reversed(range(len(self.layers)))]
        self._rest = once[::-1] * self._node.find_most(micro_batches)

    def any_failed(self, failed: bool) -> bool:
        """Whether a rank of this machine has to compute the step again; all end it first."""
        self.finish()
        return bool(self._node.find_most(int(failed)))

    def before(self, index: int) -> None:
        """Have a layer's weights here before it is computed."""
        self._advance(self._bring_forward, index)

    def after(self, index: int, hidden: Tensor) -> None:
        """Have them here again before the backward pass of the layer that made ``hidden``."""
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._advance(self._bring_backward, index))

    def finish(self) -> None:
        """Take part in what is left of a step that was not computed, or not to its end."""
        while self._rest:
            bring, index = self._rest.pop()
            bring(index)

    def _advance(self, bring: Callable[[int], None], index: int) -> None:
        expected = self._rest.pop()
        # Out of step with the other ranks, weights of one layer would arrive as another's.
        assert expected == (bring, index), (expected, index)
        bring(index)

    def _bring_forward(self, index: int) -> None:
        self._need(index)
        if index + 1 < len(self.layers):
            self._bring(index + 1)

    def _bring_backward(self, index: int) -> None:
        self._need(index)
        if index > 0:
            self._bring(index - 1)

    def _need(self, index: int) -> None:
        self._bring(index)
        arrival = self._arrivals[index % _BUFFERS]
        if arrival is not None:
            torch.cuda.current_stream().wait_event(arrival)

    def _bring(self, index: int) -> None:
        at = index % _BUFFERS
        if self._held[at] == index:
            return
        self._held[at] = index
        with self._beside():
            own = self._own.get(index)
            with torch.no_grad():
                if own is not None:
                    torch._foreach_copy_(*own, non_blocking=True)
                distributed.broadcast(
                    self._buffers[at][: self._sizes[index]],
                    self._node.members[find_owner(index, self._node)],
                    self._node.group,
                )
            if self._stream is not None:
                self._arrivals[at] = self._stream.record_event()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On a stream of its own, once whatever reads the buffer now has done so."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield


def measure_buffers(layers: Sequence[Any]) -> int:
    """Bytes that :class:`LayerGathers` takes for layers, given as their groups."""
    return _BUFFERS * max(_measure(layer) for layer in layers)


def _measure(layer: Any) -> int:
    return sum(_take_room(tensor) for tensor in _list_frozen(layer))


def _list_frozen(layer: Any) -> Iterator[Tensor]:
    for group in layer:
        if hasattr(group, "weights"):
            yield from group.weights
            yield from group.scales


def _with_frozen(layer: Any, tensors: Iterator[Tensor]) -> Any:
    changed = {
        name: group._replace(
            weights=[next(tensors) for _ in group.weights],
            scales=[next(tensors) for _ in group.scales],
        )
        for name, group in layer._asdict().items()
        if hasattr(group, "weights")
    }
    return layer._replace(**changed)


def _take_room(tensor: Tensor) -> int:
    nbytes: int = tensor.numel() * tensor.element_size()
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _view(tensors: Sequence[Tensor], buffer: Tensor) -> Iterator[Tensor]:
    """Tensors of the same shapes in a buffer, which autograd does not know to be one memory."""
    start = 0
    for tensor in tensors:
        made = torch.empty(0, dtype=tensor.dtype, device=buffer.device)
        yield made.set_(
            buffer.untyped_storage(), start // tensor.element_size(), tuple(tensor.shape)
        )
        start += _take_room(tensor)
