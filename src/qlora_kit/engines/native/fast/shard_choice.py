"""Whether a run shards its base, and what has to hold where it does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from qlora_kit import ranks
from qlora_kit.engines.native.fast.plan import ResolvedPlan
from qlora_kit.engines.native.fast.plan_options import FastPlan
from qlora_kit.engines.native.sharding.shards import has_absent
from qlora_kit.errors import ConfigError, EngineError

__all__ = ["check_shards", "refuse_without_fast_step", "resolve_with_shards"]

logger = logging.getLogger(__name__)

_LOADED_SO = "The base was loaded in shards: this rank holds only a part of its layers"


def check_shards(fused_model: Any, asked: FastPlan) -> None:
    """Refuse a plan for shards that cannot be followed. Every rank must ask.

    Raises:
        ConfigError: When there are no ranks to spread the base over, or it is spread already and
            should not be.
        EngineError: When some projections run through peft, which needs them whole.
    """
    is_sharded = fused_model.node is not None
    if is_sharded and (asked.shard is False or asked.weights == "cache"):
        raise ConfigError(
            f"{_LOADED_SO}, which plan options shard=False and weights='cache' exclude. Load it "
            "with shard=False."
        )
    if asked.shard is not True and not is_sharded:
        return
    if len(ranks.join_node().members) == 1:
        raise ConfigError(
            "plan asks for a sharded base (shard=True), and this machine has one process of the "
            "run, which holds all of it. Start one process per card, or leave shard to 'auto'."
        )
    if fused_model.has_experts:
        raise EngineError(
            "A base with experts cannot be sharded: every rank computes with all of them. Set "
            "shard=False, or train on cards that hold it."
        )
    if not fused_model.is_fully_fused:
        raise EngineError(
            "A sharded base needs every projection in the fast training step, and some of this "
            "model run through peft (the log says which and why). Change what it names, or set "
            "shard=False where the base fits a card."
        )


def refuse_without_fast_step(model: Any, asked: FastPlan, obstacle: str) -> None:
    """Refuse to train through TRL and peft what is sharded or should be.

    Raises:
        EngineError: Names the obstacle.
    """
    if asked.shard is True or (ranks.find_place().world > 1 and has_absent(model)):
        raise EngineError(
            f"A sharded base is trained by the fast training step alone, and {obstacle}. Change "
            "that, or load and train with shard=False where the base fits a card."
        )


def resolve_with_shards(
    fused_model: Any, asked: FastPlan, resolve: Callable[[], ResolvedPlan]
) -> ResolvedPlan:
    """The plan, after the base was sharded where that is asked for or needed.

    Every rank must ask.

    Args:
        fused_model: What is trained.
        asked: What the user pinned.
        resolve: Makes the plan for the model as it is at that moment.
    """
    plan = resolve()
    if fused_model.node is not None or asked.shard is False or ranks.find_place().world == 1:
        return plan
    node = ranks.join_node()
    if len(node.members) == 1:
        return plan
    can = fused_model.is_fully_fused and not fused_model.has_experts
    can = can and asked.weights != "cache" and asked.cuda_graphs is not True
    too_much = can and plan.predicted_bytes > plan.usable_bytes
    if asked.shard is not True and not node.find_most(int(too_much)):
        return plan
    fused_model.shard(node)
    logger.info(
        "Each of %d ranks holds its share of the base from here on%s.",
        len(node.members), "" if asked.shard is True else ": whole, a step would not fit",
    )  # fmt: skip
    return resolve()
