"""What a merge into the original weights should compute: that base, with the live adapter.

The live model answers through its 4-bit weights, so it says how far a merge into the 16-bit
original moved away, and not whether the merge is right.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.handles import LoadedModel
from qlora_kit.results import Check
from qlora_kit.verification.checks import LogitsDistance, measure_logits_distance, read_logits
from qlora_kit.weights.adapter import read_adapter_state
from qlora_kit.weights.live import get_hf_model

if TYPE_CHECKING:
    import torch

__all__ = ["attach_live_adapters", "check_against_original"]


def check_against_original(
    model: LoadedModel,
    exported: Any,
    expected: Sequence[torch.Tensor],
    probes: Sequence[Sequence[int]],
    *,
    limit: float,
) -> tuple[Check, dict[str, Any]]:
    """Whether a merge into the original computes what the original with the adapter computes.

    How far both are from the quantized live model is measured as well, and not judged.

    Args:
        model: The live model.
        exported: The merge, loaded. In float32, only the rounding of its weights is left.
        expected: Logits of the probes from the base in ``model.base.path`` with the live adapters
            on it, loaded likewise; see :func:`attach_live_adapters`.
        probes: Token ids to run.
        limit: Most mean KL divergence, in nats per token.

    Returns:
        The check, and how far the export is from the live model, as facts.
    """
    written = read_logits(exported, probes)
    check = LogitsDistance(expected, written).as_check(limit)
    moved = measure_logits_distance(model, exported, probes)
    detail = (
        f"{check.detail.replace('live', 'original with the adapter')}. "
        f"From the {model.base.quantization} model: {moved.mean_kl:.2e} nats, same most likely "
        f"token at {moved.agreement:.1%} of positions"
    )
    return dataclasses.replace(check, detail=detail), moved.as_facts()


def attach_live_adapters(model: LoadedModel, original: Any) -> Any:
    """Put copies of the live model's active adapters on its unquantized base.

    Args:
        model: The live model.
        original: Its base from ``model.base.path``, unquantized. Changed in place.

    Returns:
        The base with every active adapter, in eval mode; the base itself if there is none.
    """
    from peft import PeftModel, set_peft_model_state_dict

    live = model.model
    if not isinstance(live, PeftModel):
        return original
    rows = get_hf_model(live).get_input_embeddings().weight.shape[0]
    if original.get_input_embeddings().weight.shape[0] != rows:
        # The adapter brings what they hold.
        original.resize_token_embeddings(rows, mean_resizing=False)
    names = list(live.active_adapters)
    reference: Any = None
    for name in names:
        config = copy.deepcopy(live.peft_config[name])
        # Its weights come from the live one; some starts would change the base.
        config.init_lora_weights = True
        config.inference_mode = True
        if reference is None:
            reference = PeftModel(original, config, adapter_name=name)
        else:
            reference.add_adapter(name, config)
        weights = {key: value.cpu() for key, value in read_adapter_state(model, name).items()}
        set_peft_model_state_dict(reference, weights, adapter_name=name)
    reference.base_model.set_adapter(names)
    return reference.eval()
