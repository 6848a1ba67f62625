"""What the fast path may be asked to do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from qlora_kit.errors import ConfigError, UnknownOptionError, invalid_value
from qlora_kit.values import is_whole_number

__all__ = ["FastPlan", "parse_plan"]


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


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    # `1 in (True, ...)` holds in Python, and is not what anyone means here.
    if not any(
        value is choice or (isinstance(choice, str) and value == choice) for choice in choices
    ):
        raise ConfigError(
            f"plan option {name} must be one of {', '.join(map(repr, choices))}; got {value!r}."
        )
