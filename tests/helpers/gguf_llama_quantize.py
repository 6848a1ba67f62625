"""What ``llama-quantize`` itself makes of a file, through a build of llama.cpp's own library.

    python tests/helpers/gguf_llama_quantize.py FOLDER

FOLDER holds ``libllama`` and ggml's libraries (the npm package ``@node-llama-cpp/linux-x64`` has
them in ``bins/linux-x64``; xllamacpp leaves the quantizer out). Every case is exported here in
f32 and in every type, the f32 file is quantized by llama.cpp, and all tensors must be of the same
types and bytes. Then ``llama_quantize_types.json`` is written, which the tests compare with where
no such library is at hand.
"""

from __future__ import annotations

import ctypes
import json
import os
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
}

TYPES_FILE = Path(__file__).parent.parent / "exporters" / "gguf" / "llama_quantize_types.json"


def export_case(case: str, folder: Path) -> Any:
    """A random model of a case in every type."""
    from qlora_kit.exporters.gguf.conversion.file_writer import convert
    from qlora_kit.exporters.gguf.quantization.recipes import RECIPES
    from qlora_kit.weights.source import SafetensorsSource

    family, shape, changes = CASES[case]
    tokenizer = tiny.byte_level_tokenizer()
    tiny.save_checkpoint(
        tiny.make_model(tiny.make_config(family, shape, **changes)), tokenizer, folder
    )
    config = json.loads((folder / "config.json").read_text())
    with SafetensorsSource(folder) as source:
        return convert(source, config, tokenizer, folder, quantization=list(RECIPES))


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


class _Parameters(ctypes.Structure):
    """``llama_model_quantize_params``, of which only the first two members are set here."""

    _fields_ = [
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int32),
        ("rest", ctypes.c_ubyte * 504),
    ]


class Quantizer:
    """llama.cpp's quantizer.

    Args:
        folder: Where its shared libraries are.
    """

    def __init__(self, folder: Path) -> None:
        base, ggml, llama = (
            min(folder.glob(f"{stem}*"), key=lambda path: len(path.name))
            for stem in ("libggml-base.", "libggml.", "libllama.")
        )
        ctypes.CDLL(str(base), mode=ctypes.RTLD_GLOBAL)
        backends = ctypes.CDLL(str(ggml), mode=ctypes.RTLD_GLOBAL)
        backends.ggml_backend_load_all_from_path(str(folder).encode())
        self._library = ctypes.CDLL(str(llama))
        self._library.llama_backend_init()
        self._library.llama_model_quantize_default_params.restype = _Parameters
        self._library.llama_model_quantize.argtypes = [
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.POINTER(_Parameters),
        ]

    def quantize(self, source: Path, target: Path, file_type: int) -> None:
        parameters = self._library.llama_model_quantize_default_params()
        parameters.threads, parameters.file_type = 1, file_type
        failed = self._library.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
        if failed:
            raise RuntimeError(f"llama.cpp did not quantize {source} to {target.name}")


def main(folder: Path) -> None:
    import numpy as np

    from qlora_kit.exporters.gguf.quantization.recipes import RECIPES
    from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile

    quantizer = Quantizer(folder)
    recorded: dict[str, dict[str, dict[str, str]]] = {}
    compared, wrong = 0, []
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            done = export_case(case, Path(scratch))
            for name, recipe in RECIPES.items():
                if name == "f32":
                    continue
                theirs = Path(scratch) / f"theirs-{name}.gguf"
                quantizer.quantize(done.files["f32"], theirs, recipe.file_type)
                right, ours = GgufFile(theirs), GgufFile(done.files[name])
                types = {tensor: right.type_of(tensor) for tensor in right.tensors}
                recorded.setdefault(case, {})[name] = describe_types(types)
                for tensor in right.tensors:
                    compared += 1
                    if types[tensor] != ours.type_of(tensor) or not np.array_equal(
                        right.tensors[tensor].data, ours.tensors[tensor].data
                    ):
                        wrong.append((case, name, tensor, types[tensor], ours.type_of(tensor)))
    print(f"{compared} tensors compared, {len(wrong)} differ", *wrong[:20], sep="\n")
    if wrong:
        raise SystemExit(1)
    lines = [
        f"  {json.dumps(case)}: {{\n"
        + ",\n".join(f"    {json.dumps(n)}: {json.dumps(t)}" for n, t in found.items())
        + "\n  }"
        for case, found in recorded.items()
    ]
    TYPES_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(Path(sys.argv[1]))
