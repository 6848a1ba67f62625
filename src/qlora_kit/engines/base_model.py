"""A checkpoint as every engine opens it: looked through before a weight is read.

What is refused here is refused by all engines, in the same words.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.boundaries import describe_cause, is_out_of_memory, translate_errors
from qlora_kit.config import DtypeName, LoadConfig
from qlora_kit.device import choose_compute_dtype, get_device
from qlora_kit.engines.peft_model import keep_random_states
from qlora_kit.engines.quantization import (
    QuantizationName,
    check_bitsandbytes,
    read_stored_quantization,
)
from qlora_kit.engines.tokenizer import load_tokenizer
from qlora_kit.errors import ConfigError, EngineError, UnsupportedModelError
from qlora_kit.launches import once_a_machine
from qlora_kit.values import is_whole_number
from qlora_kit.weights.fingerprint import fingerprint_weights, stamp_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "OpenedCheckpoint",
    "explain_load_errors",
    "match_tensors",
    "open_checkpoint",
    "read_model_config",
    "refuse_missing_tensors",
]

logger = logging.getLogger(__name__)

#: No model has as many layers, or experts in a layer.
_MOST_MODULES = 10_000

#: Tables that models compute themselves, whatever a file has of them.
_COMPUTED: Final = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|attn\.bias|position_ids)$"
)
#: What bitsandbytes keeps beside packed weights.
_OF_QUANTIZATION: Final = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\S+|SCB|weight_format)$"
)
#: Parts of a model that have no say in its next token: pictures, sound, tokens further ahead.
_BESIDE_TEXT: Final = re.compile(
    r"(^|\.)(vision_\w+|visual|image_\w+|audio_\w+|multi_modal_projector|embed_vision|embed_audio"
    r"|mtp(_\w+)?)\."
)

# Where transformers reports which tensors it did not find.
_LOADING_LOG = "transformers.modeling_utils"


@dataclass(frozen=True)
class OpenedCheckpoint:
    """What is known of a checkpoint while its weights are still on disk.

    Attributes:
        folder: Where it lies.
        device: Where it goes.
        dtype: What it will compute in.
        stored: How its files are quantized already.
        quantization: How it will be quantized in memory.
        model_config: transformers' configuration of the model.
        tokenizer: Its tokenizer, with padding settled.
        fingerprint: Of its weights' content.
        stamps: What tells whether its files changed since they were read, by name.
    """

    folder: Path
    device: torch.device
    dtype: DtypeName
    stored: QuantizationName | None
    quantization: QuantizationName | None
    model_config: Any
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    stamps: Mapping[str, tuple[int, int]]


def open_checkpoint(config: LoadConfig) -> OpenedCheckpoint:
    """Look through the checkpoint in ``config.model_name``, a local folder, and its numbers.

    Raises:
        ConfigError: When the dtype is not one that models are computed in.
        MissingDependencyError: When bitsandbytes is needed and does not run.
        ModelNotFoundError: When there is no tokenizer.
        UnsupportedModelError: When the files are damaged or incomplete, hold tensors that the
            model has no place for or numbers that are none, are quantized by something
            other than bitsandbytes, or of a model that is no causal language model.
    """
    folder = Path(config.model_name)
    stamps = stamp_files(folder)
    device = get_device()
    dtype = choose_compute_dtype(config.dtype, device)
    stored = read_stored_quantization(folder)
    wanted: QuantizationName | None = (
        "nf4" if config.load_in_4bit else "int8" if config.load_in_8bit else None
    )
    if stored is not None and wanted != stored:
        logger.info("%s is already quantized to %s and stays so.", folder, stored)
    quantization = stored or wanted
    if quantization is not None:
        check_bitsandbytes(device, quantization)
    model_config = read_model_config(folder, config)
    _warn_beyond_positions(config.max_seq_length, model_config)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
    _check_tensors(
        folder,
        model_config,
        is_quantized=stored is not None,
        trust_remote_code=config.trust_remote_code,
    )
    fingerprint = once_a_machine(
        "the fingerprint of a base",
        (str(folder), stamps),
        lambda: fingerprint_weights(folder, is_quantized=stored is not None),
    )
    return OpenedCheckpoint(
        folder, device, dtype, stored, quantization, model_config, tokenizer, fingerprint, stamps
    )


#: What torch and transformers say where a device does not exist.
_ABOUT_DEVICES = (
    "device string", "nvalid device", "NVIDIA driver", "device_map as a string",
    "not compiled with CUDA",
)  # fmt: skip


@contextlib.contextmanager
def explain_load_errors(folder: Path) -> Iterator[None]:
    """Turn what transformers raises over a checkpoint into an error of ours."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise EngineError(
                f"There is not enough memory to load {folder}: {describe_cause(error)} Free some, "
                "or load in 4 bits."
            ) from error
        _refuse_device(error)
        said = str(error).strip().splitlines()[0]
        # Sizes that differ, quantized tensors that are incomplete.
        raise UnsupportedModelError(
            f"transformers cannot load {folder}: {said} Download the model again."
        ) from error
    except (ValueError, KeyError, OSError) as error:
        _refuse_device(error)
        raise UnsupportedModelError(
            f"transformers cannot load {folder} as a causal language model: {error}"
        ) from error
    except SafetensorError as error:
        raise UnsupportedModelError(
            f"A weight file in {folder} is damaged or cut short ({error}). Download it again."
        ) from error
    except (TypeError, AttributeError, IndexError, ArithmeticError, AssertionError) as error:
        # What config.json, generation_config.json or a shard index says, taken at its word.
        raise UnsupportedModelError(
            f"transformers cannot build the model in {folder} from its config.json, "
            f"generation_config.json and weight index: {describe_cause(error)} Compare them with "
            "the model's own, or download them again."
        ) from error


