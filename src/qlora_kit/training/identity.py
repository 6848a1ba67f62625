"""What makes a run the run that it is: its rows, its base, its adapter and its settings.

Each checkpoint carries it, and a run goes on from a checkpoint only where it is the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qlora_kit.handles import AdaptedModel
from qlora_kit.manifest import to_jsonable

__all__ = ["RunIdentity", "identify_run", "make_run_id", "read_identity"]

#: Settings that change where and how often something is written, how a step is computed or how
#: long a run is, and not what is learned from a row.
_FREE: Final = re.compile(
    r"(logging|log|save|eval|hub|report|include|batch_eval|dataloader|ddp|torch_compile|trackio"
    r"|bf16|fp16|tf32|gradient_checkpointing|activation_checkpointing|per_device|liger|use_liger)(_.*)?"
    r"|train_batch_size|output_dir|run_name|project|disable_tqdm|max_steps|num_train_epochs"
    r"|resume_from_checkpoint|gradient_accumulation_steps|use_cpu|use_cache|do_\w+|push_to_hub|prediction_loss_only"
    r"|load_best_model_at_end|metric_for_best_model|greater_is_better|skip_memory_metrics|debug"
    r"|torch_empty_cache_steps|auto_find_batch_size|local_rank|enable_jit_checkpoint"
    r"|restore_callback_states_from_checkpoint|activation_offloading|dataset_\w+|max_length"
    r"|ignore_data_skip|label_names"
)

#: Bytes of a weight file that are read to tell it from another one, at each of so many places.
_SAMPLE_BYTES: Final = 65536
_SAMPLES: Final = 16

_ROWS_AT_ONCE: Final = 4096


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What a run and its continuation have in common.

    Attributes:
        data: Fingerprint of the token ids and labels, in their order.
        template: The formatter's fingerprint, or ``None``.
        base: Fingerprint of the base model's files, or ``None`` where they cannot be read.
        quantization: How the base is quantized.
        adapter: The adapter's shape, scale and dropout.
        arguments: The trainer's settings that change what is learned.
    """

    data: str | None
    template: str | None
    base: str | None
    quantization: str | None
    adapter: Mapping[str, Any]
    arguments: Mapping[str, Any]

    def find_differences(self, asked: RunIdentity) -> list[str]:
        """What is different in the run that is asked for, one phrase each."""
        found = [
            f"other {what}"
            for what, mine, other in (
                ("rows", self.data, asked.data),
                ("template", self.template, asked.template),
                ("base model", self.base, asked.base),
            )
            if mine is not None and other is not None and mine != other
        ]
        if self.quantization != asked.quantization:
            found.append(f"quantization {self.quantization} -> {asked.quantization}")
        for mine, other in ((self.adapter, asked.adapter), (self.arguments, asked.arguments)):
            # A setting that only one version of the libraries has is no difference.
            found += [
                f"{name} {mine[name]!r} -> {other[name]!r}"
                for name in other
                if name in mine and mine[name] != other[name]
            ]
        return found


def make_run_id() -> str:
    """A name for a new run."""
    return uuid.uuid4().hex[:12]


def identify_run(model: AdaptedModel, dataset: Any, formatter: Any, args: Any) -> RunIdentity:
    """The identity of a run that is about to begin.

    Args:
        model: What is trained.
        dataset: The rows as the trainer gets them.
        formatter: What made them, or ``None``.
        args: The complete ``SFTConfig``.
    """
    settings = {
        name: value for name, value in args.to_sanitized_dict().items() if not _FREE.fullmatch(name)
    }
    settings["rows_per_step"] = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    return RunIdentity(
        data=_fingerprint_rows(dataset),
        template=getattr(formatter, "fingerprint", None),
        base=_fingerprint_base(model.base.path),
        quantization=model.base.quantization,
        adapter=_describe_adapter(model),
        arguments=_normalize(settings),
    )


def read_identity(content: object) -> RunIdentity | None:
    """The identity in a checkpoint's manifest, or ``None`` where it has none."""
    if not isinstance(content, Mapping):
        return None
    fields: dict[str, Any] = {
        field.name: content.get(field.name) for field in dataclasses.fields(RunIdentity)
    }
    if not isinstance(fields["adapter"], Mapping) or not isinstance(fields["arguments"], Mapping):
        return None
    return RunIdentity(**fields)


def _describe_adapter(model: AdaptedModel) -> dict[str, Any]:
    config = model.model.peft_config["default"]
    names = (
        "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "use_dora",
        "modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern",
        "target_parameters",
    )  # fmt: skip
    described: dict[str, Any] = _normalize(
        {name: getattr(config, name, None) or None for name in names}
    )
    return described


def _normalize(value: Any) -> Any:
    """As it will be read back from JSON; what has no order in the order of its spelling."""
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, Mapping):
        return {str(name): _normalize(item) for name, item in value.items()}
    return json.loads(json.dumps(to_jsonable(value)))


def _fingerprint_rows(dataset: Any) -> str | None:
    """A hash over every row's token ids and labels; ``None`` for rows that cannot be read so."""
    names = [
        name
        for name in ("input_ids", "labels", "seq_lengths")
        if name in (getattr(dataset, "column_names", None) or ())
    ]
    if not names:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.with_format("arrow").iter(_ROWS_AT_ONCE):
        for name in names:
            for part in _read_lists(batch[name]):
                digest.update(part)
    return digest.hexdigest()


def _read_lists(column: Any) -> Iterator[bytes]:
    """An Arrow column of lists as bytes: how long each is, and what is in all of them."""
    import numpy as np
    import pyarrow.compute as pc

    yield np.asarray(pc.list_value_length(column), dtype=np.int64).tobytes()
    values = pc.list_flatten(column)
    # Whether numbers are stored in 32 or in 64 bits is no difference.
    yield np.asarray(values, dtype=np.int64).tobytes()


def _fingerprint_base(folder: Path) -> str | None:
    """A hash over the configuration, and over names, sizes and samples of the weight files."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update((folder / "config.json").read_bytes())
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                for number in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    # A base that was moved away since it was loaded.
    except OSError:
        return None
    return digest.hexdigest()
