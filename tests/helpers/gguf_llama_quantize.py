"""What ``llama-quantize`` itself makes of a file, run as the program it is.

    python tests/helpers/gguf_llama_quantize.py PATH/TO/llama-quantize

With ``ONLY_TYPES=1`` in the environment no bytes are compared, which is quick.

llama.cpp's source comes in the source package of ``llama-cpp-python`` on PyPI (in its folder
``vendor/llama.cpp``); ``cmake --build build --target llama-quantize`` makes the program. Every case
is exported here in f32, some of them in every type, without and with an importance matrix and with
types asked for by tensor. llama.cpp quantizes the f32 file, and all tensors must be of the same
types, and where they were exported of the same bytes. Then ``llama_quantize_types.json`` is
written, which the tests compare with where no such program is at hand.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf_tiny as tiny

#: Name of a case: the family's test case, and what differs. Nine layers have a beginning, a
#: middle and an end; 80 with grouped heads are taken for a 70B model.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "aligned", {"num_hidden_layers": 9}),
    "llama-tied": ("llama-tied", "aligned", {"num_hidden_layers": 3}),
    "llama-unaligned": ("llama", "unaligned", {"num_hidden_layers": 9}),
    "llama-gqa": ("llama", "aligned", {"num_hidden_layers": 2, "num_key_value_heads": 1}),
    "llama-70b": (
        "llama",
        "aligned",
        {"num_hidden_layers": 80, "intermediate_size": 256, "max_position_embeddings": 64},
    ),
    "mistral": ("mistral", "aligned", {"num_hidden_layers": 3}),
    "qwen2": ("qwen2", "aligned", {"num_hidden_layers": 3}),
    "qwen3": ("qwen3", "aligned", {"num_hidden_layers": 3}),
    "gemma2": ("gemma2", "aligned", {"num_hidden_layers": 4}),
    "gemma3": ("gemma3", "aligned", {"num_hidden_layers": 7}),
    "phi3": ("phi3", "aligned", {"num_hidden_layers": 9}),
    "phi3-unaligned": ("phi3", "unaligned", {"num_hidden_layers": 2}),
    "qwen3-moe": ("qwen3-moe", "aligned", {"num_hidden_layers": 9, "moe_intermediate_size": 256}),
    "qwen3-moe-8": ("qwen3-moe", "aligned", {"num_hidden_layers": 9, "num_experts": 8}),
    "qwen3-moe-small": ("qwen3-moe", "aligned", {"moe_intermediate_size": 256}),
}

#: Types asked for by tensor, as ``--tensor-type`` and its kin take them.
REQUESTS = {
    "tensor_types": {r"blk\.1\.ffn_down": "q8_0", "attn_k": "q5_k", "ffn_up": "iq4_nl"},
    "output_type": "q5_k",
    "embedding_type": "q8_0",
}

#: How a case is quantized: with an importance matrix, and with the requests above.
WAYS = {"plain": (False, False), "importance": (True, False), "requests": (True, True)}


def list_ways(case: str) -> list[str]:
    """Those that fit a case: the types asked for want rows of whole blocks, and separate keys."""
    fits = CASES[case][1] == "aligned" and not case.startswith("phi3")
    return [way for way in WAYS if way != "requests" or fits]


TYPES_FILE = Path(__file__).parent.parent / "exporters" / "gguf" / "llama_quantize_types.json"


def list_recipes(case: str, way: str) -> list[str]:
    """The quantizations that a case is compared in."""
    from qlora_kit.exporters.gguf.quantization.recipes import RECIPES

    # q2_k_l is not llama-quantize's.
    names = [name for name in RECIPES if name not in ("f32", "q2_k_l")]
    if "moe" not in case:
        names.remove("mxfp4_moe")
    if not WAYS[way][0]:
        names = [name for name in names if name not in NEEDS_IMPORTANCE]
    if WAYS[way][1]:
        names = ["f16", "q4_0", "q4_k_m", "q2_k", "iq4_xs", "iq2_m"]
    return names


#: Cases whose bytes are compared as well; types are compared in all.
BYTE_CASES = ("llama-tied", "llama-unaligned", "qwen3-moe-small")

#: ggml builds large tables for these in every process that encodes them; the bytes of one case and
#: way stand for all.
SLOW = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs")

NEEDS_IMPORTANCE = (
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s",
)  # fmt: skip


def list_byte_recipes(case: str, way: str) -> list[str]:
    """Those whose bytes are compared as well."""
    if case not in BYTE_CASES or os.environ.get("ONLY_TYPES"):
        return []
    takes_slow = (case, way) == ("llama-tied", "importance")
    return [name for name in list_recipes(case, way) if takes_slow or name not in SLOW]


def make_settings(way: str) -> Any:
    """The file settings of a way, planned as if everything in blocks had an importance."""
    from qlora_kit.exporters.gguf.conversion.file_plan import FileSettings
    from qlora_kit.exporters.gguf.quantization.type_requests import TypeRequests, parse_requests

    is_guided, is_asked = WAYS[way]
    return FileSettings(
        parse_requests(**REQUESTS) if is_asked else TypeRequests(),
        (lambda name: name.startswith("blk.")) if is_guided else None,
    )


def make_importance(tensors: dict[str, tuple[int, ...]]) -> Any:
    """Random importances for the matrices of a file's blocks; one expert is never reached."""
    import numpy as np

    from qlora_kit.exporters.gguf.quantization.importance import Importance, ImportanceMatrix
    from qlora_kit.exporters.gguf.quantization.mixtures import allows_quantization

    rng = np.random.default_rng(20261128)
    entries = {}
    for name, shape in sorted(tensors.items()):
        if name.startswith("blk.") and allows_quantization(name, shape):
            count = shape[0] if len(shape) > 2 else 1
            counts = rng.integers(1, 100, count)
            if count > 1:
                counts[1] = 0
            sums = rng.exponential(size=(count, shape[-1])) ** 2 * counts[:, None]
            entries[name] = Importance(sums.astype(np.float32), counts)
    return ImportanceMatrix(entries, ("a text",), 7, 512)