def _refuse_device(error: Exception) -> None:
    """Say of an error over a device that it is no fault of the checkpoint's."""
    said = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if any(words in said for words in _ABOUT_DEVICES):
        raise ConfigError(
            f"device_map names a device that there is not: {said.rstrip('.')}. Leave it out "
            "for the one best device.",
            parameter="device_map",
        ) from error


def refuse_missing_tensors(folder: Path, missing: Collection[str]) -> None:
    """Refuse a checkpoint that lacks tensors, which transformers would draw at random.

    Raises:
        UnsupportedModelError: When ``missing`` names any.
    """
    if missing:
        raise UnsupportedModelError(
            f"{folder} lacks {len(missing)} of the model's tensors, such as {min(missing)}. "
            "Download the model again."
        )


def match_tensors(
    folder: Path, model_config: Any, *, trust_remote_code: bool
) -> dict[str, Any] | None:
    """Let transformers match the files' tensors with the model's, without computing with them.

    Args:
        folder: A checkpoint.
        model_config: Its configuration.
        trust_remote_code: Run Python code that the checkpoint ships.

    Returns:
        ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``; ``None`` where tensors cannot
        be matched without their numbers.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    # Quantized tensors have other shapes, and cannot be unpacked without their numbers.
    plain = copy.deepcopy(model_config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    # Patched libraries draw numbers for it all the same.
    with explain_load_errors(folder), _without_reports(), keep_random_states():
        try:
            _, loading = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=plain,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
        except (ValueError, KeyError, OSError, SafetensorError):
            raise
        # Whatever else fails on tensors without numbers may well load.
        except Exception as error:  # noqa: BLE001
            logger.info("The tensors of %s were not checked first: %s", folder, error)
            return None
    return dict(loading)


def _check_tensors(
    folder: Path, model_config: Any, *, is_quantized: bool, trust_remote_code: bool
) -> None:
    """Refuse files whose tensors are not the model's.

    What is missing, or has another shape where weights are quantized while they are loaded,
    transformers would take as it comes, and not every engine's loading says so. A checkpoint
    that cannot be matched first is left for the engine to judge.
    """
    loading = match_tensors(folder, model_config, trust_remote_code=trust_remote_code)
    if loading is None:
        return
    refuse_missing_tensors(folder, loading["missing_keys"])
    _refuse_unexpected_tensors(folder, loading["unexpected_keys"], is_quantized=is_quantized)
    # Packed weights have a shape of their own.
    mismatched = [] if is_quantized else sorted(loading["mismatched_keys"])
    if mismatched:
        name, stored_shape, shape = mismatched[0]
        raise UnsupportedModelError(
            f"{len(mismatched)} tensors in {folder} do not have the shape that its config.json "
            f"implies, such as {name}: {tuple(stored_shape)}, not {tuple(shape)}. Download the "
            "model again."
        )


def _refuse_unexpected_tensors(
    folder: Path, unexpected: Collection[str], *, is_quantized: bool
) -> None:
    """Refuse tensors that the model of ``config.json`` has no place for: they would be dropped."""
    names = sorted(name for name in unexpected if not _COMPUTED.search(name))
    if is_quantized:
        names = [name for name in names if not _OF_QUANTIZATION.search(name)]
    beside = [name for name in names if _BESIDE_TEXT.search(name)]
    if beside:
        logger.warning(
            "%d tensors of %s are not of the text model and are left out, such as %s.",
            len(beside),
            folder,
            beside[0],
        )
    rest = [name for name in names if name not in beside]
    if rest:
        raise UnsupportedModelError(
            f"{folder} has {len(rest)} tensors that the model of its config.json has no place "
            f"for, such as {rest[0]}; without them it would be another model. Compare config.json "
            "(number of layers, architecture) with the model's own, or download both again."
        )


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Keep transformers' progress bar and its report of what it found from being shown."""
    from transformers.utils import logging as transformers_logging

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log = logging.getLogger(_LOADING_LOG)
    had_bars = transformers_logging.is_progress_bar_enabled()
    log.addFilter(is_no_report)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        log.removeFilter(is_no_report)
        if had_bars:
            transformers_logging.enable_progress_bar()


