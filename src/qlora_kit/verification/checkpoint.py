"""Verdicts on exports: a merged checkpoint, and an adapter, against the live model.

Cheap comparisons always run. Reloading the export beside the live model costs its size in
memory, so by default it is done for small models only and always with ``verify="full"``.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from qlora_kit.device import measure_free_bytes, to_torch_dtype
from qlora_kit.engines.peft_model import keep_weights_unpacked
from qlora_kit.engines.quantization import set_compute_dtype
from qlora_kit.handles import LoadedModel
from qlora_kit.messages import Setting
from qlora_kit.results import Check, Verification
from qlora_kit.verification.checks import (
    check_config,
    check_generation_config,
    check_stops,
    check_tokenizer,
    make_probes,
    measure_logits_distance,
    read_logits,
)
from qlora_kit.verification.levels import compare_by_level
from qlora_kit.verification.merged_tensors import check_architecture, compare_merged_tensors
from qlora_kit.verification.nf4_tensors import compare_quantized_tensors
from qlora_kit.verification.original import attach_live_adapters, check_against_original
from qlora_kit.weights.adapter import AdapterTensors
from qlora_kit.weights.live import get_hf_model
from qlora_kit.weights.merged import MergedWeights
from qlora_kit.weights.nf4 import Nf4Weights
from qlora_kit.weights.source import SafetensorsSource

if TYPE_CHECKING:
    import torch

__all__ = [
    "load_exported",
    "verify_adapter",
    "verify_merged",
    "verify_quantized",
]

logger = logging.getLogger(__name__)

#: Weights up to this size are reloaded by default, if memory is plentiful: a float32 copy of a
#: 16-bit checkpoint takes twice its size, and loading it a little more for a while.
_CHEAP_BYTES: Final = 1024**3
_MEMORY_SHARE: Final = 0.15

#: Limits on the mean KL divergence, in nats per token. Rounding weights to 16 bits stays below
#: the first; where the live model itself computes in bfloat16, a small trained one was seen to
#: differ from its exact merge by 0.016 (SmolLM2-135M), and from its base alone by 0.32.
#: Quantizing again costs what it costs, which is measured and reported (0.6 nats for that model,
#: less for larger ones); the tensors prove such an export, and the third limit only that it is no
#: other model.
KL_LIMIT_SAME_BASE: Final = 0.01
_KL_LIMIT_BFLOAT16: Final = 0.05
KL_LIMIT_4BIT: Final = 2.0
#: Beyond this a merge into the original weights is worth a warning.
_NOTABLE_KL: Final = 0.1
_KL_LIMIT_ADAPTER: Final = 1e-3

# Longer than any probe; a model that is only compared needs no more.
_RELOAD_LENGTH: Final = 128


def verify_merged(
    model: LoadedModel, folder: Path, merged: MergedWeights, verify: bool | Literal["full"]
) -> Verification:
    """Compare a merged checkpoint with the live model.

    Args:
        model: The live model.
        folder: What was written.
        merged: The same merge, for computing tensors again.
        verify: ``True`` or ``"full"``.
    """
    is_original = merged.base == "original" and model.base.quantization is not None
    return _verify_checkpoint(
        model,
        folder,
        lambda files, whole: compare_merged_tensors(files, merged, whole=whole),
        lambda: check_config(model, folder, merged.config_updates()),
        lambda: (
            _compare_with_original(model, folder)
            if is_original
            else _compare_reloaded(
                model,
                folder,
                _KL_LIMIT_BFLOAT16
                if model.base.compute_dtype == "bfloat16"
                else KL_LIMIT_SAME_BASE,
            )
        ),
        verify,
        lambda size: _is_cheap(size, model),
    )


def verify_quantized(
    model: LoadedModel,
    folder: Path,
    quantized: Nf4Weights,
    config: Any,
    verify: bool | Literal["full"],
) -> Verification:
    """Compare a merged 4-bit checkpoint with the live model.

    Args:
        model: The live model.
        folder: What was written.
        quantized: The same tensors, for computing them again.
        config: The configuration it should have, with its quantization.
        verify: ``True`` or ``"full"``.

    Returns:
        The checks, and the mean KL divergence from the live model among the facts.
    """
    verification = _verify_checkpoint(
        model,
        folder,
        lambda files, whole: compare_quantized_tensors(files, quantized, whole=whole),
        lambda: check_config(
            model, folder, quantized.merged.config_updates(), config.quantization_config
        ),
        lambda: _compare_reloaded(model, folder, KL_LIMIT_4BIT),
        verify,
        # A quarter of the model in size, and the user is told what quantizing again cost.
        lambda size: size <= measure_free_bytes(_device_of(get_hf_model(model.model))) / 2,
    )
    if not any(check.name == "logits" for check in verification.checks):
        note = "not measured: too little memory for a second model; verify='full' does it"
        return dataclasses.replace(verification, facts={"kl": None, "kl_note": note})
    return verification


def _verify_checkpoint(
    model: LoadedModel,
    folder: Path,
    compare: Callable[[SafetensorsSource, bool], list[Check]],
    check_configuration: Callable[[], Check],
    reload_and_compare: Callable[[], tuple[list[Check], dict[str, Any]]],
    verify: bool | Literal["full"],
    may_reload: Callable[[int], bool],
) -> Verification:
    def compare_files() -> list[Check]:
        with SafetensorsSource(folder) as files:
            checks = compare(files, verify == "full")
        if all(check.passed for check in checks):
            trusts = model.config.trust_remote_code
            lacking = check_architecture(folder, trust_remote_code=trusts)
            checks = checks if lacking is None else [lacking]
        return [
            *checks,
            check_configuration(),
            check_generation_config(model, folder),
            check_tokenizer(model, folder),
        ]

    return compare_by_level(
        verify,
        compare_files,
        reload_and_compare,
        is_cheap=lambda: may_reload(_count_bytes(folder)),
    )


def _count_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _compare_reloaded(
    model: LoadedModel, folder: Path, kl_limit: float
) -> tuple[list[Check], dict[str, Any]]:
    exported = load_exported(model, folder)
    distance = measure_logits_distance(model, exported, make_probes(model))
    return [distance.as_check(kl_limit), check_stops(model, exported)], distance.as_facts()


def _compare_with_original(model: LoadedModel, folder: Path) -> tuple[list[Check], dict[str, Any]]:
    """Hold a merge into the original against the original with the live adapter on it.

    Merging into the original gives back what quantization took: how much that changes is
    measured. In float32, so that only the rounding of the merged weights is left.
    """
    probes = make_probes(model)
    # One after the other: each takes twice the space of its files.
    original = load_exported(model, model.base.path, dtype="float32")
    expected = read_logits(attach_live_adapters(model, original), probes)
    del original
    exported = load_exported(model, folder, dtype="float32")
    check, facts = check_against_original(
        model, exported, expected, probes, limit=KL_LIMIT_SAME_BASE
    )
    if facts["kl"] > _NOTABLE_KL:
        logger.warning(
            "Merged into the original weights, this export answers differently from the model in "
            "memory (mean KL %.2f nats per token), which was trained on %s ones. "
            "%s reproduces the model in memory.",
            facts["kl"], model.base.quantization, Setting("base", "dequantized", "export_model"),
        )  # fmt: skip
    return [check, check_stops(model, exported)], facts


def verify_adapter(
    model: LoadedModel, folder: Path, tensors: AdapterTensors, verify: bool | Literal["full"]
) -> Verification:
    """Compare an adapter folder with the live adapter.

    Args:
        model: The live model.
        folder: What was written.
        tensors: The live adapter's tensors.
        verify: ``True`` or ``"full"``.
    """

    def compare_files() -> list[Check]:
        return [
            _compare_adapter_tensors(folder, tensors),
            _check_adapter_config(folder, tensors),
            check_generation_config(model, folder),
            check_tokenizer(model, folder),
        ]

    return compare_by_level(
        verify,
        compare_files,
        lambda: (_compare_reloaded_adapter(model, folder, tensors), {}),
        is_cheap=lambda: _is_cheap(_count_bytes(model.base.path), model),
    )


def _compare_reloaded_adapter(
    model: LoadedModel, folder: Path, tensors: AdapterTensors
) -> list[Check]:
    config = dataclasses.replace(
        model.config,
        model_name=str(model.base.path),
        max_seq_length=_RELOAD_LENGTH,
        # Only the main rank reads it again.
        shard=False,
    )
    with _quiet_loading():
        loaded = model.engine.load(config)
        again = model.engine.attach_saved(loaded, folder, is_trainable=False)
    with again.engine.inference(again) as exported:
        distance = measure_logits_distance(model, exported, make_probes(model))
    return [distance.as_check(KL_LIMIT_SAME_BASE if tensors.is_converted else _KL_LIMIT_ADAPTER)]


def load_exported(model: LoadedModel, folder: Path, *, dtype: str | None = None) -> Any:
    """A checkpoint through plain transformers, on the live model's device and in its dtype.

    Args:
        model: The live model.
        folder: The checkpoint.
        dtype: Another dtype to compute in.
    """
    from transformers import AutoModelForCausalLM

    live = get_hf_model(model.model)
    compute_dtype = to_torch_dtype(dtype or model.base.compute_dtype)
    with _quiet_loading():
        exported = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=compute_dtype,
            device_map={"": _device_of(live)},
            attn_implementation=live.config._attn_implementation,
            local_files_only=True,
            trust_remote_code=model.config.trust_remote_code,
        )
    if getattr(exported, "is_loaded_in_4bit", False):
        keep_weights_unpacked(exported)
    if getattr(exported, "is_quantized", False):
        set_compute_dtype(exported, compute_dtype)
    return exported.eval()


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars for a model that is loaded only to be looked at."""
    from transformers.utils import logging as hf_logging

    was_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            hf_logging.enable_progress_bar()