def export_case(case: str, folder: Path, way: str = "plain") -> Any:
    """A random model of a case in f32 and every type."""
    import dataclasses

    from qlora_kit.exporters.gguf.conversion.file_plan import plan_conversion
    from qlora_kit.exporters.gguf.conversion.file_writer import convert
    from qlora_kit.exporters.gguf.quantization.importance import read_importance, write_importance
    from qlora_kit.weights.source import SafetensorsSource

    family, shape, changes = CASES[case]
    tokenizer = tiny.byte_level_tokenizer()
    tiny.save_checkpoint(
        tiny.make_model(tiny.make_config(family, shape, **changes)), tokenizer, folder
    )
    config = json.loads((folder / "config.json").read_text())
    with SafetensorsSource(folder) as source:
        importance, settings = None, make_settings(way)
        if WAYS[way][0]:
            plan = plan_conversion(source, config, quantization="f16")
            path = folder / "case.imatrix.gguf"
            write_importance(path, make_importance({t.name: t.shape for t in plan.tensors}))
            importance = dataclasses.replace(read_importance(path), path=path)
        names = ["f32", *list_byte_recipes(case, way)]
        if WAYS[way][1]:  # f32 must stay f32 throughout
            plain = convert(source, config, tokenizer, folder, quantization="f32", name="plain")
            if not names[1:]:
                return plain
            done = convert(
                source, config, tokenizer, folder, quantization=names[1:], settings=settings,
                importance=importance,
            )  # fmt: skip
            return dataclasses.replace(done, files={**plain.files, **done.files})
        return convert(
            source, config, tokenizer, folder, quantization=names, settings=settings,
            importance=importance,
        )  # fmt: skip


def describe_types(types: dict[str, str]) -> dict[str, str]:
    """Types by part, layers run together: ``{"attn_v": "Q6_K*2 Q4_K*3"}``."""
    by_part: dict[str, list[str]] = {}
    for name in sorted(types, key=lambda name: (name.split(".")[0], _layer(name), name)):
        part = name.split(".", 2)[2] if name.startswith("blk.") else name
        by_part.setdefault(part.removesuffix(".weight"), []).append(types[name])
    return {part: _run_together(found) for part, found in sorted(by_part.items())}


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else 0


