"""``gguf``: llama.cpp files of the merged model, and an Ollama Modelfile beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qlora_kit.exporters.gguf.calibration.guide import (
    Guide,
    make_settings,
    open_guide,
    read_matrix,
)
from qlora_kit.exporters.gguf.calibration.loss import LossMeter
from qlora_kit.exporters.gguf.calibration.search import (
    Choice,
    choose_by_loss,
    list_plain_recipes,
)
from qlora_kit.exporters.gguf.conversion.file_plan import FileSettings, Plan, plan_conversion
from qlora_kit.exporters.gguf.conversion.file_writer import convert
from qlora_kit.exporters.gguf.conversion.merged_source import choose_rounding, open_merged
from qlora_kit.exporters.gguf.conversion.origin import read_origin
from qlora_kit.exporters.gguf.modelfile import describe_prompt, write_modelfile
from qlora_kit.exporters.gguf.options import GgufOptions
from qlora_kit.exporters.gguf.quantization.ggml import find_missing_encoder
from qlora_kit.exporters.gguf.quantization.importance import ImportanceMatrix
from qlora_kit.exporters.gguf.quantization.recipes import resolve_recipes
from qlora_kit.exporters.gguf.tokenizer.comparison import check_vocabulary
from qlora_kit.exporters.gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary
from qlora_kit.exporters.gguf.verification.file_checks import check_files
from qlora_kit.exporters.gguf.verification.gguf_file import find_parts, read_types
from qlora_kit.exporters.gguf.verification.llama_run import check_runner
from qlora_kit.exporters.gguf.verification.run_checks import check_run
from qlora_kit.handles import LoadedModel
from qlora_kit.hookspecs import ExportEstimate, ExportRequest
from qlora_kit.results import Verification
from qlora_kit.verification.levels import compare_by_level
from qlora_kit.weights.merge_base import choose_merge_base, warn_of_coarse_rounding

__all__ = ["GgufExporter", "GgufOptions", "choose_name", "read_config"]

# A base read from "model.Q4_1.gguf" is no longer of that type.
_TYPE_SUFFIX: Final = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)


#: What begins like this has 4 bits for a weight, or fewer.
_COARSE_TYPES: Final = ("Q4", "Q3", "Q2", "Q1", "IQ", "TQ")


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
        # Rows that cannot be read, and files of other models, are refused here.
        guide = open_guide(request)
        plan, vocabulary, notes = self._look_at(request, guide.settings)
        guide.check(plan)
        coarse = [r.name for r in plan.recipes if r.base_type.startswith(_COARSE_TYPES)]
        if coarse:
            base = choose_merge_base(request.model, request.options.base)
            advice = "Take q8_0 or q6_k, or compare with a merge into the original."
            warn_of_coarse_rounding(request.model, base, f"gguf {', '.join(coarse)}", advice)
        size = sum(plan.data_bytes(recipe) + _count_bytes(vocabulary) for recipe in plan.recipes)
        return ExportEstimate(size + guide.count_bytes(plan), notes)

    def check_base(self, model: LoadedModel, options: GgufOptions) -> None:
        """Refuse a model that no training makes a file of, before it is trained."""
        request = ExportRequest(model, options, None, verify=False)
        self._look_at(request, make_settings(options))

    def _look_at(
        self, request: ExportRequest, settings: FileSettings
    ) -> tuple[Plan, Vocabulary, tuple[str, ...]]:
        """What will be written, its vocabulary, and what the user should know of them."""
        plan = self._plan(request, settings)
        model = request.model
        vocabulary = read_vocabulary(model.tokenizer, plan.vocabulary_size, model.stop_token_ids)
        _, notes = check_vocabulary(vocabulary, model.tokenizer)
        return plan, vocabulary, (
            *plan.description.notes, *plan.notes, *vocabulary.notes, *notes,
        )  # fmt: skip

    def write(self, request: ExportRequest, folder: Path) -> Mapping[str, Any]:
        """Stream every tensor into every file, then write the Modelfile."""
        options: GgufOptions = request.options
        model = request.model
        guide = open_guide(request)
        importance = guide.read()
        with _open_source(request, shared=request.shared) as source:
            choices = self._measure(request, guide, source, importance)
            chosen = {name: choice.types for name, choice in choices.items()}
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
                origin=read_origin(model),
                settings=dataclasses.replace(guide.settings, chosen=chosen),
                importance=importance,
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
        if importance is not None:
            facts["imatrix"] = guide.write(importance, folder, choose_name(request))
        if choices:
            facts["measured"] = {name: choice.describe() for name, choice in choices.items()}
        if options.part_bytes is not None:
            facts["parts"] = {r.name: len(done.plan.parts(r)) for r in done.plan.recipes}
            if any(count > 1 for count in facts["parts"].values()):
                facts["notes"].append(
                    "llama.cpp finds the other parts of a split file by its first one; Ollama "
                    "does not read split files."
                )
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
        model = request.model
        # Merged anew: files that another format wrote are no evidence about the live model.
        with _open_source(request, shared=None) as source:
            settings = make_settings(request.options, read_matrix(request.options))
            plan = self._plan(request, settings, source)
            files = [(recipe, find_parts(folder, plan, recipe)) for recipe in plan.recipes]
            # Types that were measured are those that the file states; its numbers are compared.
            chosen = {recipe.name: read_types(parts) for recipe, parts in files if recipe.target}
            if chosen:
                settings = dataclasses.replace(settings, chosen=chosen)
                plan = self._plan(request, settings, source)
            into_original = source.base == "original"
            return compare_by_level(
                request.verify,
                lambda: check_files(files, plan, source, model.tokenizer, model.stop_token_ids),
                lambda: (
                    check_run(
                        model,
                        [(recipe, parts[0]) for recipe, parts in files],
                        merges_into_original=into_original,
                    ),
                    {},
                ),
            )

    def _measure(
        self,
        request: ExportRequest,
        guide: Guide,
        source: Any,
        importance: ImportanceMatrix | None,
    ) -> dict[str, Choice]:
        """The types of every recipe that is a size, by its name."""
        targets = {
            recipe.name: recipe.target
            for recipe in resolve_recipes(request.options.chosen)
            if recipe.target is not None
        }
        if not targets or guide.measured is None:
            return {}
        settings = dataclasses.replace(guide.settings, part_bytes=None)
        plan = plan_conversion(
            source,
            read_config(request.model, source),
            quantization=list_plain_recipes(),
            settings=settings,
        )
        meter = LossMeter(request.model, source, guide.measured, importance)
        return {
            name: choose_by_loss(plan, target, meter, request.progress)
            for name, target in targets.items()
        }

    def _plan(self, request: ExportRequest, settings: FileSettings, source: Any = None) -> Plan:
        with contextlib.ExitStack() as stack:
            if source is None:
                # Nothing is written yet that could be shared.
                source = stack.enter_context(_open_source(request, shared=None))
            return plan_conversion(
                source,
                read_config(request.model, source),
                quantization=request.options.chosen,
                name=choose_name(request),
                settings=settings,
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
