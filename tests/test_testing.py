"""The contract test: built-ins keep every promise, and each broken one is noticed and said."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qlora_kit import Check, ExportEstimate, Verification, get_exporter
from qlora_kit.options import COLLECTS_UNKNOWN
from qlora_kit.plugins import ExporterRegistry
from qlora_kit.testing import ContractError, check_exporter, make_tiny_model
from qlora_kit.testing.snapshots import fingerprint_model

BUILTINS = [
    name
    for name in ExporterRegistry(use_entry_points=False).names()
    if getattr(get_exporter(name), "needs_path", True)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("contract") / "base")


@pytest.mark.parametrize("name", BUILTINS)
def test_every_built_in_that_writes_files_keeps_every_promise(name):
    assert len(check_exporter(get_exporter(name))) == 13


@pytest.mark.parametrize("name", ["lora", "merged_16bit"])
def test_also_over_an_unquantized_base(name, tmp_path):
    check_exporter(get_exporter(name), model=make_tiny_model(tmp_path, load_in_4bit=False))


@dataclass(frozen=True)
class Options:
    level: int = 1


class Raw:
    """Writes the adapter's bytes: a format that keeps every promise."""

    name = "raw"
    summary = "The adapter's bytes."
    options_type = Options

    def check(self, request):
        return ExportEstimate(100_000)

    def write(self, request, folder):
        (folder / "raw.bin").write_bytes(self.read(request))
        request.progress("writing", 1, 1)
        return {"level": 1}

    def verify(self, request, folder):
        same = (folder / "raw.bin").read_bytes() == self.read(request)
        return Verification("standard", (Check("bytes", same, "compared all"),))

    def read(self, request):
        parameters = request.model.model.parameters()
        return b"".join(p.detach().cpu().numpy().tobytes() for p in parameters if p.requires_grad)


def test_a_good_exporter_passes_and_the_model_is_put_back(tiny):
    before, here, temporary = fingerprint_model(tiny), Path.cwd(), tempfile.gettempdir()
    promises = check_exporter(Raw(), model=tiny)
    assert len(set(promises)) == len(promises) == 13
    assert fingerprint_model(tiny) == before
    assert Path.cwd() == here
    assert tempfile.gettempdir() == temporary


class ChecksWithAFile(Raw):
    def check(self, request):
        request.destination.parent.joinpath("lock").write_text("")
        return super().check(request)


class ChecksWithTheModel(Raw):
    def check(self, request):
        request.model.model.train(not request.model.model.training)
        return super().check(request)


class EstimatesText(Raw):
    def check(self, request):
        return ExportEstimate("10 GB")


class WritesElsewhere(Raw):
    def write(self, request, folder):
        Path("log.txt").write_text("")
        return super().write(request, folder)


class LeavesATemporaryFile(Raw):
    def write(self, request, folder):
        tempfile.mkdtemp()
        return super().write(request, folder)


class MergesInPlace(Raw):
    def write(self, request, folder):
        facts = super().write(request, folder)
        next(p for p in request.model.model.parameters() if p.requires_grad).data.mul_(2)
        return facts

    def verify(self, request, folder):
        return Verification("standard", (Check("bytes", True, "not looked"),))


class WritesBesideTheStage(Raw):
    def write(self, request, folder):
        facts = super().write(request, folder)
        request.destination.mkdir(exist_ok=True)
        (request.destination / "raw.bin").write_bytes(self.read(request))
        return facts


class ComparesNothing(Raw):
    def verify(self, request, folder):
        return Verification("none")


class BelievesItself(Raw):
    def verify(self, request, folder):
        return Verification("standard", (Check("size", True, "there is a file"),))


class ComparesSizes(Raw):
    def verify(self, request, folder):
        same = (folder / "raw.bin").stat().st_size == len(self.read(request))
        return Verification("standard", (Check("size", same, "as many bytes"),))