def _compare_adapter_tensors(folder: Path, tensors: AdapterTensors) -> Check:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        written = load_file(str(folder / "adapter_model.safetensors"))
    except (SafetensorError, OSError) as error:
        return Check("adapter tensors", False, f"the file cannot be read: {error}")
    missing = sorted(set(tensors.names()) - set(written))
    extra = sorted(set(written) - set(tensors.names()))
    if missing or extra:
        return Check(
            "adapter tensors",
            False,
            f"{len(missing)} missing and {len(extra)} unexpected, for example "
            f"{(missing + extra)[0]}",
        )
    wrong = [name for name in tensors.names() if not torch.equal(written[name], tensors.load(name))]
    if wrong:
        return Check("adapter tensors", False, f"{len(wrong)} differ, for example {wrong[0]}")
    return Check("adapter tensors", True, f"all {len(written)} equal bit for bit")


def _check_adapter_config(folder: Path, tensors: AdapterTensors) -> Check:
    from peft import PeftConfig

    with warnings.catch_warnings():
        # It stands there for the next merge; peft needs it for a fresh start only.
        warnings.filterwarnings("ignore", message="`loftq_config` specified")
        written = PeftConfig.from_pretrained(str(folder))
    expected = {**tensors.config.to_dict(), **tensors.config_updates()}
    names = (
        "r",
        "lora_alpha",
        "target_modules",
        "target_parameters",
        "use_rslora",
        "use_dora",
        "bias",
        "modules_to_save",
    )
    wrong = [
        name for name in names if _comparable(getattr(written, name)) != _comparable(expected[name])
    ]
    return Check(
        "adapter configuration",
        not wrong,
        f"{', '.join(wrong)} differ" if wrong else "rank, alpha, targets and variants as trained",
    )


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | set | tuple) else value


def _is_cheap(size: int, model: LoadedModel) -> bool:
    cheap = (
        size <= _CHEAP_BYTES
        and size <= measure_free_bytes(_device_of(get_hf_model(model.model))) * _MEMORY_SHARE
    )
    if not cheap:
        logger.info(
            "Not reloading %.1f GiB to compare logits; %s does.",
            size / 1024**3, Setting("verify", "full", "export_model"),
        )  # fmt: skip
    return cheap


def _device_of(model: Any) -> torch.device:
    device: torch.device = next(p.device for p in model.parameters())
    return device
