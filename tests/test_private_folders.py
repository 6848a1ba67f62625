"""Folders that appear whole, locks that die with their process; without a model."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qlora_kit import diagnosis, private_folders
from qlora_kit.artifacts import staging
from qlora_kit.errors import DestinationExistsError
from qlora_kit.file_locks import is_locked, take_lock
from qlora_kit.manifest import MANIFEST_NAME
from qlora_kit.private_folders import find_left, locked_folder, remove_abandoned, scratch_folder

HOLD = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from qlora_kit.private_folders import locked_folder\n"
    "with locked_folder(Path(sys.argv[1]), sys.argv[2]) as folder:\n"
    "    print(folder, flush=True)\n"
    "    time.sleep(600)\n"
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def held(tmp_path):
    """A folder that another process is writing, and that process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "out"], stdout=subprocess.PIPE, text=True
    )
    yield Path(process.stdout.readline().strip()), process
    process.kill()
    process.wait()
    process.stdout.close()


# -- locks -----------------------------------------------------------------------------------


def test_a_lock_is_one_processes_until_it_is_given_up(tmp_path):
    path = tmp_path / "x.lock"
    lock = take_lock(path)
    assert lock is not None
    assert path.is_file()
    assert take_lock(path) is None
    assert is_locked(path)
    lock.release()
    assert not path.exists()
    assert not is_locked(path)
    assert not path.exists()


def test_where_there_are_no_locks_nothing_counts_as_abandoned(tmp_path):
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / "file" / "x.lock"
    with pytest.raises(OSError, match="file"):
        take_lock(nowhere)
    assert is_locked(nowhere)


# -- private folders -------------------------------------------------------------------------


def test_a_folder_is_private_while_it_is_written_and_gone_afterwards(tmp_path):
    with contextlib.suppress(KeyError), locked_folder(tmp_path, "out", 0o700) as folder:
        assert folder.parent == tmp_path
        assert folder.is_dir()
        assert len(folder.name) - len("out") <= private_folders.ADDED_BYTES
        assert not private_folders.is_abandoned(folder)
        if os.name == "posix":
            assert folder.stat().st_mode & 0o777 == 0o700
        assert find_left(tmp_path, "out", private_folders.PARTIAL) == [folder]
        assert find_left(tmp_path, "ou", private_folders.PARTIAL) == []
        assert find_left(tmp_path, "out", private_folders.PREVIOUS) == []
        assert find_left(tmp_path, None, private_folders.PARTIAL) == [folder]
        remove_abandoned(tmp_path)
        assert folder.is_dir()
        raise KeyError
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_leaves_no_lock(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(OSError, match="the disk is full"),
        locked_folder(tmp_path, "out"),
    ):
        pass
    assert names(tmp_path) == []


def test_where_nothing_can_be_locked_folders_are_made_and_kept(tmp_path, monkeypatch):
    """As on some network file systems, of which there is none here."""

    def refuse(path):
        raise OSError("no locks available")

    monkeypatch.setattr(private_folders, "take_lock", refuse)
    monkeypatch.setattr(private_folders, "is_locked", lambda path: True)
    left = tmp_path / ".out.qlora_kit-12345678.partial"
    left.mkdir()
    with locked_folder(tmp_path, "out") as folder:
        assert folder.is_dir()
        remove_abandoned(tmp_path)
        assert folder.is_dir()
    assert names(tmp_path) == [left.name]


def test_what_a_living_process_writes_stays_and_a_dead_ones_goes(tmp_path, held):
    folder, process = held
    remove_abandoned(tmp_path, "out")
    assert folder.is_dir()
    assert len(names(tmp_path)) == 2
    process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()
    remove_abandoned(tmp_path, "other")
    assert folder.is_dir()
    remove_abandoned(tmp_path, "out")
    assert names(tmp_path) == []


