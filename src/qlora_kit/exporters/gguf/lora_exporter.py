"""``gguf-lora``: the adapter alone, for llama.cpp's ``--lora`` beside a base in GGUF."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from qlora_kit.artifacts.adapter_folder import has_own_tokenizer
from qlora_kit.errors import ConfigError, ExportError, invalid_value
from qlora_kit.exporters.gguf.adapter_factors import (
    MERGE_INSTEAD,
    collect_factors,
    find_configuration,
    list_invocation_tokens,
)
from qlora_kit.exporters.gguf.conversion.file_plan import pad
from qlora_kit.exporters.gguf.conversion.file_writer import convert
from qlora_kit.exporters.gguf.conversion.origin import (
    Origin,
    describe_size,
    read_origin,
    write_origin,
)
from qlora_kit.exporters.gguf.families.table import Family, read_family
from qlora_kit.exporters.gguf.model_exporter import choose_name
from qlora_kit.exporters.gguf.quantization.ggml import check_encoder, find_missing_encoder
from qlora_kit.exporters.gguf.quantization.recipes import ALIASES, RECIPES
from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile
from qlora_kit.exporters.gguf.verification.llama_run import check_runner
from qlora_kit.exporters.gguf.verification.run_checks import check_run
from qlora_kit.handles import LoadedModel
from qlora_kit.hookspecs import ExportEstimate, ExportRequest
from qlora_kit.messages import Setting
from qlora_kit.private_folders import scratch_folder
from qlora_kit.results import Check, Verification
from qlora_kit.verification.levels import compare_by_level
from qlora_kit.weights.source import SafetensorsSource

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["GgufLoraExporter", "GgufLoraOptions"]

_BASES_TOKENIZER: Final = (
    "llama.cpp takes tokenizer, chat template and end token from the base's file, and this adapter "
    "was trained with its own: ask with its template and stop at its end token. " + MERGE_INSTEAD
)
_INVOCATION: Final = "adapter.alora.invocation_tokens"

#: Largest relative error of an update ``B A``; half precision rounds both factors.
_TOLERANCES: Final = {"f32": 1e-5, "f16": 2e-3}


@dataclass(frozen=True)
class GgufLoraOptions:
    """Options of ``gguf-lora``.

    Attributes:
        dtype: What the two factors are stored in; the long spellings mean the same.
        name: The adapter's name and file name; by default the base's with ``-lora``.
    """

    dtype: Literal["f32", "f16", "float32", "float16"] = "f32"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.stored_type not in _TOLERANCES:
            raise invalid_value("dtype", "must be 'f32' or 'f16'", self.dtype, "export_model")

    @property
    def stored_type(self) -> str:
        """``"f32"`` or ``"f16"``."""
        return ALIASES.get(self.dtype, self.dtype)


class GgufLoraExporter:
    """Writes the two factors of every adapted matrix, scalings folded in."""

    name = "gguf-lora"
    summary = "The adapter alone, for llama.cpp's --lora."
    options_type: type = GgufLoraOptions

    def find_missing(self) -> list[str]:
        """The package that writes the files, where it is not installed."""
        return find_missing_encoder()

    def check(self, request: ExportRequest) -> ExportEstimate:
        """Refuse what llama.cpp cannot apply, and count the bytes."""
        check_encoder(set())
        check_runner(request.verify)
        if request.verify == "full":
            _check_base(request)
        size = {"f32": 4, "f16": 2}[request.options.stored_type]
        numbers = sum(f.a.numel() + f.b.numel() for f in collect_factors(request))
        notes = (_BASES_TOKENIZER,) if has_own_tokenizer(request.model) else ()
        return ExportEstimate(numbers * size + 65536, notes)

    def check_base(self, model: LoadedModel, options: GgufLoraOptions) -> None:
        """Refuse an adapter that no training makes a file of, before it is trained."""
        for _ in collect_factors(ExportRequest(model, options, None, verify=False)):
            pass

    def write(self, request: ExportRequest, folder: Path) -> Mapping[str, Any]:
        """Write the adapter file."""
        family = _find_family(request)
        path = folder / _file_name(request)
        parts = list(_encode_factors(request))
        config = find_configuration(request)[1]
        _write_header(path, family, config, parts, read_origin(request.model))
        # Not through GGUFWriter: numpy's tofile does not notice that the disk is full.
        with path.open("ab") as handle:
            pad(handle)
            for _, values in parts:
                handle.write(values.data)
                pad(handle)
        count = len(parts) // 2
        request.progress("writing GGUF adapter", count, count)
        return {"architecture": family.architecture, "adapted_tensors": count, "file": path.name}

    def verify(self, request: ExportRequest, folder: Path) -> Verification:
        """Read every update back; with ``"full"``, run base and adapter in llama.cpp."""
        path = folder / _file_name(request)
        return compare_by_level(
            request.verify,
            lambda: [_check_updates(request, GgufFile(path))],
            lambda: (_run_on_base(request, path), {}),
        )


def _run_on_base(request: ExportRequest, lora: Path) -> list[Check]:
    """The base in 16 bits with the adapter file on it, in llama.cpp beside the live model."""
    model = request.model
    with (
        scratch_folder("gguf-lora") as scratch,
        SafetensorsSource(_check_base(request)) as source,
    ):
        done = convert(
            source,
            model.model.config.to_dict(),
            model.tokenizer,
            scratch,
            quantization="f16",
            stop_token_ids=model.stop_token_ids,
        )
        files = [(RECIPES["f16"], done.files["f16"])]
        return check_run(model, files, merges_into_original=True, lora=lora)


def _encode_factors(request: ExportRequest) -> Iterator[tuple[str, NDArray[Any]]]:
    """The file's tensors, in order: names and values."""
    import numpy as np

    dtype = {"f32": np.float32, "f16": np.float16}[request.options.stored_type]
    for factors in collect_factors(request):
        for part, tensor in (("lora_a", factors.a), ("lora_b", factors.b)):
            values = np.ascontiguousarray(tensor.numpy(), dtype=dtype)
            if not np.isfinite(values).all():
                raise ExportError(
                    f"{factors.name}.{part} holds numbers that are not finite as "
                    f"{np.dtype(dtype).name}.",
                    advice=(
                        "Training has diverged, or ",
                        Setting("dtype", "f32", "export_model"),
                        " is needed.",
                    ),
                )
            yield f"{factors.name}.{part}", values