class NeverMatches(Raw):
    def verify(self, request, folder):
        return Verification("standard", (Check("bytes", False, "7 of 9 differ"),))


class SaysNothing(Raw):
    def verify(self, request, folder):
        return Verification(
            "standard", (Check("bytes", super().verify(request, folder).passed, ""),)
        )


class HashesWrongly(Raw):
    def write(self, request, folder):
        return {**super().write(request, folder), "sha256": {"raw.bin": "0" * 64}}


class StatesObjects(Raw):
    def write(self, request, folder):
        return {**super().write(request, folder), "folder": folder}


class Stamps(Raw):
    def write(self, request, folder):
        facts = super().write(request, folder)
        (folder / "stamp").write_text(str(id(object())) + tempfile.mkdtemp(dir=folder)[-8:])
        return facts


class NeedsSharing(Raw):
    def write(self, request, folder):
        return {**super().write(request, folder), "merges": request.shared.merges}


class IgnoresTheAdapter(Raw):
    def read(self, request):
        return b"the base" * 1000


class SwallowsErrors(Raw):
    def write(self, request, folder):
        try:
            return super().write(request, folder)
        except Exception:
            return {}


class Shapeless(Raw):
    name = "Raw format"
    summary = "Two\nlines"


class Missing(Raw):
    def find_missing(self):
        return ["the frob tool: pip install frob"]


@dataclass
class Loose:
    level: int = 1
    api_key: str | None = None
    made: object = field(default_factory=object)


class HasLooseOptions(Raw):
    options_type = Loose


@dataclass(frozen=True)
class Greedy:
    rest: Mapping = field(default_factory=dict, metadata={COLLECTS_UNKNOWN: True})


class TakesEverything(Raw):
    options_type = Greedy


BREAKING = {
    ChecksWithAFile: ["It touched lock."],
    ChecksWithTheModel: ["It changed the model: ", "training"],
    EstimatesText: ["returned an unusable estimate"],
    WritesElsewhere: ["stays in its folder", "It touched cwd/log.txt."],
    LeavesATemporaryFile: ["It touched tmp/"],
    MergesInPlace: ["It changed the model: base_model", "lora_A"],
    WritesBesideTheStage: ["filled by something else"],
    ComparesNothing: ["verify() returned no check: nothing was compared."],
    BelievesItself: [
        "raw.bin missing", "raw.bin cut in half", "raw.bin inverted in its middle quarter",
        "raw.bin replaced by another adapter's",
    ],
    ComparesSizes: ["raw.bin inverted in its middle quarter", "raw.bin replaced by another adap"],
    NeverMatches: ["VerificationError", "7 of 9 differ"],
    SaysNothing: ["These checks have no detail: bytes."],
    HashesWrongly: ["Size or sha256 is not the file's own: raw.bin"],
    StatesObjects: ["JSON cannot hold what write() returned: ", "PosixPath"],
    Stamps: ["stamp differ"],
    NeedsSharing: ["'NoneType' object has no attribute 'merges'"],
    IgnoresTheAdapter: ["With another adapter, every file is the same."],
    SwallowsErrors: ["The destination exists although progress() raised."],
    Shapeless: ["no usable name (got 'Raw format'", "has a summary that is not one line"],
    Missing: ["cannot be tested on this machine: the frob tool: pip install frob"],
    HasLooseOptions: [
        "Loose is not frozen: @dataclass(frozen=True)",
        "api_key looks like a secret; declare it with field(repr=False)",
        "A manifest cannot hold made=<object object at",
    ],
    TakesEverything: ["rest_=1 is accepted"],
}  # fmt: skip


@pytest.mark.parametrize("kind", BREAKING, ids=lambda kind: kind.__name__)
def test_each_broken_promise_is_noticed_and_only_that(kind, tmp_path):
    # Some of them change the model.
    with pytest.raises(ContractError) as caught:
        check_exporter(kind(), model=make_tiny_model(tmp_path, load_in_4bit=False))
    assert len(caught.value.broken) == 1, str(caught.value)
    for phrase in BREAKING[kind]:
        assert phrase in str(caught.value)