def test_what_killed_processes_left_among_temporary_files_is_told_and_removed_by_the_next(
    tmp_path, held, monkeypatch
):
    folder, process = held
    (folder / "file").write_bytes(bytes(1000))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Where else it looks, others may be writing.
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert list(diagnosis._look_at_leftovers()) == []
    process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()
    (found,) = diagnosis._look_at_leftovers()
    assert str(folder) in found.detail
    with scratch_folder("other") as scratch:
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == [scratch]
        if os.name == "posix":
            assert scratch.stat().st_mode & 0o777 == 0o700
    assert names(tmp_path) == []


def test_names_of_others_and_links_are_left_alone(tmp_path):
    kept = [".out.qlora_kit-1234.partial", ".out.qlora_kit-zzzzzzzz.partial", "out.partial",
            ".out.qlora_kit-12345678.partial.bak"]  # fmt: skip
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / "target").mkdir()
    link = tmp_path / ".out.qlora_kit-12345678.partial"
    link.symlink_to(tmp_path / "target")
    (tmp_path / ".out.qlora_kit-22345678.partial").write_text("a file")
    remove_abandoned(tmp_path)
    assert set(names(tmp_path)) >= {*kept, "target", link.name, ".out.qlora_kit-22345678.partial"}
    assert find_left(tmp_path / "gone", None, private_folders.PARTIAL) == []


# -- staging ---------------------------------------------------------------------------------


MANIFEST = {"kind": "artifact", "files": [{"name": "file"}, {"name": "deep/er"}]}


def stage(destination, text, **options):
    with staging.stage_folder(destination, **options) as staged:
        (staged.folder / MANIFEST_NAME).write_text(json.dumps(MANIFEST))
        (staged.folder / "file").write_text(text)
        (staged.folder / "deep").mkdir()
        (staged.folder / "deep" / "er").write_text(text)
        assert not staged.is_committed
        staged.commit()
        assert staged.is_committed


def test_a_folder_appears_whole_beside_nothing_else(tmp_path):
    destination = tmp_path / "a" / "out [1]*"
    stage(destination, "one")
    assert names(destination.parent) == ["out [1]*"]
    assert (destination / "deep" / "er").read_text() == "one"


def test_onto_an_empty_folder_it_appears_and_onto_a_filled_one_not(tmp_path):
    (tmp_path / "out").mkdir()
    stage(tmp_path / "out", "one")
    with pytest.raises(DestinationExistsError, match="filled by something else"):
        stage(tmp_path / "out", "two")
    assert (tmp_path / "out" / "file").read_text() == "one"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_replaced_folder_is_gone(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    stage(tmp_path / "out", "one")
    (tmp_path / "out" / "notes").write_text("somebody's")
    with pytest.raises(DestinationExistsError, match="notes"):
        stage(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / "file").read_text() == "one"
    (tmp_path / "out" / "notes").unlink()
    stage(tmp_path / "out", "two", overwrite=True)
    assert names(tmp_path / "out") == ["deep", "file", MANIFEST_NAME]
    assert (tmp_path / "out" / "file").read_text() == "two"
    assert names(tmp_path) == ["out"]


def test_a_replacement_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    stage(tmp_path / "out", "one")
    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    rename, calls = os.rename, []

    def rename_once(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(OSError, match="the disk is gone"):
        stage(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / "file").read_text() == "one"
    assert names(tmp_path) == ["out"]


def test_every_file_and_folder_is_flushed(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync

    def note(handle):
        flushed.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    stage(tmp_path / "out", "one")
    paths = [tmp_path, tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {path.stat().st_ino for path in paths} == set(flushed)


def test_what_was_moved_aside_comes_back_only_where_it_is_missed(tmp_path, held):
    moved = held[0].with_name(held[0].name.removesuffix(".partial") + ".previous")
    moved.mkdir()
    # Its run lives: it is in the middle of replacing.
    staging.clean_leftovers(tmp_path / "out")
    assert moved.is_dir()
    held[1].kill()
    held[1].wait()
    staging.clean_leftovers(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    moved.mkdir()
    staging.clean_leftovers(tmp_path / "out")
    assert names(tmp_path) == ["out"]
