"""Loading a base model: from a folder, a hub name, a saved adapter or a GGUF file.

This stage finds the files and checks what was asked for. The engine puts them into memory.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.artifacts.adapter_folder import find_base_of, is_adapter, read_adapter_config
from qlora_kit.artifacts.files import read_json_object
from qlora_kit.artifacts.provenance import (
    find_manifest,
    mention_changes,
    restore_adapter_config,
    restore_formatter,
)
from qlora_kit.boundaries import describe_cause, shown_cause
from qlora_kit.config import LoadConfig
from qlora_kit.engines.adapter_tokenizer import adopt_tokenizer, check_vocabulary
from qlora_kit.engines.contract import check_handle
from qlora_kit.engines.selection import resolve_engine
from qlora_kit.errors import (
    ConfigError,
    ModelNotFoundError,
    OfflineError,
    UnsupportedModelError,
    invalid_value,
)
from qlora_kit.handles import AdaptedModel, LoadedModel
from qlora_kit.import_noise import without_noise
from qlora_kit.messages import Call, Setting
from qlora_kit.modelscope import find_on_modelscope
from qlora_kit.paths import (
    describe_nearest,
    get_cache_folder,
    is_modelscope_name,
    looks_like_hub_name,
    suggest_existing,
)
from qlora_kit.script_arguments import LOADING_ARGUMENTS, refuse_unknown
from qlora_kit.values import is_whole_number

if TYPE_CHECKING:
    import torch

    from qlora_kit.engines.base import Engine

__all__ = ["load_quantized"]

logger = logging.getLogger(__name__)

_FILE_SUFFIXES = (".gguf",)
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
_HUB_PATTERNS = [
    "*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py",
]  # fmt: skip


def load_quantized(
    model_name: str | os.PathLike[str],
    max_seq_length: int = 2048,
    dtype: str | torch.dtype | None = None,
    load_in_4bit: bool | None = None,
    load_in_8bit: bool = False,
    *,
    local_files_only: bool = True,
    engine: str | Engine = "auto",
    is_trainable: bool = True,
    token: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    base: str | os.PathLike[str] | None = None,
    shard: bool | Literal["auto"] = "auto",
    **classic: Any,
) -> LoadedModel:
    """Load a language model for QLoRA: in 4 bits, from disk, without touching the network.

    Args:
        model_name: A folder with a checkpoint; a folder with a saved LoRA adapter (its base is
            found and the adapter comes back attached); a ``.gguf`` file (dequantized once into a
            cached checkpoint); or a hub name such as ``"Qwen/Qwen3-4B"``, or ModelScope's
            ``"modelscope:Qwen/Qwen3-4B"``.
        max_seq_length: Longest sequence, in tokens, for training and generation.
        dtype: ``None`` for bfloat16 where the hardware has it, else float16 on a GPU and float32
            on a CPU; or ``"bfloat16"``, ``"float16"``, ``"float32"``, or the torch dtype.
        load_in_4bit: NF4 with double quantization through bitsandbytes. True unless
            ``load_in_8bit`` is; ``False`` keeps 16-bit weights and needs no bitsandbytes.
        load_in_8bit: bitsandbytes' LLM.int8() instead.
        local_files_only: Never touch the network; a hub name is looked up in the local cache.
            ``False`` downloads what is missing.
        engine: ``"native"``, ``"unsloth"``, an engine of your own, or ``"auto"``: native where it
            computes the architecture's training steps itself and where unsloth is missing or has
            no GPU, else unsloth.
        is_trainable: For a saved adapter: whether it trains on, or only answers.
        token: Hub token for private models.
        revision: Hub branch, tag or commit.
        cache_dir: Hub cache, and where dequantized GGUF files are kept.
        device_map: As in transformers; by default everything on the one best device.
        trust_remote_code: Run Python code that the checkpoint ships.
        base: For a saved adapter: the base to put it on, instead of the one it names; a folder, a
            ``.gguf`` file or a hub name.
        shard: Whether each process of a machine loads its share of the layers only, for training
            with ``plan={"shard": True}``; ``"auto"`` where all of them do not fit its card.
        **classic: Further arguments of the classic script, where they ask for what happens anyway.

    Returns:
        A handle that unpacks as ``model, tokenizer = load_quantized(...)``. An
        :class:`~qlora_kit.handles.AdaptedModel` when an adapter was loaded. An export of this
        library or a checkpoint of a run has its formatter in ``record.formatter``.

    Raises:
        ConfigError: When an argument cannot work; ``UnknownOptionError`` for unknown arguments,
            with the nearest name.
        ModelNotFoundError: When there is no model there; names the nearest existing paths.
        OfflineError: When a hub name is not in the local cache and ``local_files_only`` holds.
        MissingDependencyError: When bitsandbytes, gguf or unsloth is needed and does not run.
        UnsupportedModelError: When the files are of a kind that would load wrongly.
    """
    refuse_unknown(load_quantized, classic, LOADING_ARGUMENTS)
    if load_in_4bit is None:
        load_in_4bit = not load_in_8bit
    if not isinstance(model_name, str | os.PathLike):
        raise ConfigError(
            f"model_name must be a folder, a .gguf file or a hub name; got {model_name!r}."
        )
    if base is not None and not isinstance(base, str | os.PathLike):
        raise invalid_value(
            "base", "must be a folder, a .gguf file or a hub name", base, "load_quantized"
        )
    name = os.fspath(model_name)
    config = LoadConfig(
        model_name=name,
        max_seq_length=max_seq_length,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        local_files_only=local_files_only,
        token=token,
        revision=revision,
        cache_dir=os.fspath(cache_dir) if isinstance(cache_dir, os.PathLike) else cache_dir,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        is_trainable=is_trainable,
        shard=shard,
    )
    # The libraries are imported on the way.
    with without_noise():
        return _load(name, config, engine, base)


def _load(
    name: str, config: LoadConfig, engine: str | Engine, base: str | os.PathLike[str] | None
) -> LoadedModel:
    path = _find(name, config)
    # An engine that was named is made first: unsloth patches what is imported after it.
    chosen = engine if engine == "auto" else resolve_engine(engine)
    if is_adapter(path):
        return _load_adapter(path, config, chosen, base)
    if base is not None:
        raise ConfigError(
            f"{path} is a model of its own, and ",
            Setting("base", os.fspath(base), "load_quantized"),
            " is for a saved adapter's folder.",
            parameter="base",
            value=base,
        )
    loaded = _load_base(path, config, chosen)
    _mention_tokens_without_rows(loaded)
    return restore_formatter(loaded, find_manifest(path))


def _load_base(path: Path, config: LoadConfig, engine: str | Engine) -> LoadedModel:
    is_gguf = path.is_file()
    if is_gguf:
        from qlora_kit.engines.gguf.cached_checkpoint import dequantize_gguf

        folder = dequantize_gguf(path, get_cache_folder(config.cache_dir) / "gguf")
    else:
        folder = path
        _check_checkpoint(folder)
    # Absolute for what is on disk, so that exports and adapters find it from any folder.
    folder = folder.absolute()
    if isinstance(engine, str):
        engine = resolve_engine(engine, folder)
    loaded = check_handle(
        engine,
        "load",
        engine.load(dataclasses.replace(config, model_name=str(folder))),
        LoadedModel,
    )
    base = dataclasses.replace(
        loaded.base,
        name_or_path=str(path.absolute()) if _exists(config.model_name) else config.model_name,
        source="gguf" if is_gguf else "checkpoint",
    )
    return dataclasses.replace(loaded, base=base, config=config)


def _mention_tokens_without_rows(loaded: LoadedModel) -> None:
    """Say which tokens the tokenizer knows and the model has no embedding for."""
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    beyond = sorted((i, name) for name, i in loaded.tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        index, name = beyond[0]
        logger.warning(
            "The tokenizer knows %d tokens that the model has no embedding for, such as %r "
            "(id %d; the model has %d rows). Rows and prompts with such a token are refused; "
            "model.resize_token_embeddings(%d) of transformers, saved with the tokenizer, makes "
            "room for them.",
            len(beyond), name, index, rows, len(loaded.tokenizer),
        )  # fmt: skip


def _load_adapter(
    path: Path, config: LoadConfig, engine: str | Engine, base: str | os.PathLike[str] | None
) -> AdaptedModel:
    saved = read_adapter_config(path)
    manifest = find_manifest(path)
    # The revision asked for is the adapter's, where that has any; peft keeps the base's with it.
    revision = config.revision if _exists(config.model_name) else None
    if base is None:
        base_name = find_base_of(path, saved, manifest)
        revision = revision or saved.get("revision")
    else:
        base_name = os.fspath(base)
    logger.info("%s is an adapter; its base is %s.", path, base_name)
    base_config = dataclasses.replace(config, model_name=base_name, revision=revision)
    base_path = _find(base_name, base_config)
    if is_adapter(base_path):
        raise UnsupportedModelError(
            f"The base of the adapter {path} is {base_name}, which is an adapter itself.",
            advice=(
                "Merge that one first, with ",
                Call("export_model", "export_model(model, 'merged_16bit', path)", "merged_16bit"),
                ", or name a model with ",
                Setting("base", ..., "load_quantized"),
                ".",
            ),
        )
    plain = _load_base(base_path, base_config, engine)
    mention_changes(path, plain.base, manifest)
    loaded = adopt_tokenizer(plain, path)
    adapted = check_handle(
        loaded.engine,
        "attach_saved",
        loaded.engine.attach_saved(loaded, path, is_trainable=config.is_trainable),
        AdaptedModel,
    )
    adapted.record.adapter_path = path.absolute()
    check_vocabulary(adapted, plain.tokenizer, path)
    _mention_tokens_without_rows(adapted)
    return restore_formatter(restore_adapter_config(adapted, manifest), manifest)


def _find(name: str, config: LoadConfig) -> Path:
    """The local file or folder behind a name, downloading only if that was allowed."""
    if not name.strip():
        raise ConfigError("model_name is empty; give a folder, a .gguf file or a hub name.")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ModelNotFoundError(
            f"{name} names the home of a user that does not exist here. Give the whole path."
        ) from error
    if _exists(path) and not path.is_dir() and not path.is_file():
        raise ModelNotFoundError(f"{path} is a device, and no model. Give a folder or a file.")
    if _exists(path):
        if path.is_file() and path.suffix != ".gguf":
            raise ModelNotFoundError(
                f"{path} is a file. Give the folder it is in, or a .gguf file."
            )
        return path
    if is_modelscope_name(name):
        return find_on_modelscope(
            name,
            "model",
            local_files_only=config.local_files_only,
            revision=config.revision,
            cache_dir=config.cache_dir,
            token=config.token,
            allow_patterns=_HUB_PATTERNS,
        )
    if not looks_like_hub_name(name, _FILE_SUFFIXES):
        raise ModelNotFoundError(f"There is nothing at {path}.{describe_nearest(path)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=config.revision,
                cache_dir=config.cache_dir,
                token=config.token,
                local_files_only=config.local_files_only,
                allow_patterns=_HUB_PATTERNS,
            )
        )
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as error:
        if config.local_files_only:
            raise OfflineError(
                f"There is no folder {name!r}, and no model of that name in the local hub "
                f"cache.{suggest_existing(path)}",
                advice=(
                    "Download the model first, or allow that here with ",
                    Setting("local_files_only", False, "load_quantized"),
                    ".",
                ),
            ) from error
        raise ModelNotFoundError(
            f"{name!r} could not be downloaded: {describe_cause(error)}"
        ) from shown_cause(error)


def _check_checkpoint(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        inside = sorted(entry.name for entry in folder.iterdir())
        models = [
            name
            for name in inside
            if name.endswith(".gguf")
            or (folder / name / "config.json").is_file()
            or is_adapter(folder / name)
        ]
        hint = (
            f" It holds {', '.join(models[:8])}; give the path of {'one' if models[1:] else 'that'}"
            " instead."
            if models
            else f" It holds: {', '.join(inside[:8]) or 'nothing'}."
        )
        raise ModelNotFoundError(f"{folder} is not a model: it has no config.json.{hint}")
    read_json_object(folder / "config.json")
    _check_generation_config(folder / "generation_config.json")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        raise ModelNotFoundError(
            f"{folder} has a config.json but no *.safetensors weights. Download the model's "
            "safetensors files into it."
        )
    for index in folder.glob("*.safetensors.index.json"):
        places = read_json_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
            raise UnsupportedModelError(
                f"{index} is damaged: its weight_map does not name a file for each tensor. "
                "Download it again."
            )
        shards = set(places.values())
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise ModelNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(shards)} weight files that "
                f"{index.name} lists, such as {missing[0]}. Download them into it."
            )


def _check_generation_config(path: Path) -> None:
    """Refuse one that cannot be read: transformers would go on without its stop tokens."""
    if not path.is_file():
        return
    stated = read_json_object(path).get("eos_token_id")
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(is_whole_number(one) for one in ids):
        raise UnsupportedModelError(
            f"{path} is damaged: its eos_token_id is {stated!r}. Download it again."
        )


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).expanduser().exists()
    # A name that no file system can hold: too long, or with a zero byte.
    except (OSError, ValueError, RuntimeError):
        return False