def _write_header(
    path: Path,
    family: Family,
    config: Any,
    parts: Sequence[tuple[str, NDArray[Any]]],
    origin: Origin,
) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, family.architecture)
    writer.add_type("adapter")
    writer.add_name(path.stem)
    # What the converter counts: the sizes of the updates, not of their factors.
    shapes = [values.shape for _, values in parts]
    updates = zip(parts[::2], shapes[::2], shapes[1::2], strict=True)
    sizes = [(part[0], (b[0], a[-1])) for part, a, b in updates]
    writer.add_size_label(describe_size(sizes))
    write_origin(writer, origin)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config.lora_alpha))
    if list_invocation_tokens(config):
        # llama.cpp switches the adapter on behind these.
        writer.add_key_value(
            _INVOCATION, list_invocation_tokens(config), GGUFValueType.ARRAY, GGUFValueType.UINT32
        )
    for name, values in parts:
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _check_base(request: ExportRequest) -> Path:
    if request.model.base.is_prequantized:
        raise ConfigError(
            Setting("verify", "full", "export_model"),
            f" needs the base in 16 bits to run the adapter on, and {request.model.base.path} "
            "holds only quantized weights.",
            parameter="verify",
            value="full",
            advice=("Use ", Setting("verify", True, "export_model"), "."),
        )
    return request.model.base.path


def _file_name(request: ExportRequest) -> str:
    name = choose_name(request)
    return f"{name}.gguf" if request.options.name else f"{name}-lora.gguf"


def _find_family(request: ExportRequest) -> Family:
    return read_family(request.model.model.config.to_dict())[0]


def _check_updates(request: ExportRequest, file: GgufFile) -> Check:
    import numpy as np

    tokens = list_invocation_tokens(find_configuration(request)[1])
    if list(file.value(_INVOCATION, [])) != tokens:
        return Check("updates", False, f"The file lacks the invocation tokens {tokens}.")
    tolerance = _TOLERANCES[request.options.stored_type]
    alpha = float(file.value("adapter.lora.alpha", 0.0))
    worst, worst_name, names = 0.0, "", set()
    for factors in collect_factors(request):
        a, b = (f"{factors.name}.{part}" for part in ("lora_a", "lora_b"))
        if a not in file.tensors or b not in file.tensors:
            return Check("updates", False, f"The file lacks {factors.name}.")
        names |= {a, b}
        # The products are compared, not the factors: s B A is all that reaches an answer.
        rank = file.shape(a)[0]
        written_a = file.read_rows(a, np.arange(rank))
        written_b = file.read_rows(b, np.arange(file.shape(b)[0]))
        wanted = (factors.b @ factors.a).numpy() * factors.scale
        got = (written_b @ written_a) * (alpha / rank)
        size = float(np.linalg.norm(wanted))
        error = float(np.linalg.norm(got - wanted)) / (size or 1.0)
        # A NaN compares false with everything, also with what comes after it.
        error = math.inf if math.isnan(error) else error
        if error > worst:
            worst, worst_name = error, factors.name
    if names != set(file.tensors):
        return Check("updates", False, f"Unknown tensors: {sorted(set(file.tensors) - names)[:3]}.")
    return Check(
        "updates",
        worst <= tolerance,
        f"{len(names) // 2} updates read back; the largest relative error, in "
        f"{worst_name or 'none'}, is {worst:.2e}.",
        worst,
        tolerance,
    )
