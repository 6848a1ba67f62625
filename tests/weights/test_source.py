"""Reading checkpoints: the same tensors as safetensors gives, without keeping them in memory."""

import json
import subprocess
import sys

import pytest

from qlora_kit.errors import ModelNotFoundError, UnsupportedModelError
from qlora_kit.weights.source import SafetensorsSource


def make_tensors():
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(37, 5, generator=generator),
        "half": torch.randn(37, 5, generator=generator).to(torch.float16),
        "brain": torch.randn(9, generator=generator).to(torch.bfloat16),
        "bytes": torch.arange(11, dtype=torch.uint8),
        "long": torch.arange(4),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }


def test_tensors_are_those_of_the_library(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = make_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsSource(tmp_path) as source:
        assert set(source.names()) == set(tensors)
        for _ in range(3):
            for name, tensor in tensors.items():
                loaded = source.load(name)
                assert loaded.dtype == tensor.dtype
                assert loaded.shape == tensor.shape == torch.Size(source.shape(name))
                assert torch.equal(loaded, tensor)
        assert torch.equal(source.load_rows("wide", 3, 9), tensors["wide"][3:9])


def test_a_tensor_that_is_kept_stays_what_it_was(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {str(i): torch.full((300, 300), float(i)) for i in range(12)}
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsSource(tmp_path) as source:
        kept = {name: source.load(name) for name in tensors}
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors)


def test_files_whose_tensors_are_not_aligned_are_read(tmp_path):
    import torch

    numbers = torch.arange(6, dtype=torch.float32)
    header = json.dumps({
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [3, 27]},
    }).encode()  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"\1\2\3" + numbers.numpy().tobytes()
    )
    with SafetensorsSource(tmp_path) as source:
        assert source.load("a").tolist() == [1, 2, 3]
        assert torch.equal(source.load("b"), numbers.view(2, 3))


def test_what_is_not_whole_is_refused(tmp_path):
    import torch
    from safetensors.torch import save_file

    with pytest.raises(ModelNotFoundError, match=r"holds no model\.safetensors"):
        SafetensorsSource(tmp_path)
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UnsupportedModelError, match="not a whole safetensors file"):
        SafetensorsSource(tmp_path)
    save_file({"a": torch.zeros(100)}, path)
    index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match=r"names 1 tensors that its files lack.*'b'"):
        SafetensorsSource(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs madvise")
def test_reading_a_file_does_not_leave_it_in_memory(tmp_path):
    """60 tensors of 4 MiB: the resident set grows by a few of them."""
    script = """
import sys, psutil, torch
from pathlib import Path
from safetensors.torch import save_file
from qlora_kit.weights.source import SafetensorsSource
folder = Path(sys.argv[1])
save_file({str(i): torch.ones(1024, 1024) for i in range(60)}, folder / "model.safetensors")
process, peak, total = psutil.Process(), 0, 0.0
with SafetensorsSource(folder) as source:
    source.load("0").sum()
    before = process.memory_info().rss
    for name in source.names():
        total += float(source.load(name).sum())
        peak = max(peak, process.memory_info().rss)
print(total, peak - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    total, extra = map(float, result.stdout.split())
    assert total == 60 * 1024 * 1024
    assert extra < 8 * 4 * 1024 * 1024
