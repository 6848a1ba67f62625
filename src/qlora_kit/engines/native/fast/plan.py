"""What the fast path decides to do, from what it was asked and what memory allows.

Works with counts of bytes and choices; no tensor is touched here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from qlora_kit.engines.native.fast.plan_options import FastPlan
from qlora_kit.engines.native.fast.step_memory import MemoryModel

__all__ = [
    "ResolvedPlan",
    "resolve_plan",
    "round_for_graph",
    "shrink_plan",
]

_GIB: Final = 1024**3


#: Beyond this many tokens a GPU's matrix products are as fast as they get, so that splitting
#: an effective batch costs less than recomputing activations.
_SATURATING_TOKENS: Final = 4096

#: Steps up to this size are bound by the host's kernel launches and by reading weights.
_SMALL_STEP_TOKENS: Final = 4096

#: Shorter pieces of the loss save nothing that matters.
_LEAST_CHUNK: Final = 256

# Part of the free memory that may be planned for; the rest is fragmentation and other users.
_USABLE_SHARE: Final = {"cuda": 0.90}
_USABLE_SHARE_ELSEWHERE: Final = 0.70


@dataclass(frozen=True)
class ResolvedPlan:
    """What was decided, with nothing left open.

    Attributes:
        micro_batch_tokens: Most tokens that go through the model at once.
        checkpointed_layers: Layers whose activations are recomputed, counted from the first.
        layers: Number of decoder layers.
        caches_weights: Whether dequantized weights are kept.
        loss_chunk_tokens: Tokens whose logits exist at the same time.
        graph_tokens: Micro-batches of up to this size are replayed as CUDA graphs; 0 for none.
        predicted_bytes: Predicted peak beyond the loaded model.
        usable_bytes: Memory that was thought usable when deciding.
        is_quantized: Whether the base weights are quantized.
        shards: Over how many ranks the base is spread; 1 where each holds all of it.
        step_bytes: Of what is predicted, what comes and goes with a micro-batch run plainly.
        graph_bytes: The same for those that are replayed.
        is_compiled: Whether layers go through ``torch.compile``.
    """

    micro_batch_tokens: int
    checkpointed_layers: int
    layers: int
    caches_weights: bool
    loss_chunk_tokens: int
    graph_tokens: int
    predicted_bytes: int
    usable_bytes: int
    is_quantized: bool = True
    shards: int = 1
    step_bytes: int = 0
    graph_bytes: int = 0
    is_compiled: bool = True

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether micro-batches are replayed as CUDA graphs."""
        return self.graph_tokens > 0

    @property
    def checkpointing(self) -> str:
        """``"none"``, ``"selective"`` or ``"full"``."""
        if self.checkpointed_layers == 0:
            return "none"
        return "full" if self.checkpointed_layers == self.layers else "selective"

    def __str__(self) -> str:
        recomputed = (
            f" ({self.checkpointed_layers} of {self.layers} layers)"
            if self.checkpointing == "selective"
            else ""
        )
        weights = "cached 16-bit" if self.caches_weights else "on-the-fly"
        return (
            f"micro-batches of up to {self.micro_batch_tokens:,} tokens, checkpointing "
            f"{self.checkpointing}{recomputed}, "
            f"{weights + ' weights, ' if self.is_quantized else ''}"
            f"{'' if self.is_compiled else 'not compiled, '}"
            f"{'CUDA graphs, ' if self.uses_cuda_graphs else ''}"
            f"{f'base sharded over {self.shards} ranks, ' if self.shards > 1 else ''}"
            f"{self.predicted_bytes / _GIB:.1f} GiB predicted beyond the model of "
            f"{self.usable_bytes / _GIB:.1f} GiB usable"
        )


