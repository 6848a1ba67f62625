"""What the fast path is asked to do, and what it decided to do.

Works with counts of bytes and choices; no tensor is touched here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

from qlora_kit.errors import ConfigError, UnknownOptionError, invalid_value
from qlora_kit.values import is_whole_number

__all__ = [
    "CAPPED_QUERIES",
    "FastPlan",
    "MemoryModel",
    "ResolvedPlan",
    "count_state_bytes",
    "parse_plan",
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

#: Queries whose soft-capped attention scores exist at the same time.
CAPPED_QUERIES: Final = 512

#: Shorter pieces of the loss save nothing that matters.
_LEAST_CHUNK: Final = 256

# Part of the free memory that may be planned for; the rest is fragmentation and other users.
_USABLE_SHARE: Final = {"cuda": 0.90}
_USABLE_SHARE_ELSEWHERE: Final = 0.70

#: What tensors' bytes leave out: gaps between blocks of many sizes (an H200 reserved 3 to 5% more
#: than was allocated, ``benchmarks/plan_memory.py``), and products' workspaces on a GPU.
_RESERVED_SHARE: Final = 1.05
_WORKSPACE_BYTES: Final = 96 * 1024**2
#: And the gaps between blocks that stay: 0.01 to 0.13 GiB on an H200 in three plans.
_STANDING_GAPS: Final = 192 * 1024**2

#: Bytes of an optimizer's states for each number that trains, by a part of its name; Adam has two
#: in float32.
_STATE_BYTES: Final = {
    "8bit": 2, "4bit": 1, "adafactor": 0, "sgd": 0, "lion": 4, "rmsprop": 4, "adagrad": 4,
}  # fmt: skip


@dataclass(frozen=True)
class FastPlan:
    """How the native engine computes a training step. None of it changes the maths.

    Attributes:
        enabled: ``"auto"`` uses the fast path where the model allows it and logs the reason
            where not; ``True`` insists (:class:`~qlora_kit.errors.EngineError` otherwise);
            ``False`` trains through TRL and peft alone.
        micro_batch_tokens: Most tokens that go through the model at once; ``None`` chooses by
            memory. A longer example still goes through whole.
        checkpointing: ``"none"``, ``"full"`` (recompute every layer in the backward pass),
            ``"selective"`` (recompute as many layers as memory demands, or
            ``checkpointed_layers``), or ``"auto"``.
        checkpointed_layers: How many layers ``"selective"`` recomputes.
        weights: ``"nf4"`` dequantizes on the fly, ``"cache"`` keeps the dequantized weights (2
            bytes per parameter, the same numbers), ``"auto"`` chooses by memory.
        compile: Whether decoder layers go through ``torch.compile``; ``"auto"`` leaves it out
            where no compiler is found, and on a CPU where the run is too short for it.
        cuda_graphs: Whether micro-batches are replayed as CUDA graphs.
        attention: ``"varlen"`` (kernels that know the examples apart), ``"mask"`` (SDPA with a
            block-diagonal mask), or ``"auto"``.
        loss_chunk_tokens: Tokens whose logits exist at the same time; ``None`` chooses.
        shard: Whether each rank of a machine holds only its share of the base's layers, which are
            sent around as they are needed; ``"auto"`` where the step would not fit otherwise.
    """

    enabled: bool | Literal["auto"] = "auto"
    micro_batch_tokens: int | None = None
    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    checkpointed_layers: int | None = None
    weights: Literal["auto", "nf4", "cache"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    cuda_graphs: bool | Literal["auto"] = "auto"
    attention: Literal["auto", "varlen", "mask"] = "auto"
    loss_chunk_tokens: int | None = None
    shard: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("enabled", "compile", "cuda_graphs", "shard"):
            _check_choice(name, getattr(self, name), (True, False, "auto"))
        _check_choice("checkpointing", self.checkpointing, ("auto", "none", "selective", "full"))
        _check_choice("weights", self.weights, ("auto", "nf4", "cache"))
        _check_choice("attention", self.attention, ("auto", "varlen", "mask"))
        if self.checkpointed_layers is not None and self.checkpointing != "selective":
            raise ConfigError(
                f"plan option checkpointed_layers={self.checkpointed_layers!r} needs "
                f"checkpointing='selective', not {self.checkpointing!r}."
            )
        if self.shard is True:
            # Each keeps on every card what sharding would take from it, or at a fixed place.
            for name, value in (
                ("enabled", False), ("weights", "cache"), ("cuda_graphs", True),
            ):  # fmt: skip
                if getattr(self, name) == value:
                    raise ConfigError(
                        f"plan options shard=True and {name}={value!r} exclude each other; leave "
                        f"out one of them."
                    )
        for name in ("micro_batch_tokens", "checkpointed_layers", "loss_chunk_tokens"):
            value = getattr(self, name)
            if value is not None and not is_whole_number(value, at_least=1):
                raise ConfigError(
                    f"plan option {name} must be a whole number of at least 1 or None, "
                    f"got {value!r}."
                )


@dataclass(frozen=True)
class MemoryModel:
    """What a training step of one model takes, in bytes.

    Attributes:
        layers: Number of decoder layers.
        saved_per_token: Activations one layer keeps per token for its backward pass.
        boundary_per_token: A layer's input per token, all that a recomputed layer keeps.
        transient_per_token: The largest extra per-token buffers while one layer runs backward.
        product_per_token: The same while one of its weights is dequantized.
        final_per_token: What the last normalization keeps of a token while the loss is computed.
        final_grad_per_token: The same, and what its own backward pass takes.
        dequantized: All projection weights, dequantized.
        largest_group: The largest group of projection weights, dequantized.
        loss_per_token: Logits and their gradient for one token.
        standing: What is there before the first step: copies of the adapters, their gathered
            gradients, and scales of the base's weights.
        optimizer: Gradients as the optimizer gets them, and its states.
        stepping: What it holds for the moment.
        workspace: What matrix products take of the device.
    """

    layers: int
    saved_per_token: int
    boundary_per_token: int
    transient_per_token: int
    product_per_token: int
    final_per_token: int
    final_grad_per_token: int
    dequantized: int
    largest_group: int
    loss_per_token: int
    standing: int
    optimizer: int = 0
    stepping: int = 0
    workspace: int = 0

    @classmethod
    def of_layers(
        cls,
        *,
        layers: int,
        hidden: int,
        queries: int,
        keys: int,
        intermediate: int,
        post_norms: int = 0,
        capped_heads: int = 0,
        item_bytes: int,
        vocabulary: int,
        has_triton: bool,
        dequantized: int,
        largest_group: int,
        copies: int,
        routed: int = 0,
        dropped: int = 0,
        scales: int = 0,
        trained: int = 0,
        state_bytes: int = 8,
        is_compiled: bool = True,
    ) -> MemoryModel:
        """What a step takes, from widths in numbers and from sizes in bytes.

        Args:
            layers: Number of decoder layers.
            hidden: Width of a token's state.
            queries: Width of all heads' queries.
            keys: Width of all heads' keys.
            intermediate: Width within the MLP; of all experts that a token goes to.
            post_norms: Norms of a layer's outputs, whose inputs are kept too.
            capped_heads: Attention heads whose scores are soft-capped and so written out.
            item_bytes: Bytes of a number.
            vocabulary: Tokens that the head scores.
            has_triton: Whether it runs on CUDA, where a kernel turns logits into their gradient in
                place.
            dequantized: Bytes of all projection weights, dequantized.
            largest_group: Bytes of the largest group of them.
            copies: Bytes of the adapters' copies and their gathered gradients.
            scales: Bytes of the base's scales in float32.
            trained: Numbers that train.
            state_bytes: Bytes of the optimizer's states for each of them.
            is_compiled: Whether layers go through the compiler, which keeps less of them.
            routed: Experts that a token goes to, each with a row of its own; 0 for none.
            dropped: Width of what a layer's adapters see of their inputs through dropout.
        """
        # Kept per token: normalized inputs, q/k/v before and after rotation, attention output,
        # gate and up, their product. The softmax keeps a float32 number for each head, and
        # adapters what lies between their matrices: each is less than the gaps.
        saved = (3 + post_norms) * hidden + 2 * (queries + 2 * keys) + queries + 3 * intermediate
        if not is_compiled:
            # The opened gate; and in 16 bits normalized numbers in float32.
            saved += intermediate
            saved += 0 if item_bytes >= 4 else 4 * hidden + 2 * (queries + keys)
        # Four of them in float32 in the backward pass.
        scores = 16 * capped_heads * CAPPED_QUERIES
        # A token's rows are gathered and added up again, each way.
        rows = 2 * hidden if not routed else 4 * hidden * routed
        return cls(
            layers=layers,
            # What was dropped is kept as a byte.
            saved_per_token=saved * item_bytes + dropped * (item_bytes + 1),
            boundary_per_token=hidden * item_bytes,
            # Where gate and up get their gradients, from the product's, which takes the product's
            # own place: two of the residual stream beside them.
            transient_per_token=(rows + 2 * intermediate) * item_bytes + scores,
            product_per_token=(rows + 2 * hidden + intermediate) * item_bytes + scores,
            # Outside of the compiled layers, and in float32.
            final_per_token=hidden * (4 * item_bytes + 8),
            final_grad_per_token=hidden * (6 * item_bytes + 12),
            dequantized=dequantized,
            largest_group=largest_group,
            # Triton's kernel turns logits into their gradient in place.
            loss_per_token=vocabulary * (item_bytes if has_triton else 2 * item_bytes + 8),
            standing=copies + scales + (_STANDING_GAPS if has_triton else 0),
            optimizer=trained * (4 + state_bytes),
            stepping=4 * trained if state_bytes >= 8 else 0,
            workspace=_WORKSPACE_BYTES if has_triton else 0,
        )

    @property
    def on_the_fly(self) -> int:
        """Bytes of weights that are dequantized for the moment."""
        # The next group is dequantized while the last one's memory is still held; in 16 bits on
        # a GPU it is copied beside its adapters.
        times = (2 if self.dequantized else 0) + (1 if self.workspace else 0)
        return times * self.largest_group

    def predict(self, tokens: int, checkpointed: int, *, caches: bool, loss_chunk: int) -> int:
        """Peak bytes beyond the loaded model for a micro-batch of ``tokens``."""
        return self.hold(caches=caches) + self.predict_step(
            tokens, checkpointed, caches=caches, loss_chunk=loss_chunk
        )

    def hold(self, *, caches: bool) -> int:
        """Bytes that stay from step to step."""
        return self.standing + self.optimizer + (self.dequantized if caches else 0)

    def predict_step(self, tokens: int, checkpointed: int, *, caches: bool, loss_chunk: int) -> int:
        """Bytes that come and go with a micro-batch, at their peak."""
        # A layer that is not recomputed keeps its activations; every layer keeps its input.
        kept = (self.layers - checkpointed) * self.saved_per_token
        kept += self.layers * self.boundary_per_token
        weights = 0 if caches else self.on_the_fly
        beside = max(tokens * self.transient_per_token, tokens * self.product_per_token + weights)
        # The loss comes before the first layer's backward pass; of the recomputed layers (Chen et
        # al., arXiv:1604.06174) one at a time holds all of its own, when the others are done.
        loss = max(
            tokens * self.final_per_token + min(loss_chunk, tokens) * self.loss_per_token,
            tokens * self.final_grad_per_token,
        )
        again = checkpointed * self.boundary_per_token + self.saved_per_token
        peak = max(
            tokens * kept + loss,
            tokens * kept + (beside if checkpointed < self.layers else 0),
            tokens * again + beside if checkpointed else 0,
            self.stepping,
        )
        return int(_RESERVED_SHARE * peak) + self.workspace


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


def parse_plan(plan: object) -> FastPlan:
    """A :class:`FastPlan` from what a user may type.

    Args:
        plan: A :class:`FastPlan`; ``"auto"``, ``None`` or ``True`` for all choices automatic;
            ``False`` for no fast path; or a mapping of option names to values.

    Raises:
        UnknownOptionError: When the mapping has a key that is not an option.
        ConfigError: When it is something else, or a value cannot work.
    """
    if isinstance(plan, FastPlan):
        return plan
    if plan is None or plan == "auto":
        return FastPlan()
    if isinstance(plan, bool):
        return FastPlan(enabled="auto" if plan else False)
    if isinstance(plan, Mapping):
        known = [field.name for field in fields(FastPlan)]
        for name in plan:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise UnknownOptionError(
                    f"plan has no option {name!r}.{hint} Options: {', '.join(known)}."
                )
        return FastPlan(**plan)
    raise invalid_value("plan", "must be 'auto', False, a mapping of options or a FastPlan", plan)


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


def count_state_bytes(optimizer: object) -> int:
    """Bytes of an optimizer's states for each number that trains, by its name."""
    name = str(getattr(optimizer, "value", optimizer))
    return next((size for word, size in _STATE_BYTES.items() if word in name), 8)


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


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    # `1 in (True, ...)` holds in Python, and is not what anyone means here.
    if not any(
        value is choice or (isinstance(choice, str) and value == choice) for choice in choices
    ):
        raise ConfigError(
            f"plan option {name} must be one of {', '.join(map(repr, choices))}; got {value!r}."
        )
