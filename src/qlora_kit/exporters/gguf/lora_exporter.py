"""``gguf-lora``: the adapter alone, for llama.cpp's ``--lora`` beside a base in GGUF."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from qlora_kit.artifacts.adapter_folder import has_own_tokenizer
from qlora_kit.errors import ConfigError, ExportError, UnsupportedModelError, invalid_value
from qlora_kit.exporters.gguf.conversion.file_plan import pad
from qlora_kit.exporters.gguf.conversion.file_writer import convert
from qlora_kit.exporters.gguf.conversion.origin import (
    Origin,
    describe_size,
    read_origin,
    write_origin,
)
from qlora_kit.exporters.gguf.conversion.tensors import (
    find_block,
    find_change,
    make_name_mapper,
)
from qlora_kit.exporters.gguf.conversion.text_model import name_in_text_model
from qlora_kit.exporters.gguf.families.table import Config, Family, read_family
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
from qlora_kit.weights.adapter import CHANGES_BASE, find_active_adapter, is_vocabulary_resized
from qlora_kit.weights.live import check_adapters
from qlora_kit.weights.source import SafetensorsSource

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["GgufLoraExporter", "GgufLoraOptions"]

_MERGE_INSTEAD: Final = "Export with 'gguf', which merges the adapter."

_BASES_TOKENIZER: Final = (
    "llama.cpp takes tokenizer, chat template and end token from the base's file, and this adapter "
    "was trained with its own: ask with its template and stop at its end token. " + _MERGE_INSTEAD
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


@dataclass(frozen=True)
class _Factors:
    """One adapted matrix.

    Attributes:
        name: GGUF name of the matrix.
        a: Shape (rank, inputs).
        b: Shape (outputs, rank), rows in llama.cpp's order, scaled so that llama.cpp's
            ``alpha / rank`` gives the scaling that was trained with.
        scale: That ``alpha / rank``.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float


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
        numbers = sum(f.a.numel() + f.b.numel() for f in _collect_factors(request))
        notes = (_BASES_TOKENIZER,) if has_own_tokenizer(request.model) else ()
        return ExportEstimate(numbers * size + 65536, notes)

    def check_base(self, model: LoadedModel, options: GgufLoraOptions) -> None:
        """Refuse an adapter that no training makes a file of, before it is trained."""
        for _ in _collect_factors(ExportRequest(model, options, None, verify=False)):
            pass

    def write(self, request: ExportRequest, folder: Path) -> Mapping[str, Any]:
        """Write the adapter file."""
        family = _find_family(request)
        path = folder / _file_name(request)
        parts = list(_encode_factors(request))
        config = _peft_config(request)[1]
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
    for factors in _collect_factors(request):
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
    if _invocation_tokens(config):
        # llama.cpp switches the adapter on behind these.
        writer.add_key_value(
            _INVOCATION, _invocation_tokens(config), GGUFValueType.ARRAY, GGUFValueType.UINT32
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


def _peft_config(request: ExportRequest) -> tuple[str, Any]:
    """The one active adapter and its peft configuration.

    Raises:
        UnsupportedModelError: When llama.cpp could not apply it.
    """
    model, adapter = find_active_adapter(request.model, instead=_MERGE_INSTEAD)
    check_adapters(model.model)
    config = model.model.peft_config[adapter]
    asked = {config.init_lora_weights, model.adapter.init_lora_weights}
    changing = (*CHANGES_BASE, "loftq")
    started = [str(way) for way in asked if str(way).lower().startswith(changing)]
    faults = {
        "DoRA": config.use_dora,
        "trained biases": config.bias != "none" or getattr(config, "lora_bias", False),
        "modules_to_save": bool(config.modules_to_save),
        "embeddings of its own": (bool(model.carried_tensors) or is_vocabulary_resized(model)),
        "tokens trained alone": bool(getattr(config, "trainable_token_indices", None)),
        f"an adapter started by {' and '.join(started)}, which fits changed base weights only": (
            bool(started) or bool(model.adapter.loftq_config)
        ),
    }
    if getattr(config, "target_parameters", None):
        raise UnsupportedModelError(
            "Adapters of experts (target_parameters) are not written as an adapter in GGUF. "
            + _MERGE_INSTEAD
        )
    found = [what for what, is_there in faults.items() if is_there]
    if found:
        raise UnsupportedModelError(
            f"llama.cpp's --lora has no {', '.join(found)}. {_MERGE_INSTEAD}"
        )
    return adapter, config


def _invocation_tokens(config: Any) -> list[int]:
    return list(getattr(config, "alora_invocation_tokens", None) or ())


def _collect_factors(request: ExportRequest) -> Iterator[_Factors]:
    """The factors of every adapted matrix, in the model's order.

    Raises:
        UnsupportedModelError: When a module is adapted that llama.cpp has no place for.
    """
    adapter, config = _peft_config(request)
    family, wrapped = read_family(request.model.model.config.to_dict())
    to_gguf = make_name_mapper(family, wrapped.layers)
    alpha = float(config.lora_alpha)
    modules = dict(request.model.model.base_model.model.named_modules())
    is_wrapped = any("language_model." in name for name in modules)
    for module_name, module in modules.items():
        if getattr(module, "lora_embedding_A", None):
            raise UnsupportedModelError(
                f"{module_name} is an adapted embedding, which is not supported as GGUF. "
                + _MERGE_INSTEAD
            )
        if adapter not in getattr(module, "lora_A", {}):
            continue
        name: str | None = f"{module_name}.weight"
        if is_wrapped:
            name = name_in_text_model(f"{module_name}.weight")
        if name is None and not module.lora_B[adapter].weight.any():
            continue  # text alone never trained it
        if name is None:
            raise UnsupportedModelError(
                f"{module_name} is adapted and no part of the text model, which is what llama.cpp "
                f"applies an adapter to. {_MERGE_INSTEAD}"
            )
        if wrapped.get("tie_word_embeddings", False) and module_name == "lm_head":
            raise UnsupportedModelError(
                "The adapted language-model head is tied to the embeddings, which llama.cpp cannot "
                f"adapt apart. {_MERGE_INSTEAD}"
            )
        # W x + s B (A x), with A (r, in) and B (out, r). llama.cpp takes s for alpha / r, with
        # one alpha for the file and each matrix's own r (llama_adapter_lora_weight::get_scale,
        # llama-adapter.h). What peft's s is besides, as with rsLoRA's alpha / sqrt(r) or a rank
        # pattern, goes into B; into B because only its rows are reordered below.
        a = module.lora_A[adapter].weight.detach().float().cpu()
        b = module.lora_B[adapter].weight.detach().float().cpu()
        rank = a.shape[0]
        b = b * (float(module.scaling[adapter]) * rank / alpha)
        for gguf_name, own_a, own_b in _place_factors(family, wrapped, to_gguf, name, a, b):
            yield _Factors(gguf_name, own_a.contiguous(), own_b.contiguous(), alpha / rank)


def _place_factors(
    family: Family,
    config: Config,
    to_gguf: Callable[[str], str],
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Both factors as the base's file has the matrix, of which it may have parts."""
    if name.endswith(family.unadapted):
        raise UnsupportedModelError(
            f"{name} is adapted, and llama.cpp multiplies with it past any adapter. "
            + _MERGE_INSTEAD
        )
    # Rows of B are outputs and columns of A are inputs, so whatever reorders the matrix's rows
    # reorders B's, and whatever reorders its columns A's.
    inputs = find_change(family.columns, name)
    a = a if inputs is None else inputs(a, config)
    parts = find_change(family.splits, name)
    if parts is None:
        outputs = find_change(family.transforms, name)
        yield to_gguf(name), a, b if outputs is None else outputs(b, config)
        return
    block = find_block(name)
    for part, cut in parts.items():
        rows = cut(b, config)
        if rows.ndim != 2 or rows.shape[1] != b.shape[1]:
            raise UnsupportedModelError(
                f"{name} is adapted, and llama.cpp has it taken apart ({', '.join(parts)}) so that "
                f"no adapter fits. {_MERGE_INSTEAD}"
            )
        yield f"blk.{block}.{part}", a, rows


def _check_updates(request: ExportRequest, file: GgufFile) -> Check:
    import numpy as np

    tokens = _invocation_tokens(_peft_config(request)[1])
    if list(file.value(_INVOCATION, [])) != tokens:
        return Check("updates", False, f"The file lacks the invocation tokens {tokens}.")
    tolerance = _TOLERANCES[request.options.stored_type]
    alpha = float(file.value("adapter.lora.alpha", 0.0))
    worst, worst_name, names = 0.0, "", set()
    for factors in _collect_factors(request):
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
