"""An adapter that changes nothing: an export of it is right, and hardly what was meant."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Final

from qlora_kit.handles import AdaptedModel, LoadedModel
from qlora_kit.results import Check, Verification

__all__ = ["is_idle", "mention_idle_adapter"]

logger = logging.getLogger(__name__)

_NAME: Final = "adapter"
_SAID: Final = (
    "the adapter changes nothing: each of its updates is zero, as before training, so this export "
    "answers as the base does"
)


def mention_idle_adapter(model: LoadedModel, verification: Verification) -> Verification:
    """The verification, with a word about an adapter that changes nothing.

    Args:
        model: The live model.
        verification: What comparing the export with it found.
    """
    known = any(check.name == _NAME for check in verification.checks)
    if known or not isinstance(model, AdaptedModel) or not is_idle(model.model):
        return verification
    logger.warning("In this export %s.", _SAID)
    checks = (*verification.checks, Check(_NAME, True, _SAID))
    return dataclasses.replace(verification, checks=checks)


def is_idle(model: Any) -> bool:
    """Whether the active adapters leave every weight of the base as it is.

    Args:
        model: A ``PeftModel``. What cannot be told cheaply counts as a change: DoRA's magnitudes,
            biases that were trained.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    active = list(getattr(model, "active_adapters", []))
    configs = [model.peft_config[name] for name in active]
    if not active or any(config.bias != "none" or config.use_dora for config in configs):
        return False
    for module in model.modules():
        if isinstance(module, LoraLayer) and any(_updates(module, name) for name in active):
            return False
        if isinstance(module, ModulesToSaveWrapper) and any(
            _differs(module.modules_to_save[name], module.original_module)
            for name in active
            if name in module.modules_to_save
        ):
            return False
        if isinstance(module, TrainableTokensWrapper) and any(
            _replaces_rows(module.token_adapter, name) for name in active
        ):
            return False
    return True


def _updates(layer: Any, adapter: str) -> bool:
    if adapter in layer.lora_embedding_A:
        factors = (layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter])
    elif adapter in layer.lora_A:
        factors = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
    else:
        return False
    bias = getattr(layer.lora_B[adapter], "bias", None) if adapter in layer.lora_B else None
    return all(bool(factor.any()) for factor in factors) or (bias is not None and bool(bias.any()))


def _differs(module: Any, original: Any) -> bool:
    before = dict(original.named_parameters())
    return any(
        name not in before or not bool((parameter == before[name].to(parameter)).all())
        for name, parameter in module.named_parameters()
    )


def _replaces_rows(layer: Any, adapter: str) -> bool:
    if adapter not in layer.trainable_tokens_delta:
        return False
    rows = layer.trainable_tokens_delta[adapter]
    return not bool((rows == layer.trainable_tokens_original[adapter].to(rows)).all())