def test_what_is_broken_is_listed_together(tiny):
    class Careless(BelievesItself, HashesWrongly, StatesObjects):
        pass

    with pytest.raises(ContractError) as caught:
        check_exporter(Careless(), model=tiny)
    assert len(caught.value.broken) == 3
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "Exporter 'raw' (test_testing.test_what_is_broken_is_listed_together.<locals>.Careless) "
        "breaks 3 of the 13 promises checked:"
    )
    assert lines[1] == "  1. The artifact lists every file with its size and sha256."
    assert isinstance(caught.value, AssertionError)


@dataclass(frozen=True)
class Signing:
    key_name: str
    signing_secret: str = field(repr=False)


class Signs(Raw):
    """Needs options and keeps its secret."""

    options_type = Signing

    def write(self, request, folder):
        (folder / "signature").write_text(str(hash(request.options.signing_secret) % 7 * 0))
        return super().write(request, folder)


class Leaks(Signs):
    place = "file"

    def write(self, request, folder):
        import logging

        facts = super().write(request, folder)
        secret = request.options.signing_secret
        if self.place == "file":
            (folder / "config.json").write_text(f'{{"secret": "{secret}"}}')
        elif self.place == "facts":
            facts["secret"] = secret
        else:
            logging.getLogger("anything").debug("signing with %s", secret)
        return facts


def test_options_can_be_given_and_secrets_are_looked_for(tiny):
    options = {"key_name": "k", "signing_secret": "hush-1f0e"}
    check_exporter(Signs(), options=options, model=tiny)
    for place, seen in [
        ("file", "is in config.json"), ("facts", "is in the manifest"), ("log", "is in the log")
    ]:  # fmt: skip
        leaking = Leaks()
        leaking.place = place
        with pytest.raises(ContractError) as caught:
            check_exporter(leaking, options=options, model=tiny)
        assert len(caught.value.broken) == 1
        assert f"The value of signing_secret {seen}." in str(caught.value)
        assert "hush-1f0e" not in str(caught.value)
    with pytest.raises(ContractError, match=r"needs key_name=\.\.\., signing_secret=\.\.\.\."):
        check_exporter(Signs(), model=tiny)


def test_a_format_without_a_path_is_held_to_the_rest(tiny):
    sent = []

    class Sends(Raw):
        needs_path = False

        def write(self, request, folder):
            sent.append(self.read(request))
            assert list(folder.iterdir()) == []
            return {"url": "https://example.org/model"}

        def verify(self, request, folder):
            return Verification("standard", (Check("b", sent[-1] == self.read(request), "all"),))

    assert len(check_exporter(Sends(), model=tiny)) == 8
    assert len(sent) == 1


def test_a_format_that_differs_each_time_may_say_so(tiny):
    with pytest.raises(ContractError, match="is_deterministic=False allows it"):
        check_exporter(Stamps(), model=tiny)


def test_the_hub_keeps_the_promises_that_are_not_about_files(tiny, monkeypatch, tmp_path):
    endpoint = pytest.importorskip("hub_endpoint")
    from huggingface_hub import constants

    from qlora_kit import export_model

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with endpoint.HubEndpoint() as hub:
        options = {"repo_id": "me/model", "token": endpoint.GOOD_TOKEN, "endpoint": hub.url}
        check_exporter(get_exporter("hub"), options={**options, "format": "lora"}, model=tiny)
        # Beside formats that need a folder, it takes none.
        results = export_model(tiny, ["lora", "hub"], tmp_path, format="lora", **options)
        results.raise_for_failures()
        assert [path.name for path in tmp_path.iterdir()] == ["lora"]
        assert results["hub"].path is None
