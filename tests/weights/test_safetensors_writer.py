"""Writing shards: what safetensors reads back, from whose thread, and what stops it."""

import hashlib
import json
import threading

import pytest

from qlora_kit.artifacts.safetensors_writer import parse_size, plan_shards, write_tensors
from qlora_kit.errors import ConfigError, UnsupportedModelError


class Source:
    """Tensors in memory, counting what is asked for."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.asked = []

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype_of(self, name):
        return self.tensors[name].dtype

    def load(self, name):
        self.asked.append(name)
        return self.tensors[name]


@pytest.fixture
def source():
    import torch

    return Source({f"t{i}": torch.full((500, 250), float(i)) for i in range(12)})


def write(source, folder, progress=lambda *_: None, size="1MB"):
    return write_tensors(source, folder, max_shard_size=parse_size(size), progress=progress)


def test_shards_hold_the_tensors_and_hashes_are_those_of_the_files(source, tmp_path):
    import torch
    from safetensors.torch import load_file

    written = write(source, tmp_path)
    assert len(written.sha256) == 6
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(source.tensors)
    for file, digest in written.sha256.items():
        assert hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() == digest
        for name, tensor in load_file(tmp_path / file).items():
            assert index["weight_map"][name] == file
            assert torch.equal(tensor, source.tensors[name])
    assert sorted(source.asked) == sorted(source.tensors)


def test_every_tensor_is_aligned_and_the_order_is_kept_where_that_allows(tmp_path):
    import torch
    from safetensors.torch import load_file

    tensors = {
        "a": torch.arange(8, dtype=torch.uint8),
        "b": torch.arange(3, dtype=torch.uint8),
        "c": torch.arange(4, dtype=torch.float32),
        "d": torch.arange(5, dtype=torch.bfloat16),
        "e": torch.arange(3, dtype=torch.float32),
    }
    source = Source(tensors)
    write(source, tmp_path)
    assert source.asked == ["a", "c", "e", "d", "b"]
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors[name].dtype.itemsize == 0
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_progress_comes_from_the_callers_thread_and_ends_at_the_total(source, tmp_path):
    calls = []
    write(source, tmp_path, lambda *call: calls.append((*call, threading.current_thread())))
    assert {thread for *_, thread in calls} == {threading.current_thread()}
    sizes = [done for _, done, _, _ in calls]
    assert sizes == sorted(sizes)
    assert sizes[-1] == calls[-1][2] == 12 * 500 * 250 * 4


def test_an_error_in_one_shard_stops_the_others_and_is_the_one_raised(source, tmp_path):
    first = source.load

    def fail(name):
        if name == "t3":
            raise UnsupportedModelError("t3 is broken")
        return first(name)

    source.load = fail
    with pytest.raises(UnsupportedModelError, match="t3 is broken"):
        write(source, tmp_path)
    assert "t11" not in source.asked


def test_an_interruption_stops_the_writing(source, tmp_path):
    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path, interrupt)
    assert "t11" not in source.asked
    assert not [t for t in threading.enumerate() if t.name.startswith("qlora-kit")]


def test_a_tensor_that_is_not_what_was_announced_is_refused(source, tmp_path):
    import torch

    source.load = lambda name: torch.zeros(3)
    with pytest.raises(UnsupportedModelError, match=r"t0 was announced as \(500, 250\)"):
        write(source, tmp_path, size="1GB")


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(source):
    assert plan_shards(source, 1) == [[name] for name in source.names()]
    assert plan_shards(source, 10**9) == [source.names()]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MiB", 500 * 2**20), ("1.5 gb", 1.5e9), (2_000_000, 2_000_000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "10", True, "1KB"])
def test_wrong_sizes(text):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)
