"""Writes the merged model as CTranslate2 reads it, and runs it there to compare.

A merged 16-bit checkpoint is written into the staged folder, converted by CTranslate2's own
converter, and removed. The converter holds the whole model in memory.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_kit import ExportEstimate, ExportRequest, LoadedModel, Verification, nest_export
from qlora_kit.artifacts.config_files import write_generation_config
from qlora_kit.artifacts.tokenizer_files import write_tokenizer
from qlora_kit.errors import UnsupportedModelError
from qlora_kit.export import NestedExport
from qlora_kit.verification.checks import check_generation_config, check_tokenizer, make_probes
from qlora_kit.weights.merged import choose_merge_base
from qlora_kit_ctranslate2.running import check_logits, check_start_and_end, find_end_token

__all__ = ["CTranslate2Exporter", "CTranslate2Options"]

#: Bytes that a weight takes, by how it is stored.
_BYTES_PER_WEIGHT = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}

_README = """\
# {name} for CTranslate2

Weights are stored as {quantization}.

```python
import ctranslate2, transformers

generator = ctranslate2.Generator("path/to/this/folder", device="auto")
tokenizer = transformers.AutoTokenizer.from_pretrained("path/to/this/folder")
tokens = tokenizer.convert_ids_to_tokens(tokenizer("The capital of France is")["input_ids"])
result = generator.generate_batch([tokens], end_token={stops}, max_length=64,
                                  include_prompt_in_result=False)
print(tokenizer.decode(result[0].sequences_ids[0]))
```
"""


@dataclass(frozen=True)
class CTranslate2Options:
    """Options of ``ctranslate2``.

    Attributes:
        quantization: How weights are stored. int8 is half the size and the fastest on most CPUs;
            verification refuses it for models that do not bear it. int16 is left out: its
            arithmetic overflows on real models.
        base: What a quantized base is merged into, as for ``merged_16bit``.
    """

    quantization: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    base: Literal["auto", "original", "dequantized"] = "auto"


class CTranslate2Exporter:
    """Converts through a merged checkpoint."""

    name = "ctranslate2"
    summary = "Adapter merged in, for CTranslate2, a quick engine for CPUs and GPUs; also int8."
    options_type = CTranslate2Options

    def find_missing(self) -> list[str]:
        """CTranslate2, where its library does not load."""
        try:
            import ctranslate2  # noqa: F401
        except (ImportError, OSError) as error:
            return [f"ctranslate2 does not load: {error}"]
        return []

    def check(self, request: ExportRequest) -> ExportEstimate:
        """Refuse families without a converter, and count the checkpoint and its conversion."""
        from ctranslate2.converters.transformers import _MODEL_LOADERS

        family = type(request.model.model.config).__name__
        if family not in _MODEL_LOADERS:
            raise UnsupportedModelError(
                f"CTranslate2 converts no model with a {family}. Format 'merged_16bit' writes it."
            )
        merged = self._nest(request).check()
        share = _BYTES_PER_WEIGHT[request.options.quantization] / 2
        return ExportEstimate(int(merged.disk_bytes * (1 + 1.1 * share)), merged.notes)

    def write(self, request: ExportRequest, folder: Path) -> Mapping[str, Any]:
        """Merge, convert, and put the tokenizer beside it."""
        from ctranslate2.converters import TransformersConverter

        quantization = request.options.quantization
        with tempfile.TemporaryDirectory(dir=folder) as work:
            checkpoint = Path(work) / "checkpoint"
            checkpoint.mkdir()
            merged = self._nest(request).write(checkpoint)
            converter = TransformersConverter(str(checkpoint), low_cpu_mem_usage=True)
            converted = Path(
                converter.convert(str(Path(work) / "converted"), quantization=quantization)
            )
            for path in converted.iterdir():
                shutil.move(path, folder / path.name)
        stops = request.model.stop_token_ids
        _state_start_and_end(folder / "config.json", request.model)
        write_generation_config(request.model, folder)
        write_tokenizer(request.model, folder)
        readme = _README.format(
            name=Path(request.model.base.name_or_path).name,
            quantization=quantization,
            stops=list(stops),
        )
        (folder / "README.md").write_text(readme, encoding="utf-8")
        return {"quantization": quantization, "base": merged["base"], "stop_token_ids": list(stops)}

    def verify(self, request: ExportRequest, folder: Path) -> Verification:
        """Run the files in CTranslate2 and compare its logits with the live model's."""
        model, options = request.model, request.options
        base = choose_merge_base(model, options.base)
        is_original = base == "original" and model.base.quantization is not None
        checks = [
            check_generation_config(model, folder),
            check_tokenizer(model, folder),
            check_start_and_end(model, folder),
            check_logits(
                model, folder, make_probes(model), options.quantization, is_original=is_original
            ),
        ]
        return Verification("full" if request.verify == "full" else "standard", tuple(checks))

    def _nest(self, request: ExportRequest) -> NestedExport:
        return nest_export(request, "merged_16bit", base=request.options.base)


def _state_start_and_end(path: Path, model: LoadedModel) -> None:
    """Name the tokens that begin and end a text, where CTranslate2 looks for them."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The converter writes null for a tokenizer without one, and the runtime refuses null.
    settings["bos_token"] = settings.get("bos_token") or ""
    settings["eos_token"] = find_end_token(model)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
