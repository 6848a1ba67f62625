"""What an export's options say about types and importances, and the matrix they lead to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.exporters.gguf.calibration.collection import collect_importance
from qlora_kit.exporters.gguf.calibration.examples import CalibrationExamples, choose_examples
from qlora_kit.exporters.gguf.conversion.file_plan import FileSettings, Plan
from qlora_kit.exporters.gguf.options import GgufOptions
from qlora_kit.exporters.gguf.quantization.importance import (
    ImportanceMatrix,
    read_importance,
    write_importance,
)
from qlora_kit.hookspecs import ExportRequest

__all__ = ["Guide", "make_settings", "open_guide", "read_matrix"]


@dataclass(frozen=True)
class Guide:
    """One export's.

    Attributes:
        request: The export.
        settings: How its files are to be written.
        matrix: The importance matrix of a file.
        examples: What it is collected on instead.
        measured: What the cost of types is measured on, where any is.
    """

    request: ExportRequest
    settings: FileSettings
    matrix: ImportanceMatrix | None = None
    examples: CalibrationExamples | None = None
    measured: CalibrationExamples | None = None

    def check(self, plan: Plan) -> None:
        """Refuse a file that is of another model."""
        if self.matrix is not None:
            self.matrix.check({tensor.name: tensor.shape for tensor in plan.tensors})

    def count_bytes(self, plan: Plan) -> int:
        """Size of the importance matrix that will be written, at most."""
        if self.examples is None:
            return 0
        matrices = [tensor.shape for tensor in plan.tensors if len(tensor.shape) > 1]
        sizes = ((shape[0] if len(shape) > 2 else 1) * (shape[-1] + 1) for shape in matrices)
        return 4 * sum(sizes) + 512 * len(matrices) + 4096

    def read(self) -> ImportanceMatrix | None:
        """The importance matrix; collects it where it is not a file's."""
        if self.examples is None:
            return self.matrix
        return collect_importance(self.request.model, self.examples, self.request.progress)

    def write(self, matrix: ImportanceMatrix, folder: Path, name: str) -> dict[str, Any]:
        """Keep what was collected beside the files, and say what it is."""
        facts: dict[str, Any] = {"matrices": len(matrix.entries), "origin": str(matrix.path)}
        if self.examples is not None:
            path = folder / f"{name}.imatrix.gguf"
            write_importance(path, matrix)
            facts |= {
                "file": path.name,
                "origin": self.examples.origin,
                "examples": len(self.examples.token_ids),
                "examples_given": self.examples.total,
                "tokens": self.examples.tokens,
            }
        return facts


def _is_collected(name: str) -> bool:
    """Whether an importance is collected for a matrix: those of blocks, as llama-imatrix does."""
    return name.startswith("blk.")


def make_settings(options: GgufOptions, matrix: ImportanceMatrix | None = None) -> FileSettings:
    """How files will be written, before anything was collected."""
    is_guided: Callable[[str], bool] | None = None
    if matrix is not None:
        is_guided = matrix.entries.__contains__
    elif options.uses_importance:
        is_guided = _is_collected
    return FileSettings(options.requests, is_guided, options.part_bytes)


def read_matrix(options: GgufOptions) -> ImportanceMatrix | None:
    """The importance matrix of a file, where one was given."""
    file = options.importance_file
    return None if file is None else read_importance(file)


def open_guide(request: ExportRequest) -> Guide:
    """Read what the options name, without running the model.

    Raises:
        ConfigError: When a file is no importance matrix, or there is nothing to look at.
        DataError: When rows cannot be read.
    """
    options: GgufOptions = request.options
    matrix = read_matrix(options)
    measured = None
    if options.measures:
        measured = choose_examples(request.model, options.rows, option="imatrix")
    if matrix is not None:
        settings = make_settings(options, matrix)
        return Guide(request, settings, matrix=matrix, measured=measured)
    settings = make_settings(options)
    if not options.uses_importance:
        return Guide(request, settings, measured=measured)
    examples = measured or choose_examples(request.model, options.rows, option="imatrix")
    return Guide(request, settings, examples=examples, measured=measured)
