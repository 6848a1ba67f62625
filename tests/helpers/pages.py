"""Pages of documentation as tests: the folder a page runs in, and its shell commands."""

from __future__ import annotations

import atexit
import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Before a page imports them: nothing here may depend on a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parents[2]

#: What is documentation: these run, and their links and names are checked.
PAGES = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "docs/*.md")

#: Base models that pages name, each a random model of two layers of that family.
BASES = {"Qwen/Qwen3-4B": "qwen3", "path/to/model": "llama", "meta-llama/Llama-3.2-1B": "llama"}

#: A saved adapter that pages name; its base is the random llama.
ADAPTER = "outputs/adapter"

#: Data sets that pages name; all hold the field guide's rows.
DATA = ("alpaca.json", "alpaca_en_demo.json")


def find_pages() -> list[Path]:
    """Every page that exists, READMEs first."""
    return [path for pattern in PAGES for path in sorted(REPOSITORY.glob(pattern))]


# -- the folder a page runs in ---------------------------------------------------------------


def open_page(namespace: dict[str, Any]) -> None:
    """Go into a fresh folder that holds what pages name."""
    import torch

    stack = contextlib.ExitStack()
    # Compiling takes longer than what pages train; the tests of the training step do compile.
    stack.enter_context(torch.compiler.set_stance("force_eager"))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="page-")))
    stack.enter_context(contextlib.chdir(folder))
    _furnish(folder)
    namespace["_page"] = stack


def close_page(namespace: dict[str, Any]) -> None:
    """Leave the folder and remove it."""
    stack = namespace["_page"]
    namespace.clear()
    stack.close()


def _furnish(folder: Path) -> None:
    for name, kind in BASES.items():
        shutil.copytree(_make_base(kind), folder / name)
    shutil.copytree(_make_adapter(), folder / ADAPTER)
    rows = (REPOSITORY / "examples" / "field_guide.json").read_text(encoding="utf-8")
    for name in DATA:
        (folder / name).write_text(rows, encoding="utf-8")
    questions = [
        {"question": f"{row['instruction']} {row['input']}", "answer": row["output"]}
        for row in json.loads(rows)
    ]
    with (folder / "questions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(questions)
    messages = [
        {
            "messages": [
                {"role": "user", "content": f"{row['instruction']} {row['input']}"},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in json.loads(rows)
    ]
    lines = (json.dumps(row, ensure_ascii=False) for row in messages)
    (folder / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    examples = folder / "examples"
    examples.symlink_to(REPOSITORY / "examples")


@cache
def _kept_folder() -> Path:
    """Where what pages share is kept until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="pages-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def _make_base(kind: str) -> Path:
    from checkpoints import make_checkpoint

    folder = _kept_folder() / kind
    return make_checkpoint(folder, kind, max_position_embeddings=4096)


@cache
def _make_adapter() -> Path:
    from checkpoints import randomize
    from qlora_kit import attach_lora, export_model, load_quantized

    base = _make_base("llama")
    model = randomize(attach_lora(load_quantized(base, 64, engine="native"), r=4))
    export_model(model, "lora", _kept_folder() / "adapter", verify=False)
    return _kept_folder() / "adapter"


# -- shell blocks ----------------------------------------------------------------------------


def run_shell_block(example: Any) -> None:
    """Run or check every command of a block, see :func:`run_command`."""
    for command in split_commands(example.parsed):
        run_command(command)


def split_commands(block: str) -> Iterator[list[str]]:
    """The commands of a shell block as words; comments and continuation lines are resolved."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def run_command(words: list[str]) -> None:
    """Run what is cheap and leaves nothing behind, and check the rest against the repository.

    * ``qlora-kit ...`` and ``python -m qlora_kit ...`` run, in this process and folder.
    * ``make TARGET`` is checked against the Makefile.
    * ``pip install`` is checked: the folder is a project, the extras exist.
    * ``python FILE ...`` is checked: the file exists and accepts the options.

    Raises:
        AssertionError: When a command fails, or is of a kind that nobody checks.
    """
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # VARIABLE=value command
        words = words[1:]
    if words[0] == "qlora-kit":
        run_cli(words[1:])
    elif words[:3] == ["python", "-m", "qlora_kit"]:
        run_cli(words[3:])
    elif words[0] == "make":
        check_make(words[1:])
    elif words[:2] == ["pip", "install"] or words[:3] == ["uv", "pip", "install"]:
        check_install(words[words.index("install") + 1 :])
    elif words[0] == "python":
        check_script(words[1:])
    elif words[0] not in ("cd", "git"):
        raise AssertionError(f"tests/helpers/pages.py does not know how to check: {words}")


def run_cli(arguments: list[str]) -> str:
    """Run the command line and return what it printed."""
    from qlora_kit.cli import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            status = main(arguments)
        except SystemExit as stop:  # --help, or arguments that argparse refuses
            status = stop.code
    assert not status, f"qlora-kit {shlex.join(arguments)} ended with status {status}"
    return output.getvalue()


def check_make(words: list[str]) -> None:
    """Every target exists and its recipe expands."""
    targets = [word for word in words if "=" not in word]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(
            rf"^(?:[\w-]+ )*{re.escape(target)}(?: [\w-]+)*:", makefile, re.MULTILINE
        ), target
    if shutil.which("make"):
        subprocess.run(
            ["make", "--dry-run", *words], cwd=REPOSITORY, check=True, capture_output=True
        )


def check_install(words: list[str]) -> None:
    """What is installed from this folder exists, with its extras; files given exist too."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = iter(words)
    for word in names:
        if word in ("-c", "--constraint", "--override"):
            file = next(names)
            assert (REPOSITORY / file).is_file(), file
            continue
        ours = re.fullmatch(r"(?:\.|.*/qlora-kit|qlora-kit)(?:\[(?P<extras>[^\]]*)\])?", word)
        if ours and ours["extras"]:
            for extra in ours["extras"].split(","):
                assert extra in project["optional-dependencies"], f"no extra {extra!r}"
        if ours and word.startswith("qlora-kit"):
            raise AssertionError(f"{word}: the package is not on PyPI, install from a checkout")


def check_script(words: list[str]) -> None:
    """A script of the repository exists and knows the options it is shown with."""
    script = REPOSITORY / words[0]
    assert script.is_file(), f"{words[0]} does not exist"
    options = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    if options:
        shown = subprocess.run(
            [sys.executable, str(script), "--help"], check=True, capture_output=True, text=True
        ).stdout
        for option in options:
            assert option in shown, f"{words[0]} has no option {option}"