def read_model_config(folder: Path, config: LoadConfig) -> Any:
    """Transformers' configuration of the model in a folder.

    Raises:
        UnsupportedModelError: When transformers does not know the model, or the file is damaged.
    """
    from transformers import AutoConfig

    with translate_errors(
        lambda error: UnsupportedModelError(
            f"transformers does not know the model in {folder}, or its config.json is damaged: "
            f"{describe_cause(error)} Download config.json again."
        )
    ):
        model_config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=config.trust_remote_code
        )
    text_config = model_config.get_text_config()
    for name in ("num_hidden_layers", "num_experts", "num_local_experts"):
        count = getattr(text_config, name, None)
        # Each is a module: a million of them are built for an hour before anything is found.
        if count is not None and (not is_whole_number(count, at_least=0) or count > _MOST_MODULES):
            raise UnsupportedModelError(
                f"{folder / 'config.json'} is damaged: {name} is {count!r}. Download it again."
            )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and not is_whole_number(positions, at_least=1):
        raise UnsupportedModelError(
            f"{folder / 'config.json'} is damaged: max_position_embeddings is {positions!r}. "
            "Download it again."
        )
    return model_config


def _warn_beyond_positions(max_seq_length: int, model_config: Any) -> None:
    """Say so when sequences will be longer than the model was trained for.

    Training says it of its rows; that nobody gave a length is no reason to warn whoever exports.
    """
    text_config = model_config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions and max_seq_length > positions:
        is_default = max_seq_length == LoadConfig.max_seq_length
        logger.log(
            logging.INFO if is_default else logging.WARNING,
            "max_seq_length=%d is beyond the %d positions this model was trained for; "
            "answers past that point may be poor.",
            max_seq_length,
            positions,
        )
