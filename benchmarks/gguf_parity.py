"""GGUF files beside those of llama.cpp's own converter, tensor by tensor.

    python benchmarks/gguf_parity.py LLAMA_CPP [--case NAME ...]

LLAMA_CPP is llama.cpp's source, as it comes in the source package of ``llama-cpp-python`` on PyPI
(``pip download --no-deps --no-binary llama-cpp-python llama-cpp-python``, then its folder
``vendor/llama.cpp``). Every family is a random model of a few layers, converted to float32 by both.
The converter chooses pre-tokenizers by hashes of published vocabularies, which the models here do
not have, so that it is run without the vocabulary; tokenizers are compared in the tests.

``tests/helpers/gguf_llama_quantize.py`` does the same for ``llama-quantize``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY / "tests" / "helpers")]

#: Run in llama.cpp's folder: its converter with every family's vocabulary left out.
_CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion
from conversion import base
def leave_out(self):
    pass
conversion.load_all_models()
for found in list(base.TextModel.__subclasses__()) + [base.TextModel]:
    stack = [found]
    while stack:
        one = stack.pop()
        one.set_vocab = leave_out
        stack.extend(one.__subclasses__())
asked = ["--outfile", sys.argv[3], "--outtype", "f32", *sys.argv[4:]]
sys.argv = ["convert_hf_to_gguf.py", sys.argv[2], *asked]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""

#: Keys that both write and that decide what llama.cpp computes.
_IGNORED = ("general.", "tokenizer.", "GGUF.", "split.")


#: Families whose converter wants to be told that the model has no layers for tokens further ahead.
_LOOK_AHEAD = ("qwen3_next", "qwen3_5")


def convert_there(llama_cpp: Path, checkpoint: Path, target: Path) -> str:
    """llama.cpp's file; what it said where there is none."""
    command = [sys.executable, "-c", _CONVERT, str(llama_cpp), str(checkpoint), str(target)]
    stored = json.loads((checkpoint / "config.json").read_text())
    if stored["model_type"].startswith(_LOOK_AHEAD):
        command.append("--no-mtp")
    if stored["model_type"] == "granitemoehybrid":
        # As the hub has it; transformers 5 has other names for both.
        names = {"full_attention": "attention", "linear_attention": "mamba"}
        stored["layer_types"] = [names[kind] for kind in stored["layer_types"]]
        (checkpoint / "config.json").write_text(json.dumps(stored))
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip()[-300:]


def compare_case(llama_cpp: Path, case: str, folder: Path) -> tuple[int, list[str], list[str]]:
    """How many tensors were compared, which differ, and which keys."""
    import numpy as np

    import gguf_tiny as tiny
    from qlora_kit.exporters.gguf.conversion.file_writer import convert
    from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile
    from qlora_kit.weights.source import SafetensorsSource

    tokenizer = tiny.byte_level_tokenizer()
    tiny.save_checkpoint(tiny.make_model(tiny.make_config(case)), tokenizer, folder)
    config = json.loads((folder / "config.json").read_text())
    with SafetensorsSource(folder) as source:
        done = convert(source, config, tokenizer, folder, quantization="f32")
    failed = convert_there(llama_cpp, folder, folder / "theirs.gguf")
    if failed:
        return 0, [f"the converter failed: {failed}"], []
    ours, theirs = GgufFile(done.files["f32"]), GgufFile(folder / "theirs.gguf")
    wrong = []
    for name in sorted({*ours.tensors, *theirs.tensors}):
        if name not in ours.tensors or name not in theirs.tensors:
            wrong.append(f"{name} is in {'theirs' if name in theirs.tensors else 'ours'} only")
            continue
        mine, right = (file.tensors[name].data for file in (ours, theirs))
        if mine.shape != right.shape:
            wrong.append(f"{name}: {mine.shape} here, {right.shape} there")
        elif not np.array_equal(mine, right):
            distance = float(np.abs(mine - right).max() / np.abs(right).max())
            wrong.append(f"{name} differs by {distance:.1e}")
    keys = []
    for key in sorted(theirs.keys()):
        if key.startswith(_IGNORED):
            continue
        stated, right = ours.value(key), theirs.value(key)
        if stated != right and not (
            isinstance(right, float) and isinstance(stated, float) and abs(stated - right) < 1e-6
        ):
            keys.append(f"{key}: {stated} here, {right} there")
    return len(theirs.tensors), wrong, keys


def main() -> None:
    import gguf_tiny as tiny

    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--case", nargs="*", default=sorted(tiny.CASES))
    asked = parser.parse_args()
    compared = differing = 0
    for case in asked.case:
        with tempfile.TemporaryDirectory() as scratch:
            count, wrong, keys = compare_case(asked.llama_cpp.absolute(), case, Path(scratch))
        compared += count
        differing += len(wrong)
        print(f"{case}: {count} tensors, {len(wrong)} differ", flush=True)
        for line in (*wrong[:6], *(f"key {line}" for line in keys)):
            print(f"  {line}", flush=True)
    print(f"{compared} tensors compared, {differing} differ")


if __name__ == "__main__":
    main()
