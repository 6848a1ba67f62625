"""Places that an export can stand in, and those that it refuses before any work."""

import dataclasses
import os
import tempfile
from pathlib import Path

import pytest

from qlora_kit import export_model
from qlora_kit.artifacts.destination import check_destination
from qlora_kit.errors import ConfigError, DestinationExistsError
from qlora_kit.exporters.lora import Lora


def test_overwriting_never_removes_more_than_an_export(adapted, tiny_llama, tmp_path, monkeypatch):
    def refuse(path):
        with pytest.raises(ConfigError, match="which contains"):
            export_model(adapted, "lora", path, overwrite=True)

    refuse(tiny_llama)
    refuse(tiny_llama.parent)
    work = tmp_path / "home" / "project" / "deep"
    work.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "project"))
    refuse(tmp_path / "home")
    monkeypatch.chdir(work)
    refuse(tmp_path / "home" / "project")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        export_model(adapted, "lora", file, overwrite=True)
    link = tmp_path / "link"
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "x").write_text("")
    link.symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match="is a link"):
        export_model(adapted, "lora", link, overwrite=True)
    (tmp_path / "target" / "x").unlink()
    with pytest.raises(ConfigError, match="is a link"):
        export_model(adapted, "lora", link)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "target")
    with pytest.raises(ConfigError, match="a mount point"):
        export_model(adapted, "lora", tmp_path / "target")


def test_overwriting_never_removes_the_gguf_file_a_base_was_read_from(adapted, tmp_path):
    file = tmp_path / "models" / "base.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    base = dataclasses.replace(adapted.base, name_or_path=str(file), source="gguf")
    model = dataclasses.replace(adapted, base=base)
    with pytest.raises(ConfigError, match=r"which contains .*base\.gguf"):
        export_model(model, "lora", tmp_path / "models", overwrite=True)
    assert file.read_bytes() == b"GGUF"


def test_a_path_that_cannot_be_a_folder_is_told_first(adapted, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file is a file, so .*out cannot be a folder"):
        export_model(adapted, "lora", tmp_path / "file" / "deep" / "out")
    monkeypatch.setattr(Lora, "check", refuse_to_run)
    names = (
        "x" * 300,
        "x" * 255,
        "x" * 228,
        "x\0y",
        "/".join(["x" * 99] * 50),
        "/proc/out/x",
        "/proc/x",
    )
    for name in names:
        with pytest.raises(ConfigError, match=r"cannot be written|may not write"):
            export_model(adapted, "lora", tmp_path / name)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="root of a file system"):
            export_model(adapted, "lora", tmp_path.root, overwrite=overwrite)
    for path in ("", 3, b"out", "~no-such-user/out"):
        for formats in ("lora", ["lora"]):
            with pytest.raises(ConfigError, match=r"path must be the path|cannot be resolved"):
                export_model(adapted, formats, path)


@pytest.mark.parametrize("overwrite", [True, False])
def test_the_working_directory_is_not_replaced_even_when_empty(
    adapted, tmp_path, monkeypatch, overwrite
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"is the working directory.*inside it"):
        export_model(adapted, "lora", ".", overwrite=overwrite)
    assert list(Path.cwd().iterdir()) == []


def test_a_working_directory_that_is_gone_matters_to_relative_paths_only(
    adapted, tmp_path, monkeypatch
):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match=r"out cannot be resolved.*absolute path"):
        export_model(adapted, "lora", "out")
    for overwrite in (False, True):
        export_model(adapted, "lora", tmp_path / "out", overwrite=overwrite, verify=False)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX")
def test_a_folder_that_is_not_ones_own_is_told_before_any_work():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:  # who may write anywhere
            os.seteuid(65534)
        try:
            with pytest.raises(ConfigError, match=f"You may not write to {folder}"):
                check_destination(Path(folder) / "new" / "out", overwrite=False, protected=())
        finally:
            if is_root:
                os.seteuid(0)


def refuse_to_run(*_: object) -> None:
    raise AssertionError("something ran that should not have")


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_a_dead_run_had_moved_is_brought_back_before_any_work(
    adapted, tmp_path, monkeypatch, overwrite
):
    previous = tmp_path / ".out.qlora_kit-11111111.previous"
    export_model(adapted, "lora", tmp_path / "out", verify=False)
    files = len(list((tmp_path / "out").iterdir()))
    (tmp_path / "out").rename(previous)
    if overwrite:
        export_model(adapted, "lora", tmp_path / "out", overwrite=True, verify=False)
        assert (tmp_path / "out" / "adapter_config.json").is_file()
    else:
        monkeypatch.setattr(Lora, "check", refuse_to_run)
        with pytest.raises(DestinationExistsError, match=f"already holds {files} files"):
            export_model(adapted, "lora", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_folders_and_links_that_only_look_like_a_dead_run_s_block_nothing(adapted, tmp_path):
    planted = tmp_path / ".out.qlora_kit-11111111.previous"
    planted.mkdir()
    (planted / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    links = [tmp_path / f".out.qlora_kit-2222222{n}.{kind}"
             for n, kind in enumerate(("previous", "partial"))]  # fmt: skip
    for link in links:
        link.symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".out.qlora_kit-33333333.previous").write_text("a file")
    before = sorted(path.name for path in tmp_path.iterdir())
    export_model(adapted, "lora", tmp_path / "out", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out"])
    assert (planted / "notes.txt").read_text() == "mine"
