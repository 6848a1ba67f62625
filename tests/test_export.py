"""The export stage: all or nothing, several formats, wrong arguments, full disks."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import qlora_kit.export.job
from checkpoints import randomize
from qlora_kit import (
    Check,
    ExportEstimate,
    available_exporters,
    export_model,
    get_exporter,
    hookimpl,
    plugins,
    private_folders,
)
from qlora_kit.artifacts import staging
from qlora_kit.errors import (
    ConfigError,
    DestinationExistsError,
    DiskSpaceError,
    ExportError,
    UnknownOptionError,
    VerificationError,
)
from qlora_kit.exporters.lora import Lora
from qlora_kit.exporters.merged_16bit import Merged16bit, Merged16bitOptions
from qlora_kit.file_locks import take_lock
from qlora_kit.results import Verification
from qlora_kit.weights.shared_merge import SharedMerge


def test_formats_are_listed_and_unknown_ones_get_the_nearest_name(adapted, tmp_path):
    names = available_exporters()
    assert names == sorted(names)
    assert {"lora", "merged_16bit"} <= set(names)
    assert get_exporter("lora").name == "lora"
    with pytest.raises(ConfigError, match=r"named 'merged_16bits'\. Did you mean 'merged_16bit'"):
        export_model(adapted, "merged_16bits", tmp_path / "out")


def test_arguments_are_checked_first(adapted, tmp_path):
    with pytest.raises(ConfigError, match="got str"):
        export_model("outputs/checkpoint-60", "lora", tmp_path / "out")
    with pytest.raises(ConfigError, match="verify must be True, False or 'full', got 'yes'"):
        export_model(adapted, "lora", tmp_path / "out", verify="yes")
    with pytest.raises(ConfigError, match="overwrite must be True or False, got 'no'"):
        export_model(adapted, "lora", tmp_path / "out", overwrite="no")
    with pytest.raises(ConfigError, match="progress must be a function"):
        export_model(adapted, "lora", tmp_path / "out", progress=True)
    with pytest.raises(ConfigError, match="needs a path"):
        export_model(adapted, "lora")
    with pytest.raises(UnknownOptionError, match=r"no option 'merge'\. Its options: none"):
        export_model(adapted, "lora", tmp_path / "out", merge=True)
    assert list(tmp_path.iterdir()) == []


def test_a_filled_destination_needs_overwrite_and_only_an_export_is_replaced(adapted, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_model(adapted, "lora", out, verify=False)
    (out / ".DS_Store").write_text("")
    with pytest.raises(DestinationExistsError, match=r"already holds 9 files.*overwrite=True"):
        export_model(adapted, "lora", out, verify=False)
    export_model(adapted, "lora", out, verify=False, overwrite=True)
    assert not (out / ".DS_Store").exists()
    (out / "notes.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "qlora_kit_manifest.json").write_text('{"kind": "training", "files": []}')
    for folder, name in ((out, "notes.txt"), (tmp_path, "out"), (out.parent / "run", "qlora_kit")):
        with pytest.raises(DestinationExistsError, match=f"no export put there: {name}"):
            export_model(adapted, "lora", folder, verify=False, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_place_that_is_lost_meanwhile_fails_one_format(adapted, tmp_path, monkeypatch):
    write = Merged16bit.write

    def fill(self, request, folder):
        monkeypatch.setattr(staging, "clean_leftovers", refuse)
        return write(self, request, folder)

    def refuse(destination):
        raise PermissionError(13, "Permission denied", str(destination))

    monkeypatch.setattr(Merged16bit, "write", fill)
    results = export_model(adapted, ["lora", "merged_16bit"], tmp_path / "out", verify=False)
    assert list(results) == ["merged_16bit"]
    assert isinstance(results.failures["lora"], ExportError)
    assert "found no place to write to: PermissionError" in str(results.failures["lora"])


def test_an_error_half_way_leaves_the_destination_as_it_was(adapted, tmp_path, monkeypatch):
    export_model(adapted, "lora", tmp_path / "out", verify=False)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    write = Lora.write

    def fail(self, request, folder):
        write(self, request, folder)
        raise ZeroDivisionError("half-way")

    monkeypatch.setattr(Lora, "write", fail)
    with pytest.raises(ExportError, match=r"'lora' \(plugin .* of qlora-kit\) failed in write"):
        export_model(adapted, "lora", tmp_path / "out", overwrite=True)

    def interrupt(self, request, folder):
        write(self, request, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(Lora, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_model(adapted, "lora", tmp_path / "out", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_destination_filled_meanwhile_is_not_overwritten(adapted, tmp_path, monkeypatch):
    write = Lora.write

    def fill(self, request, folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("kept")
        return write(self, request, folder)

    monkeypatch.setattr(Lora, "write", fill)
    for overwrite in (False, True):
        with pytest.raises(DestinationExistsError, match="by something else during the export"):
            export_model(adapted, "lora", tmp_path / "out", verify=False, overwrite=overwrite)
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["theirs"]
        shutil.rmtree(tmp_path / "out") if not overwrite else None
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_atomic_exchange_the_old_folder_is_moved_aside(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    export_model(adapted, "lora", tmp_path / "out", verify=False)
    manifest = tmp_path / "out" / "qlora_kit_manifest.json"
    before = json.loads(manifest.read_text())["files"]
    export_model(adapted, "lora", tmp_path / "out", verify=False, overwrite=True)
    assert json.loads(manifest.read_text())["files"] == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # As a run leaves it that died between its two renames.
    (tmp_path / "out").rename(tmp_path / ".out.qlora_kit-0a0b0c0d.previous")
    (tmp_path / ".out.qlora_kit-0a0b0c0d.partial").mkdir()
    with pytest.raises(DestinationExistsError):
        export_model(adapted, "lora", tmp_path / "out", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(adapted, tmp_path):
    dead = tmp_path / ".out.qlora_kit-11111111.partial"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    other = tmp_path / ".other.qlora_kit-22222222.partial"
    other.mkdir()
    with staging.stage_folder(tmp_path / "out") as living:
        assert not dead.exists()
        export_model(adapted, "lora", tmp_path / "out", verify=False)
        assert living.folder.exists()
        assert other.exists()
    assert not living.folder.exists()


def test_a_staging_folder_is_locked_before_it_can_be_seen(tmp_path, monkeypatch):
    mkdir, seen = Path.mkdir, []

    def mkdir_and_be_seen(path, *args, **kwargs):
        if path.name.endswith(".partial"):
            seen.append(private_folders.is_abandoned(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir_and_be_seen)
    with staging.stage_folder(tmp_path / "out") as staged:
        assert seen == [False]
        assert not private_folders.is_abandoned(staged.folder)
    assert list(tmp_path.iterdir()) == []


def test_locks_that_dead_runs_left_are_removed(tmp_path):
    (tmp_path / ".out.qlora_kit-11111111.lock").write_text("")
    living = take_lock(tmp_path / ".out.qlora_kit-22222222.lock")
    staging.clean_leftovers(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == [".out.qlora_kit-22222222.lock"]
    living.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_destination_is_absent_old_or_whole(tmp_path):
    rounds = 36
    script = Path(__file__).parent / "helpers" / "killing.py"
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(rounds)],
        capture_output=True, text=True, timeout=300, check=False,
        # On the CPU everywhere: CUDA does not survive a fork.
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert len(report["seen"]) == rounds
    for before, tried, after in report["seen"]:
        assert after in (before, tried)
    # The kills really came before, during and after the writing.
    outcomes = Counter(after == tried for _, tried, after in report["seen"])
    assert min(outcomes[True], outcomes[False]) >= 3
    # And before every flush, rename and removal, into an empty place and over an old export.
    names = [name for name, *_ in report["steps"]]
    assert names.count("fsync") >= 16
    assert {"rename", "_exchange", "rmtree"} <= set(names)
    assert len(names) < 100
    for _, before, tried, after in report["steps"]:
        assert after in (before, tried)
    assert {before == after for _, before, _, after in report["steps"]} == {True, False}
    assert report["rounds_with_leftovers"] >= 5
    assert report["most_leftovers"] == 1
    assert report["rest"] == ["merged"]
    assert report["last"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_killed_pushes_and_dequantizings_left_is_removed_by_the_next_one(tmp_path):
    script = Path(__file__).parent / "helpers" / "leftovers.py"
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "20"],
        capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    for found in json.loads(result.stdout.splitlines()[-1]).values():
        assert found["left_something"] >= 3
        assert found["left_in_the_end"] == []


def test_a_full_disk_is_seen_before_anything_is_written(adapted, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr(qlora_kit.export.job.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskSpaceError, match=r"needs 32\.\d MiB in .* which has 9\.5 MiB free"):
        export_model(adapted, "merged_16bit", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["lora", "merged_16bit", "merged_4bit"])
def test_a_disk_that_fills_up_leaves_the_old_export(adapted, tmp_path, format):
    """The system refuses to let files grow past a limit, as a full disk would."""
    out = tmp_path / "out"
    export_model(adapted, format, out, verify=False)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        with pytest.raises(DiskSpaceError, match=r"became full.*needs 3\d\.\d MiB.*as it was"):
            export_model(adapted, format, out, verify=False, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(make_disk):
    return make_disk("40m")


@pytest.mark.parametrize("format", ["lora", "merged_16bit", "merged_4bit"])
def test_a_real_disk_that_something_else_fills_up(adapted, small_disk, monkeypatch, format):
    out = small_disk / "out"
    export_model(adapted, format, out, verify=False)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    exporter = type(get_exporter(format))
    write = exporter.write

    def fill_first(self, request, folder):
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            left = os.statvfs(small_disk)
            file.write(bytes(left.f_bavail * left.f_frsize - 40_000))
        return write(self, request, folder)

    monkeypatch.setattr(exporter, "write", fill_first)
    with pytest.raises(DiskSpaceError, match=r"became full.*it needs 3\d\.\d MiB.*as it was"):
        export_model(adapted, format, out, verify=False, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "out"]
    # And now that it is full, this is said before anything is written.
    with pytest.raises(DiskSpaceError, match=r"needs 3\d\.\d MiB in .* which has 0\.\d MiB free"):
        export_model(adapted, format, small_disk / "other", verify=False)


def test_progress_is_told(adapted, tmp_path):
    calls = []
    export_model(
        adapted, "merged_16bit", tmp_path / "out", verify=False,
        progress=lambda what, done, total: calls.append((what, done, total)),
    )  # fmt: skip
    assert {what for what, _, _ in calls} == {"writing tensors"}
    assert calls[-1][1] == calls[-1][2]
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_verify_false_compares_nothing_and_says_so(adapted, tmp_path):
    artifact = export_model(adapted, "lora", tmp_path / "out", verify=False)
    assert artifact.verification == Verification("none")
    assert artifact.manifest["verification"]["level"] == "none"


@pytest.fixture
def merges(monkeypatch):
    """How often each call merged."""
    made = []

    class Counting(SharedMerge):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(qlora_kit.export, "SharedMerge", Counting)
    return made


def test_several_formats_merge_once_and_give_the_same_files_as_alone(adapted, tmp_path):
    from qlora_kit.weights import merged

    formats = ["merged_4bit", "lora", "merged_16bit"]
    made = []
    real = merged.MergedWeights.merge
    merged.MergedWeights.merge = lambda self, live: (made.append(live.name), real(self, live))[1]
    try:
        results = export_model(adapted, formats, tmp_path / "out", base="original", verify=False)
    finally:
        merged.MergedWeights.merge = real
    assert list(results) == formats
    assert not results.failures
    assert Counter(made).most_common(1)[0][1] == 1
    assert results["lora"].path == tmp_path / "out" / "lora"
    for name in formats:
        options = {} if name == "lora" else {"base": "original"}
        alone = export_model(adapted, name, tmp_path / "alone" / name, verify=False, **options)
        for one, other in zip(alone.files, results[name].files, strict=True):
            if one.name != "qlora_kit_manifest.json":
                assert one == other


def test_one_failing_format_does_not_lose_the_others(adapted, tmp_path, monkeypatch, caplog):
    def fail(self, request, folder):
        raise VerificationError("broken on purpose")

    monkeypatch.setattr(Lora, "verify", fail)
    results = export_model(adapted, ["lora", "merged_16bit"], tmp_path / "out")
    assert list(results) == ["merged_16bit"]
    assert list(results.failures) == ["lora"]
    assert isinstance(results.failures["lora"], VerificationError)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged_16bit"]
    # The failure is hard to miss.
    assert "Export 'lora' failed: broken on purpose" in caplog.text
    assert repr(results).splitlines() == [
        "1 of 2 formats exported",
        f"  merged_16bit: {tmp_path / 'out' / 'merged_16bit'}",
        "  lora FAILED: VerificationError: broken on purpose",
    ]
    with pytest.raises(ExportError, match="1 of 2 formats exported") as caught:
        results.raise_for_failures()
    assert caught.value.__cause__ is results.failures["lora"]
    with pytest.raises(KeyError, match="format 'lora' failed: broken on purpose"):
        results["lora"]
    with pytest.raises(KeyError, match="'gguf'"):
        results["gguf"]
    assert "lora" not in results
    assert results.get("lora") is None
    export_model(adapted, ["merged_16bit"], tmp_path / "ok", verify=False).raise_for_failures()


def test_the_command_line_shows_failures_in_its_exit_status(
    tiny_llama, tmp_path, monkeypatch, capsys
):
    from qlora_kit.cli import main

    # This base has no adapter, which one of the two formats needs.
    arguments = ["export", str(tiny_llama), "lora,merged_16bit", str(tmp_path / "out")]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith(f"merged_16bit: {tmp_path / 'out' / 'merged_16bit'}, ")
    assert shown.err.splitlines()[-1].startswith(
        "lora FAILED: UnsupportedModelError: This model has no adapter to write. Train one with "
    )
    assert main(["export", str(tiny_llama), "merged_16bit", str(tmp_path / "one")]) == 0
    # A wrong name is said before the model is loaded.
    monkeypatch.setattr("qlora_kit.load_quantized", None)
    assert main(["export", str(tiny_llama), "merged_16bit,lore", str(tmp_path / "two")]) == 1
    assert "Did you mean 'lora'?" in capsys.readouterr().err


def test_everything_is_checked_before_anything_is_written(adapted, tmp_path, monkeypatch):
    def refuse(self, request, folder=None):
        raise AssertionError("no format may be touched")

    monkeypatch.setattr(Merged16bit, "check", refuse)
    monkeypatch.setattr(Merged16bit, "write", refuse)
    out = tmp_path / "out"

    def fails(error, match, formats, path=out, **options):
        with pytest.raises(error, match=match):
            export_model(adapted, formats, path, **options)
        assert list(tmp_path.iterdir()) == []

    both = ["merged_16bit", "lora"]
    fails(ConfigError, "named 'lorra'. Did you mean 'lora'", ["merged_16bit", "lorra"])
    fails(
        UnknownOptionError,
        r"None of the formats merged_16bit, lora has an option 'dtyp'\. Did you mean 'dtype'\?",
        both, dtyp="float16",
    )  # fmt: skip
    fails(UnknownOptionError, r"'lora' has no option 'x'", {"merged_16bit": {}, "lora": {"x": 1}})
    fails(ConfigError, r"merged_16bit.: dtype must be .*, got 'int4'", both, dtype="int4")
    fails(ConfigError, "need a path", both, path=None)
    fails(ConfigError, "No format given", [])
    fails(ConfigError, "'lora' has None", {"lora": None})
    fails(ConfigError, "format must be a name, a list", None)
    out.mkdir()
    (out / "lora").mkdir()
    (out / "lora" / "mine").write_text("")
    with pytest.raises(DestinationExistsError):
        export_model(adapted, both, out)
    assert [path.name for path in out.iterdir()] == ["lora"]


def test_options_of_several_formats(adapted, tmp_path):
    results = export_model(
        adapted,
        {"lora": {}, "merged_16bit": {"base": "dequantized"}},
        tmp_path / "out",
        dtype="float16",
        base="original",
        verify=False,
    )
    # A format's own options come before those given for all.
    assert results["merged_16bit"].facts["base"] == "dequantized"
    assert results["merged_16bit"].facts["dtype"] == "float16"


def test_formats_that_fit_alone_but_not_together(adapted, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 50 * 1024**2})
    monkeypatch.setattr(qlora_kit.export.job.shutil, "disk_usage", lambda path: usage)
    results = export_model(adapted, ["lora", "merged_16bit"], tmp_path / "out", verify=False)
    assert list(results) == ["merged_16bit"]
    with pytest.raises(DiskSpaceError, match=r"which has 17\.. MiB free after the formats before"):
        raise results.failures["lora"]


def test_formats_on_different_disks_do_not_share_their_room(adapted, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 50 * 1024**2})
    monkeypatch.setattr(qlora_kit.export.job.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(
        qlora_kit.export.job.ExportJob, "device", property(lambda job: len(job.name))
    )
    results = export_model(adapted, ["lora", "merged_16bit"], tmp_path / "out", verify=False)
    assert list(results) == ["lora", "merged_16bit"]


class Reading:
    """Reads the merge that the formats of one call share."""

    name = "reading"
    summary = "The first merged tensor."
    options_type = Merged16bitOptions

    def check(self, request):
        return ExportEstimate(1000)

    def write(self, request, folder):
        import torch

        with request.shared.open(request.model, "original", torch.bfloat16) as merged:
            tensor = merged.load("model.layers.0.self_attn.q_proj.weight")
        torch.save(tensor, folder / "tensor.pt")
        return {}

    def verify(self, request, folder):
        return Verification("none")


@pytest.fixture
def reading():
    registry = plugins.get_registry()

    class Plugin:
        @hookimpl
        def qlora_kit_register_exporters(self):
            return [Reading()]

    name = registry.register(Plugin())
    yield
    registry.unregister(name)


def test_a_shared_merge_is_read_back_and_never_from_an_older_export(
    make_adapted, tmp_path, monkeypatch, merges, reading
):
    import torch

    model = make_adapted()
    formats = ["reading", "merged_16bit"]

    def export():
        return export_model(model, formats, tmp_path, base="original", overwrite=True)

    def read():
        return torch.load(tmp_path / "reading" / "tensor.pt")

    export().raise_for_failures()
    assert [shared.merges for shared in merges] == [1]
    first = read()

    # Another adapter, and a merged export that does not pass: the old one stays where it was.
    randomize(model, std=1.0, seed=5)
    failed = Verification("standard", (Check("x", False, "broken on purpose"),))
    monkeypatch.setattr(Merged16bit, "verify", lambda *_: failed)
    results = export()
    assert list(results.failures) == ["merged_16bit"]
    assert (tmp_path / "merged_16bit" / "config.json").exists()
    assert [shared.merges for shared in merges] == [1, 2]
    second = read()
    assert not torch.equal(first, second)
    monkeypatch.undo()
    export().raise_for_failures()
    assert torch.equal(read(), second)