def resolve_plan(
    asked: FastPlan,
    memory: MemoryModel,
    *,
    device_type: str,
    free_bytes: int,
    step_tokens: int,
    longest: int,
    is_quantized: bool,
    supports_graphs: bool,
    usual_tokens: int | None = None,
    most_tokens: int | None = None,
    shards: int = 1,
) -> ResolvedPlan:
    """Decide what was left to ``"auto"``.

    Args:
        asked: What the user pinned.
        memory: What a step of this model takes.
        device_type: ``"cuda"``, ``"cpu"``, ...
        free_bytes: Free memory on the device now, before any training buffer exists.
        step_tokens: Tokens of the largest effective batch to expect.
        longest: Tokens of its longest example, which cannot be split.
        is_quantized: Whether the weights are quantized, so that there is something to cache.
        supports_graphs: Whether CUDA graphs work for this model on this device.
        usual_tokens: Tokens of an average effective batch; the largest one's by default. Speed
            is decided by it, memory by the largest.
        most_tokens: Most tokens that attention should see at once, unless pinned.
        shards: Over how many ranks the base is spread. Nothing of it is kept dequantized then, and
            layers that come and go are no part of a CUDA graph.
    """
    if shards > 1:
        asked, supports_graphs = replace(asked, weights="nf4"), False
    usable = int(free_bytes * _USABLE_SHARE.get(device_type, _USABLE_SHARE_ELSEWHERE))
    chunk = asked.loss_chunk_tokens or _choose_loss_chunk(asked, device_type)
    shrinks = asked.loss_chunk_tokens is None
    layers = memory.layers
    usual_tokens = min(usual_tokens or step_tokens, step_tokens)

    def predict(tokens: int, checkpointed: int, caches: bool) -> int:
        return memory.predict(tokens, checkpointed, caches=caches, loss_chunk=chunk)

    # In the order of what each choice costs: caching weights pays only where steps are small;
    # smaller micro-batches cost nothing down to what saturates the card; then shorter chunks of
    # the loss; then recomputing layers, about a third of a step when all of them are.
    pinned = _pinned_layers(asked, layers)
    caches = asked.weights == "cache" and is_quantized
    if asked.weights == "auto" and is_quantized and asked.checkpointing != "full":
        whole = predict(min(step_tokens, 2 * _SMALL_STEP_TOKENS), pinned or 0, True)
        is_small = device_type != "cuda" or usual_tokens <= _SMALL_STEP_TOKENS
        caches = is_small and whole <= usable // 2
    tokens = asked.micro_batch_tokens
    if tokens is None:
        smallest = max(longest, min(step_tokens, _SATURATING_TOKENS))
        tokens = min(step_tokens, max(longest, most_tokens or step_tokens))
        smallest = min(smallest, tokens)
        while tokens > smallest and predict(tokens, pinned or 0, caches) > usable:
            tokens = max(smallest, (tokens + 1) // 2)
    tokens = max(tokens, 1)
    checkpointed = pinned
    if checkpointed is None:
        checkpointed = 0
        reach = max(tokens, longest)
        while shrinks and chunk > 1024 and predict(reach, 0, caches) > usable:
            chunk //= 2
        while checkpointed < layers and predict(reach, checkpointed, caches) > usable:
            checkpointed += 1
        if asked.checkpointing == "selective" and checkpointed == 0:
            checkpointed = (layers + 1) // 2
    # What is left when memory is scarcer than that: smaller pieces, slower ones.
    while (
        shrinks
        and chunk > _LEAST_CHUNK
        and predict(max(tokens, longest), checkpointed, caches) > usable
    ):
        chunk //= 2
    while (
        asked.micro_batch_tokens is None
        and tokens > longest
        and predict(tokens, checkpointed, caches) > usable
    ):
        tokens = max(longest, tokens // 2)
    graph_tokens = 0
    if asked.cuda_graphs is True:
        graph_tokens = tokens
    elif asked.cuda_graphs == "auto" and min(tokens, usual_tokens) <= _SMALL_STEP_TOKENS:
        graph_tokens = min(tokens, _SMALL_STEP_TOKENS)
    return _predict(
        ResolvedPlan(
            micro_batch_tokens=tokens,
            checkpointed_layers=checkpointed,
            layers=layers,
            caches_weights=caches,
            loss_chunk_tokens=chunk,
            graph_tokens=graph_tokens if supports_graphs else 0,
            predicted_bytes=0,
            usable_bytes=usable,
            is_quantized=is_quantized,
            shards=shards,
        ),
        memory,
        max(min(tokens, step_tokens), longest),
        drops_graphs=asked.cuda_graphs == "auto",
    )


def _predict(
    plan: ResolvedPlan, memory: MemoryModel, largest: int, *, drops_graphs: bool = False
) -> ResolvedPlan:
    """The plan with its predictions, for micro-batches of up to ``largest`` tokens."""

    def predict_step(tokens: int) -> int:
        return memory.predict_step(
            tokens, plan.checkpointed_layers,
            caches=plan.caches_weights, loss_chunk=plan.loss_chunk_tokens,
        )  # fmt: skip

    held = memory.hold(caches=plan.caches_weights)
    graphs = min(plan.graph_tokens, largest)
    # Graphs have memory of their own. What is larger than they are runs plainly, beside them.
    graph_bytes = predict_step(round_for_graph(graphs)) if graphs else 0
    step_bytes = predict_step(largest) if graphs < largest else 0
    if graphs and drops_graphs and held + graph_bytes + step_bytes > plan.usable_bytes:
        graph_bytes, step_bytes = 0, predict_step(largest)
        plan = replace(plan, graph_tokens=0)
    return replace(
        plan,
        predicted_bytes=held + graph_bytes + step_bytes,
        step_bytes=step_bytes,
        graph_bytes=graph_bytes,
    )


def round_for_graph(tokens: int) -> int:
    """The size that a micro-batch is filled up to before it is replayed.

    Four sizes per doubling: a tenth of it is filler on average, and few graphs serve all.
    """
    step = max(128, 1 << ((tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


def shrink_plan(
    plan: ResolvedPlan, memory: MemoryModel, *, largest: int, longest: int
) -> ResolvedPlan | None:
    """The next smaller plan after memory ran out, pinned choices or not; ``None`` after the last.

    Args:
        plan: What was too much.
        memory: What a step of this model takes.
        largest: Tokens of the largest micro-batch that was tried.
        longest: Tokens of the step's longest example, which cannot be split.
    """
    most = min(plan.micro_batch_tokens, largest)
    tokens = max(longest, most // 2)
    if tokens < most:
        smaller = replace(plan, micro_batch_tokens=tokens)
    elif plan.checkpointed_layers < plan.layers:
        smaller = replace(plan, checkpointed_layers=plan.layers)
    elif plan.loss_chunk_tokens > _LEAST_CHUNK:
        smaller = replace(plan, loss_chunk_tokens=_LEAST_CHUNK)
    elif plan.caches_weights:
        smaller = replace(plan, caches_weights=False)
    else:
        return None
    smaller = replace(smaller, graph_tokens=min(plan.graph_tokens, smaller.micro_batch_tokens))
    return _predict(smaller, memory, max(min(smaller.micro_batch_tokens, most), longest))


def _pinned_layers(asked: FastPlan, layers: int) -> int | None:
    if asked.checkpointing == "none":
        return 0
    if asked.checkpointing == "full":
        return layers
    if asked.checkpointing == "selective" and asked.checkpointed_layers is not None:
        return min(asked.checkpointed_layers, layers)
    return None


def _choose_loss_chunk(asked: FastPlan, device_type: str) -> int:
    # On a GPU long chunks fill it better; whoever asks for full checkpointing wants memory.
    if device_type != "cuda":
        return 256
    return 1024 if asked.checkpointing == "full" else 4096
