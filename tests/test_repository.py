"""The repository's own files: they parse, name what exists, and say the same as each other."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import pages

ROOT = pages.REPOSITORY
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
REPOSITORY_URL = PROJECT["urls"]["Repository"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """Takes mkdocs.yml's names of functions as text."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_that_exist_with_few_rights(workflow):
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    assert content["jobs"]
    for job in content["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            for command in re.findall(r"^make (.+)$", step.get("run", ""), re.MULTILINE):
                variants = [command]
                for name, values in matrix.items():
                    mark = f"${{{{ matrix.{name} }}}}"
                    variants = [v.replace(mark, str(value)) for v in variants for value in values]
                for variant in variants:
                    pages.check_make(variant.split())


def test_the_matrix_is_the_classifiers():
    jobs = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]
    stated = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert jobs["tests"]["strategy"]["matrix"]["python"] == stated


def test_every_file_names_the_same_repository():
    files = [ROOT / "pyproject.toml", ROOT / "mkdocs.yml", ROOT / "CITATION.cff"]
    files += list((ROOT / ".github").rglob("*.yml"))
    named = r"github\.com/([\w.-]+/[\w.-]*?qlora[\w-]*)"
    owners = {owner for file in files for owner in re.findall(named, file.read_text("utf-8"))}
    assert owners == {REPOSITORY_URL.removeprefix("https://github.com/")}
    site = yaml.load(read("mkdocs.yml"), _Loader)
    assert site["repo_url"] == REPOSITORY_URL
    assert site["site_url"] == PROJECT["urls"]["Documentation"]


@pytest.mark.parametrize(
    "name",
    [".pre-commit-config.yaml", ".readthedocs.yaml", ".github/dependabot.yml", "CITATION.cff",
     *(f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "feature", "config"))],
)  # fmt: skip
def test_settings_parse(name):
    assert isinstance(yaml.safe_load(read(name)), dict)


def test_the_image_holds_the_quickstarts_base_model_and_what_it_copies():
    text = read("Dockerfile")
    pinned = re.search(r"^BASE_MODEL = (.+)$", read("Makefile"), re.MULTILINE)[1]
    assert pinned in text
    let_in = [line[1:] for line in read(".dockerignore").split() if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert source in let_in, source
            assert (ROOT / source).exists(), source


def test_requirements_are_bounded_where_insides_are_built_on():
    ranges = dict(re.match(r"([\w-]+)(.*)", line).groups() for line in PROJECT["dependencies"])
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"):
        assert re.fullmatch(r">=[\d.]+,<[\d.]+", ranges[name]), name
    capped = re.search(r"^CAPPED = (.+)$", read("Makefile"), re.MULTILINE)[1].split()
    assert set(capped) == {"torch", "transformers", "trl", "peft", "bitsandbytes"}
    assert Path(ROOT / "constraints.txt").is_file()