def _run_together(types: list[str]) -> str:
    runs: list[list[Any]] = []
    for name in types:
        if runs and runs[-1][0] == name:
            runs[-1][1] += 1
        else:
            runs.append([name, 1])
    return " ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def quantize(
    program: Path, source: Path, target: Path | None, name: str, way: str
) -> dict[str, str]:
    """Run llama-quantize; without a target it only says what types it would choose.

    Returns:
        The types, by tensor; what a dry run says; a whole one names only what the source has.

    Raises:
        RuntimeError: When it fails.
    """
    is_guided, is_asked = WAYS[way]
    options = ["--imatrix", str(source.with_name("case.imatrix.gguf"))] if is_guided else []
    if is_asked:
        for pattern, kind in REQUESTS["tensor_types"].items():
            options += ["--tensor-type", f"{pattern}={kind}"]
        options += ["--output-tensor-type", REQUESTS["output_type"]]
        options += ["--token-embedding-type", REQUESTS["embedding_type"]]
    command = [program, *options, *(["--dry-run"] if target is None else [])]
    command += [source, *([] if target is None else [target]), name.upper(), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama-quantize did not make {name} of {source}: {done.stderr[-600:]}")
    kept = {line[1]: line[2] for line in _SAID.finditer(done.stdout + done.stderr)}
    changed = {line[1]: line[2] for line in _CHANGED.finditer(done.stdout + done.stderr)}
    return {tensor: spelled.upper() for tensor, spelled in {**kept, **changed}.items()}


_SAID = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- .*?type = +(\w+),")
_CHANGED = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- .*?type = .*MiB -> .*MiB \((\w+)\)")


def main(program: Path) -> None:
    import numpy as np

    from qlora_kit.exporters.gguf.conversion.file_plan import plan_conversion
    from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile

    recorded: dict[str, dict[str, dict[str, dict[str, str]]]] = {}
    compared, wrong = 0, []
    for case, (family, shape, changes) in CASES.items():
        config = tiny.make_config(family, shape, **changes)
        for way in list_ways(case):
            names = list_recipes(case, way)
            plan = plan_conversion(
                tiny.make_shapes(config), config.to_dict(), quantization=names,
                settings=make_settings(way),
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as scratch:
                done = export_case(case, Path(scratch), way)
                for name in names:
                    whole = Path(scratch) / "theirs.gguf" if name in done.files else None
                    types = quantize(program, done.files["f32"], whole, name, way)
                    if whole is not None:
                        right = GgufFile(whole)
                        types = {tensor: right.type_of(tensor) for tensor in right.tensors}
                    found = recorded.setdefault(case, {}).setdefault(way, {})
                    found[name] = describe_types(types)
                    ours = dict(plan.types[name])
                    for tensor in sorted({*types, *ours}):
                        if types.get(tensor) != ours.get(tensor):
                            wrong.append(
                                (case, way, name, tensor, types.get(tensor), ours.get(tensor))
                            )
                    if whole is None:
                        continue
                    written = GgufFile(done.files[name])
                    for tensor in right.tensors:
                        compared += 1
                        mine, theirs = written.tensors[tensor].data, right.tensors[tensor].data
                        if mine.shape != theirs.shape or not np.array_equal(mine, theirs):
                            wrong.append((case, way, name, tensor, "bytes", ours[tensor]))
        print(f"{case}: bytes of {compared} tensors compared, {len(wrong)} differ", flush=True)
    print(*wrong[:40], sep="\n")
    if wrong:
        raise SystemExit(1)
    TYPES_FILE.write_text(spell(recorded))


def spell(recorded: dict[str, dict[str, dict[str, dict[str, str]]]]) -> str:
    """One line for every set of types, with the quantizations that it is of."""
    lines = []
    for case, ways in recorded.items():
        for way, found in ways.items():
            by_types: dict[str, list[str]] = {}
            for name, types in found.items():
                by_types.setdefault(json.dumps(types), []).append(name)
            lines += [
                f"{json.dumps([case, way, names])[:-1]}, {types}]"
                for types, names in by_types.items()
            ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def read_recorded() -> list[tuple[str, str, list[str], dict[str, str]]]:
    """What was written."""
    return [tuple(line) for line in json.loads(TYPES_FILE.read_text())]


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(Path(sys.argv[1]).absolute())
