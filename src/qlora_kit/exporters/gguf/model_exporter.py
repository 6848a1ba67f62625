"""``gguf``: llama.cpp files of the merged model, and an Ollama Modelfile beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from qlora_kit.errors import ConfigError
from qlora_kit.exporters.gguf.conversion.file_plan import plan_conversion
from qlora_kit.exporters.gguf.conversion.file_writer import convert
from qlora_kit.exporters.gguf.conversion.merged_source import choose_rounding, open_merged
from qlora_kit.exporters.gguf.modelfile import describe_prompt, write_modelfile
from qlora_kit.exporters.gguf.quantization.ggml import find_missing_encoder
from qlora_kit.exporters.gguf.quantization.recipes import resolve_recipes
from qlora_kit.exporters.gguf.tokenizer.comparison import check_vocabulary
from qlora_kit.exporters.gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary
from qlora_kit.exporters.gguf.verification.file_checks import check_files
from qlora_kit.exporters.gguf.verification.llama_run import check_runner
from qlora_kit.exporters.gguf.verification.run_checks import check_run
from qlora_kit.handles import LoadedModel
from qlora_kit.hookspecs import ExportEstimate, ExportRequest
from qlora_kit.results import Verification
from qlora_kit.verification.levels import compare_by_level

__all__ = ["GgufExporter", "GgufOptions", "choose_name", "read_config"]

_DEFAULT: Final = "q8_0"

_Rounding = Literal["auto", "float32", "bfloat16", "float16"]

# A base read from "model.Q4_1.gguf" is no longer of that type.
_TYPE_SUFFIX: Final = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)


@dataclass(frozen=True)
class GgufOptions:
    """Options of ``gguf``.

    Attributes:
        quantization: One type or several, such as ``["q4_k_m", "q8_0"]``; each becomes a file,
            and they share the merge.
        quantization_method: The same under the name Unsloth users type.
        base: What a quantized base is merged into: ``"original"``, the 16-bit checkpoint it was
            quantized from; ``"dequantized"``, exactly the weights the adapter was trained on; or
            ``"auto"``: original, unless none exists or LoftQ started the adapter.
        dtype: What merged weights are rounded to before they are encoded. ``"auto"`` is the
            base checkpoint's own 16-bit dtype, as for ``merged_16bit``, with which the merge is
            then shared; a base stored in float32 is not rounded, nor is anything with
            ``"float32"``.
        threads: Workers that encode; all cores by default.
        name: The model's name in the files and beginning of their names; by default the base's.
        modelfile: Whether to write an Ollama ``Modelfile``.
    """

    quantization: str | Sequence[str] = _DEFAULT
    quantization_method: str | Sequence[str] | None = None
    base: Literal["auto", "original", "dequantized"] = "auto"
    dtype: _Rounding = "auto"
    threads: int | None = None
    name: str | None = None
    modelfile: bool = True

    def __post_init__(self) -> None:
        if self.quantization != _DEFAULT and self.quantization_method is not None:
            raise ConfigError(
                "quantization and quantization_method are the same option; give one of them."
            )
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}.")
        resolve_recipes(self.chosen)

    @property
    def chosen(self) -> str | Sequence[str]:
        """The quantizations asked for, under either name."""
        return self.quantization if self.quantization_method is None else self.quantization_method


class GgufExporter:
    """Writes merged weights as ``.gguf`` without a compiler, a clone or a download."""

    name = "gguf"
    summary = "Adapter merged in, files for llama.cpp and Ollama in any quantization."
    options_type: type = GgufOptions

    def find_missing(self) -> list[str]:
        """The package that writes the files, where it is not installed."""
        return find_missing_encoder()

    def check(self, request: ExportRequest) -> ExportEstimate:
        """Plan every tensor, compare the tokenizers and count the bytes."""
        check_runner(request.verify)
        options: GgufOptions = request.options
        # Nothing is written yet that could be shared.
        with _open_source(request, shared=None) as source:
            plan = plan_conversion(
                source,
                read_config(request.model, source),
                quantization=options.chosen,
                name=choose_name(request),
            )
        vocabulary = read_vocabulary(
            request.model.tokenizer, plan.vocabulary_size, request.model.stop_token_ids
        )
        _, notes = check_vocabulary(vocabulary, request.model.tokenizer)
        size = sum(plan.data_bytes(recipe) + _count_bytes(vocabulary) for recipe in plan.recipes)
        return ExportEstimate(size, (*plan.description.notes, *vocabulary.notes, *notes))

    def write(self, request: ExportRequest, folder: Path) -> Mapping[str, Any]:
        """Stream every tensor into every file, then write the Modelfile."""
        options: GgufOptions = request.options
        model = request.model
        with _open_source(request, shared=request.shared) as source:
            done = convert(
                source,
                read_config(model, source),
                model.tokenizer,
                folder,
                quantization=options.chosen,
                name=choose_name(request),
                threads=options.threads,
                progress=request.progress,
                stop_token_ids=model.stop_token_ids,
            )
            base = source.base
        rounding = choose_rounding(model, options.dtype)
        facts: dict[str, Any] = {
            "quantization": list(done.files),
            "architecture": done.plan.family.architecture,
            "base": base,
            "dtype": str(rounding or "float32").removeprefix("torch."),
            "files": {name: path.name for name, path in done.files.items()},
            "tokenizer_texts": done.tokenizer_texts,
            "notes": list(done.notes),
        }
        if options.modelfile:
            formatter = model.record.formatter
            spec = None if formatter is None else formatter.template_spec()
            modelfile = describe_prompt(spec, model.tokenizer, model.stop_token_ids)
            text = write_modelfile(modelfile, [path.name for path in done.files.values()])
            if text is None:
                facts["notes"].append(
                    "No Modelfile: the template contains quotes that its format cannot hold."
                )
            else:
                (folder / "Modelfile").write_text(text, encoding="utf-8")
                facts["modelfile"] = modelfile.origin
        return facts

    def verify(self, request: ExportRequest, folder: Path) -> Verification:
        """Read the files back; with ``"full"``, also run them beside the live model."""
        options: GgufOptions = request.options
        model = request.model
        # Merged anew: files that another format wrote are no evidence about the live model.
        with _open_source(request, shared=None) as source:
            plan = plan_conversion(
                source,
                read_config(model, source),
                quantization=options.chosen,
                name=choose_name(request),
            )
            files = [(recipe, folder / plan.file_name(recipe)) for recipe in plan.recipes]
            into_original = source.base == "original"
            return compare_by_level(
                request.verify,
                lambda: check_files(files, plan, source, model.tokenizer, model.stop_token_ids),
                lambda: (check_run(model, files, merges_into_original=into_original), {}),
            )


def choose_name(request: ExportRequest) -> str:
    """The name asked for, or the base's, without what file systems dislike."""
    asked = request.options.name
    if asked is None:
        asked = Path(request.model.base.name_or_path).name.removesuffix(".gguf")
        if request.model.base.source == "gguf":
            asked = _TYPE_SUFFIX.sub("", asked)
    return re.sub(r"[^\w.+-]+", "-", str(asked)).strip("-.") or "model"


def read_config(model: LoadedModel, source: Any) -> dict[str, Any]:
    """The configuration of the merged model, as ``config.json`` would say it."""
    config: dict[str, Any] = model.model.config.to_dict()
    config |= source.config_updates()
    return config


def _open_source(request: ExportRequest, *, shared: Any) -> Any:
    return open_merged(request.model, request.options.base, request.options.dtype, shared)


def _count_bytes(vocabulary: Vocabulary) -> int:
    """Size of the metadata, rounded up: every string has eight bytes of length."""
    texts = [*vocabulary.tokens, *vocabulary.merges, vocabulary.chat_template or ""]
    return sum(len(text.encode()) + 8 for text in texts) + 8 * len(vocabulary.tokens) + 65536
