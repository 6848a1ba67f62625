"""Whole exports under bad conditions: killed, out of disk, short of memory, packages missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import gguf_tiny as tiny
from qlora_kit import export_model
from qlora_kit.errors import DiskSpaceError

torch = pytest.importorskip("torch")

HELPERS = Path(tiny.__file__).parent


def run_script(script: str, *arguments: object, timeout: float = 300) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
            [str(HELPERS), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_destination_is_absent_old_or_whole(tmp_path):
    rounds = 18
    done = subprocess.run(
        [sys.executable, str(HELPERS / "gguf_killing.py"), str(tmp_path), str(rounds)],
        capture_output=True, text=True, timeout=300, check=False,
        # On the CPU everywhere: CUDA does not survive a fork.
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["seen"]) >= rounds
    for before, tried, after in report["seen"]:
        assert after in (before, tried)
    # Some were killed with half a file on the disk, and the next export cleared it away.
    assert report["leftovers"] >= 3
    assert report["rest"] == ["files"]
    assert report["last"] == "q8_0"


@pytest.mark.parametrize(("format", "limit"), [("gguf", 20_000), ("gguf-lora", 4_000)])
def test_a_disk_that_fills_up_leaves_the_old_export(format, limit, adapted16, tmp_path):
    """The system refuses to let files grow past a limit, as a full disk would."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "out"
    export_model(adapted16, format, out, verify=False)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DiskSpaceError, match=r"as it was before"):
            export_model(adapted16, format, out, verify=False, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_disk_is_checked_for_every_file_before_any_is_begun(adapted16, tmp_path, monkeypatch):

    types = ["f32", "f16", "q8_0"]
    needed = sum(
        export_model(adapted16, "gguf", tmp_path / name, quantization=name, verify=False).size
        for name in types
    )
    usage = type("Usage", (), {"free": needed // 2})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskSpaceError, match="MiB free"):
        export_model(adapted16, "gguf", tmp_path / "out", quantization=types, verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's counters")
def test_writing_needs_memory_for_a_tensor_not_for_a_model(tmp_path):
    """Anonymous memory of a conversion: the memory map of the checkpoint does not count."""
    script = """
        import json, sys, threading
        from pathlib import Path
        import torch
        from safetensors.torch import save_file
        import gguf_tiny as tiny
        from qlora_kit.exporters.gguf.conversion.file_writer import convert
        from qlora_kit.weights.source import SafetensorsSource

        torch.set_num_threads(1)
        folder, layers = Path(sys.argv[1]), int(sys.argv[2])
        config = tiny.make_config("llama", num_hidden_layers=layers, hidden_size=1024,
                                  intermediate_size=3072)
        with torch.device("meta"):
            from transformers import AutoModelForCausalLM
            shapes = AutoModelForCausalLM.from_config(config).state_dict()
        tensors = {n: torch.zeros(v.shape, dtype=torch.bfloat16) for n, v in shapes.items()}
        save_file(tensors, folder / "model.safetensors")
        total = sum(t.numel() for t in tensors.values()) * 4
        largest = max(t.numel() for t in tensors.values()) * 4
        del tensors

        def anonymous():
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024

        def run():
            with SafetensorsSource(folder) as source:
                convert(source, config.to_dict(), tiny.byte_level_tokenizer(), folder,
                        quantization=["f16", "q8_0"], threads=2)

        run()
        before, peak, done = anonymous(), [0], threading.Event()

        def watch():
            while not done.wait(0.002):
                peak[0] = max(peak[0], anonymous())

        thread = threading.Thread(target=watch)
        thread.start()
        run()
        done.set()
        thread.join()
        print(json.dumps([total, largest, peak[0] - before]))
    """
    total, largest, used = json.loads(run_script(script, tmp_path, 14).splitlines()[-1])
    assert total > 40 * largest
    # A few pieces of four megabytes per worker, in float32 and encoded; and the allocator's slack.
    assert used < min(96 * 2**20, total / 5), (total, used)


MISSING = """
    import importlib.util, sys
    from pathlib import Path
    import gguf_tiny as tiny, qlora_kit
    from qlora_kit.errors import MissingDependencyError

    hidden, find_spec = set(), importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: (
        None if name in hidden else find_spec(name, *more))

    def hide(*names):
        for name in hidden:
            del sys.modules[name]
        hidden.clear()
        hidden.update(names)
        sys.modules.update(dict.fromkeys(names))

    folder = Path(sys.argv[1])
    base = tiny.save_checkpoint(
        tiny.make_model(tiny.make_config("llama")), tiny.byte_level_tokenizer(), folder / "base")
    model = qlora_kit.load_quantized(base, load_in_4bit=False, dtype="float32")
    model = qlora_kit.attach_lora(model, r=2)
    for names in (["gguf"], ["libggml", "xllamacpp"]):
        hide(*names)
        for format, options in (
            ("gguf", {}), ("gguf", {"quantization": "q4_k_m"}), ("gguf-lora", {}),
            ("gguf", {"verify": "full"}),
        ):
            try:
                qlora_kit.export_model(model, format, folder / "out", overwrite=True, **options)
                print("written")
            except MissingDependencyError as error:
                assert isinstance(error, ImportError)
                print(error)
        print([qlora_kit.get_exporter(name).find_missing() for name in ("gguf", "gguf-lora")])
        print(sorted(path.name for path in folder.iterdir()))
"""


def test_missing_packages_are_named_with_what_to_install(tmp_path):
    said = run_script(MISSING, tmp_path).splitlines()
    assert all("pip install 'qlora-kit[gguf]'" in line for line in said[:3])
    assert "pip install" in said[3]
    assert said[4].count("qlora-kit[gguf]") == 2
    assert said[5] == "['base']"
    # Without ggml only K-quants are out of reach, and without xllamacpp only the full check.
    assert said[6] == said[8] == "written"
    assert "libggml-python: pip install 'qlora-kit[gguf]'" in said[7]
    assert "pip install xllamacpp" in said[9]
    assert said[10] == "[[], []]"
