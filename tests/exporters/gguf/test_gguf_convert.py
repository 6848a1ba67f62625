"""Writing: failures leave nothing, memory is bounded, the model answers as it did."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest

import gguf_tiny as tiny
from gguf_llamacpp import Llama, kl_divergence
from qlora_kit.errors import ConfigError, DiskSpaceError, ExportError
from qlora_kit.exporters.gguf.conversion.file_plan import plan_conversion
from qlora_kit.exporters.gguf.conversion.file_writer import convert
from qlora_kit.exporters.gguf.quantization.recipes import RECIPES
from qlora_kit.exporters.gguf.tokenizer.probe_texts import list_probe_texts
from qlora_kit.exporters.gguf.verification.file_checks import check_files
from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile
from qlora_kit.weights.source import SafetensorsSource

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny.make_model(tiny.make_config("qwen3", num_hidden_layers=3))
    tiny.save_checkpoint(model, tiny.byte_level_tokenizer(), folder)
    return folder


def run(checkpoint, folder, source=None, **options):
    config = json.loads((checkpoint / "config.json").read_text())
    with SafetensorsSource(checkpoint) as plain:
        return convert(
            source or plain, config, tiny.byte_level_tokenizer(), Path(folder), **options
        )


class Watched:
    """A source that counts what is alive, and can fail on the way."""

    def __init__(self, inner, fail_at=None, error=None):
        self.inner, self.fail_at, self.error = inner, fail_at, error
        self.loaded, self.alive, self.most = 0, [], 0

    def names(self):
        return self.inner.names()

    def shape(self, name):
        return self.inner.shape(name)

    def load(self, name):
        self.loaded += 1
        if self.loaded == self.fail_at:
            raise self.error
        self.alive = [reference for reference in self.alive if reference() is not None]
        tensor = self.inner.load(name).clone()
        self.alive.append(weakref.ref(tensor.untyped_storage()))
        self.most = max(self.most, sum(reference() is not None for reference in self.alive))
        return tensor


def test_several_types_read_every_tensor_once(checkpoint, tmp_path):
    with SafetensorsSource(checkpoint) as inner:
        source = Watched(inner)
        done = run(checkpoint, tmp_path, source, quantization=["f16", "q8_0", "q4_k_m"])
        assert source.loaded == len(inner.names())
    for name, path in done.files.items():
        alone = tmp_path / f"alone-{name}"
        alone.mkdir()
        assert run(checkpoint, alone, quantization=name).files[name].read_bytes() == (
            path.read_bytes()
        )


@pytest.mark.parametrize("way", ["in places", "in short pieces", "one at a time"])
def test_how_bytes_reach_the_disk_changes_none(way, checkpoint, tmp_path, monkeypatch):
    """Systems write less than they were given, and Windows has no ``pwrite``."""
    names = ["f32", "bf16", "q8_0"]
    first = run(checkpoint, tmp_path, quantization=names, threads=1).files
    if way == "one at a time":
        monkeypatch.delattr(os, "pwrite", raising=False)
    elif way == "in short pieces":
        whole = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:1001], at))
    (tmp_path / "b").mkdir()
    other = run(checkpoint, tmp_path / "b", quantization=names, threads=3).files
    for name in names:
        assert other[name].read_bytes() == first[name].read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_byte(threads, checkpoint, tmp_path):
    first = run(checkpoint, tmp_path, quantization="q4_k_m", threads=2).files["q4_k_m"].read_bytes()
    (tmp_path / "b").mkdir()
    other = run(checkpoint, tmp_path / "b", quantization="q4_k_m", threads=threads)
    assert other.files["q4_k_m"].read_bytes() == first


def test_tensors_are_let_go_of(checkpoint, tmp_path):
    gc.collect()
    with SafetensorsSource(checkpoint) as inner:
        source = Watched(inner)
        run(checkpoint, tmp_path, source, quantization=["f32", "q8_0"], threads=1)
        count = len(inner.names())
    # Pieces waiting to be encoded keep their tensor: at most eight of them, here one each.
    assert source.most <= 9 < count


def test_progress_counts_tensors(checkpoint, tmp_path):
    seen = []
    run(checkpoint, tmp_path, progress=lambda *said: seen.append(said))
    assert seen[-1][1] == seen[-1][2] == len(seen)
    assert {what for what, _, _ in seen} == {"writing GGUF"}


@pytest.mark.parametrize(
    "error", [RuntimeError("the merge failed"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")]
)
def test_a_failure_in_the_middle_leaves_no_file(error, checkpoint, tmp_path):
    with SafetensorsSource(checkpoint) as inner, pytest.raises(type(error)):
        run(checkpoint, tmp_path, Watched(inner, 9, error), quantization=["f16", "q8_0"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_with_what_is_needed(checkpoint, tmp_path):
    (tmp_path / "model.Q8_0.gguf").symlink_to("/dev/full")
    with pytest.raises(DiskSpaceError, match="GiB"):
        run(checkpoint, tmp_path, quantization=["f16", "q8_0"])
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_file_size_leaves_no_file(checkpoint, tmp_path):
    """The system's own limit: the write fails half way."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            run(checkpoint, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_conversion_leaves_a_file_that_nothing_takes_for_whole(checkpoint, tmp_path):
    """The stage around an exporter removes it; here it must at least not load or verify."""
    script = textwrap.dedent(f"""
        import json, os, signal, sys
        sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})
        import gguf_tiny as tiny
        from pathlib import Path
        from qlora_kit.exporters.gguf.conversion.file_writer import convert
        from qlora_kit.weights.source import SafetensorsSource
        folder = Path({str(checkpoint)!r})
        config = json.loads((folder / "config.json").read_text())
        def die(what, done, total):
            if done == total // 2:
                os.kill(os.getpid(), signal.SIGKILL)
        convert(SafetensorsSource(folder), config, tiny.byte_level_tokenizer(),
                Path({str(tmp_path)!r}), progress=die)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL
    path = tmp_path / "model.Q8_0.gguf"
    assert path.is_file()
    with pytest.raises(ExportError, match="read back"):
        GgufFile(path)
    with pytest.raises(RuntimeError, match="did not load"):
        Llama(path)


def test_verification_reads_the_file_and_not_the_plan(checkpoint, tmp_path):
    done = run(checkpoint, tmp_path, quantization=["q8_0", "q4_k_m"])
    config = json.loads((checkpoint / "config.json").read_text())
    files = [(RECIPES[name], [path]) for name, path in done.files.items()]
    with SafetensorsSource(checkpoint) as source:
        checks = check_files(files, done.plan, source, tiny.byte_level_tokenizer())
        assert [check.passed for check in checks] == [True] * 4, checks
        assert max(check.value for check in checks) > 0.3, "the tolerances would pass anything"
        # One damaged row of one tensor is found, and named.
        tensor = GgufFile(done.files["q4_k_m"]).tensors["blk.1.ffn_down.weight"]
        with done.files["q4_k_m"].open("r+b") as file:
            file.seek(int(tensor.data_offset))
            file.write(b"\x55" * int(tensor.data.shape[-1]))
        checks = check_files(files, done.plan, source, tiny.byte_level_tokenizer())
        assert [check.passed for check in checks] == [True, True, False, True]
        assert "blk.1.ffn_down.weight" in checks[2].detail
        # A plan of another type does not fit the file.
        other = plan_conversion(source, config, quantization="q5_k_m")
        wrong = [(RECIPES["q5_k_m"], [done.files["q8_0"]])]
        assert not check_files(wrong, other, source, tiny.byte_level_tokenizer())[0].passed


def test_the_size_is_known_before(checkpoint, tmp_path):
    done = run(checkpoint, tmp_path, quantization=["f32", "f16", "q8_0", "q4_k_m", "iq4_xs"])
    for name, path in done.files.items():
        file = GgufFile(path)
        start = min(int(tensor.data_offset) for tensor in file.tensors.values())
        assert path.stat().st_size == start + done.plan.data_bytes(RECIPES[name])


def test_unknown_types_are_refused_before_the_model_is_looked_at(tmp_path):
    with pytest.raises(ConfigError, match="q4_k_m"):
        convert(None, {}, None, tmp_path, quantization="q4_km")


def test_smollm2_answers_in_llama_cpp_as_in_transformers(smollm2_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    with SafetensorsSource(folder) as source:
        done = convert(source, config, tokenizer, tmp_path, quantization=["f16", "q8_0", "q4_k_m"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer("The capital of Italy is")["input_ids"]
    ids = tokenizer(
        "The capital of France is Paris. The capital of Italy is Rome. Water boils at 100 degrees."
    )["input_ids"]
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0].numpy()
    for name, limit in (("f16", 1e-5), ("q8_0", 0.02), ("q4_k_m", 0.2)):
        with Llama(done.files[name]) as llama:
            assert tokenizer.decode(llama.greedy(prompt, 1)) == " Rome"
            assert kl_divergence(right, llama.logits(ids)).mean() < limit
            if name == "f16":
                wrong = [
                    text
                    for text in list_probe_texts()
                    if llama.tokenize(text)
                    != tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
                ]
                assert not wrong
                assert llama.is_end(tokenizer.eos_token_id)
