"""Plugins found through real entry points: good ones, broken ones, clashes, switches."""

import importlib
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import plugin_packages
import qlora_kit
from plugin_packages import good, install
from qlora_kit import describe_exporters, export_model, plugins
from qlora_kit.errors import ConfigError, ExportError, PluginError, UnknownOptionError
from qlora_kit.plugins import ExporterRegistry

BUILTINS = set(ExporterRegistry(use_entry_points=False).names())


@pytest.fixture
def fresh(monkeypatch):
    """Look for plugins again, as a new process would, for the library's functions too."""

    def make():
        registry = ExporterRegistry()
        monkeypatch.setitem(plugins._registry, "default", registry)
        return registry

    return make


def test_an_installed_plugin_is_a_format_like_any_other(site, fresh, adapted, tmp_path):
    install(site, "sums-for-qlora")
    registry = fresh()
    assert not registry.broken
    assert set(registry.names()) > BUILTINS
    assert str(registry.get_origin("sums")) == "plugin 'sums_for_qlora' of sums-for-qlora"
    artifact = export_model(adapted, "sums", tmp_path / "out", level=3)
    assert artifact.facts == {"level": 3}
    assert artifact.verification.passed
    assert artifact.manifest["origin"] == "plugin 'sums_for_qlora' of sums-for-qlora"
    assert artifact.manifest["options"] == {"level": 3}
    assert [file.name for file in artifact.files] == ["qlora_kit_manifest.json", "sums.txt"]
    entry = next(e for e in describe_exporters()["exporters"] if e["name"] == "sums")
    assert entry == {
        "name": "sums", "summary": "A hash of every tensor.", "plugin": "sums_for_qlora",
        "distribution": "sums-for-qlora", "version": "1.2.3", "is_available": True, "missing": [],
        "options": [{
            "name": "level", "type": "int", "default": 1, "is_required": False, "is_secret": False,
        }],
    }  # fmt: skip
    with pytest.raises(UnknownOptionError, match=r"'sums' has no option 'leve'\. Did you mean 'l"):
        export_model(adapted, "sums", tmp_path / "two", leve=3)


BROKEN = {
    "raises": ("raise RuntimeError('no licence file')", r"RuntimeError: no licence file"),
    "leaves": ("import sys\nsys.exit('usage: convert IN OUT')", r"SystemExit: usage: convert IN"),
    "unparsable": ("def broken(:\n", r"SyntaxError"),
    "needs": ("import a_package_nobody_has", r"ModuleNotFoundError: .*a_package_nobody_has"),
    "empty": ("", r"has no qlora_kit_register_exporters\(\); the entry point names the module"),
    "unmarked": (
        "def qlora_kit_register_exporters():\n    return []",
        r"qlora_kit_register_exporters is not marked with @qlora_kit\.hookimpl",
    ),
    "misspelt": (
        "import qlora_kit\n@qlora_kit.hookimpl\ndef qlora_kit_register_exporter():\n    return []",
        r"unknown hook 'qlora_kit_register_exporter'",
    ),
    "asks": (good().replace("exporters():", "exporters(registry):"), r"'registry'.*hookspec"),
    "fails": (good().replace("return [Sums()]", "return 1 / 0"), r"ZeroDivisionError"),
    "nothing": (good().replace("return [Sums()]", "return None"), r"returned NoneType, not a list"),
    "text": (good().replace("return [Sums()]", "return 'sums'"), r"returned str, not a list"),
    "single": (good().replace("[Sums()]", "Sums()"), r"returned Sums, not a list of exporters"),
    "class": (good().replace("[Sums()]", "[Sums]"), r"is a class; the hook returns instances"),
    "odd": (good().replace("[Sums()]", "[7]"), r"exporter int has no usable name .*no method wr"),
    "shouts": (good("SUMS"), r"exporter Sums has no usable name \(got 'SUMS'; lower case"),
    "lacks": (good().replace("def verify(", "def check_it("), r"has no method verify\(\)"),
    "plain": (good().replace("@dataclass(frozen=True)\n", ""), r"no options_type that is a datac"),
    "grabs": (good().replace("level: int", "verify: int"), r"'verify', which is export_model's"),
    "trap": (
        good().replace('name = "sums"', "name = property(lambda self: 1 / 0)"),
        r"has no usable name \(got None",
    ),
    "wrapper": (
        good().replace("@qlora_kit.hookimpl", "@qlora_kit.hookimpl(wrapper=True)"),
        r"wrapper=True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_named_and_its_neighbours_work(kind, site, caplog):
    source, reason = BROKEN[kind]
    install(site, f"broken-{kind}", source)
    install(site, "neighbour", good("neighbourly"))
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        registry = ExporterRegistry()
    assert set(registry.names()) == BUILTINS | {"neighbourly"}
    (broken,) = registry.broken
    assert str(broken.origin) == f"plugin 'broken_{kind}' of broken-{kind}"
    assert re.search(reason, broken.reason), broken.reason
    assert f"Skipping {broken}" in caplog.text
    with pytest.raises(ConfigError, match=rf"not usable: plugin 'broken_{kind}' of broken-{kind}:"):
        registry.get("sums")


def test_entry_points_that_name_the_wrong_thing(site):
    install(site, "absent", None)
    install(site, "to-a-class", good("a"), entry_points={"to_a_class": "to_a_class:Sums"})
    install(site, "typo", good("b"), entry_points={"typo": "typo:register"})
    registry = ExporterRegistry()
    assert set(registry.names()) == BUILTINS
    reasons = {broken.origin.distribution: broken.reason for broken in registry.broken}
    assert "No module named 'absent'" in reasons["absent"]
    assert "and this one names a type" in reasons["to-a-class"]
    assert "has no attribute 'register'" in reasons["typo"]


def test_ctrl_c_while_a_plugin_is_imported_is_not_swallowed(site):
    install(site, "slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        ExporterRegistry()


def test_one_bad_exporter_does_not_lose_the_plugin_s_others(site):
    install(site, "mixed", good().replace("[Sums()]", "[7, Sums()]"))
    registry = ExporterRegistry()
    assert "sums" in registry.names()
    assert [broken.origin.distribution for broken in registry.broken] == ["mixed"]


def test_a_built_in_keeps_its_name(site):
    install(site, "impostor", good("lora"))
    registry = ExporterRegistry()
    assert registry.get_origin("lora").distribution == "qlora-kit"
    assert [str(broken) for broken in registry.broken] == [
        "plugin 'impostor' of impostor: exporter 'lora' has the name of one from plugin "
        "'qlora_kit.exporters.lora' of qlora-kit, which stays"
    ]


def test_of_two_strangers_with_one_name_neither_is_picked_and_both_are_named(
    site, fresh, adapted, tmp_path
):
    install(site, "first-dist", good("twin"))
    install(site, "second-dist", good("twin") + "\n" + "# another\n")
    install(site, "third", good("other"))
    registry = fresh()
    assert "twin" not in registry.names()
    assert "other" in registry.names()
    with pytest.raises(PluginError, match="Two exporters are named 'twin'") as caught:
        export_model(adapted, ["lora", "twin"], tmp_path / "out")
    assert "first-dist" in str(caught.value)
    assert "second-dist" in str(caught.value)
    assert plugins.PLUGINS_VARIABLE in str(caught.value)
    assert not (tmp_path / "out").exists()
    export_model(adapted, "lora", tmp_path / "out", verify=False)


def test_two_distributions_may_call_their_entry_points_the_same(site):
    install(site, "one-dist", good("one"), entry_points={"plugin": "one_dist"})
    install(site, "two-dist", good("two"), entry_points={"plugin": "two_dist"})
    registry = ExporterRegistry()
    assert {"one", "two"} < set(registry.names())
    assert not registry.broken


@pytest.mark.parametrize(
    ("step", "what", "error", "match"),
    [
        ("write", "raise ValueError('(3, 4)')", ExportError, r"in write\(\): ValueError: \(3, 4\)"),
        ("write", "raise OSError('no socket')", ExportError, r"in write\(\): OSError: no socket"),
        ("write", "return None", PluginError, r"returned NoneType from write\(\), not a Mapping"),
        ("check", "raise OSError('no tool')", ExportError, r"in check\(\): OSError: no tool"),
        ("check", "return 12", PluginError, r"returned int from check\(\), not a ExportEstimate"),
        (
            "check", "return qlora_kit.ExportEstimate('10 GB')", ExportError,
            r"returned an unusable estimate: TypeError",
        ),
        (
            "verify", "return qlora_kit.Verification('standard', ('fine',))", ExportError,
            r"could not be finished: AttributeError: 'str'",
        ),
        (
            "write", "(folder / 'x').write_text(''); return {'sha256': 7}", ExportError,
            r"could not be finished: ",
        ),
        ("verify", "raise EOFError", ExportError, r"in verify\(\): EOFError"),
        ("verify", "return True", PluginError, r"returned bool from verify\(\), not a Verific"),
    ],
)  # fmt: skip
def test_a_plugin_that_fails_in_an_export_is_named_and_loses_only_itself(
    step, what, error, match, site, fresh, adapted, tmp_path
):
    arguments = "self, request" if step == "check" else "self, request, folder"
    source = good().replace(
        f"    def {step}({arguments}):", f"    def {step}({arguments}):\n        {what}"
    )
    if "sha256" in what:
        source = source.replace("same = ", "same = True or ")
    install(site, "half-way", source)
    fresh()
    match = rf"Exporter 'sums' \(plugin 'half_way' of half-way\) .*{match}"
    with pytest.raises(error, match=match):
        export_model(adapted, "sums", tmp_path / "alone")
    results = export_model(adapted, ["sums", "lora"], tmp_path / "out", verify=True)
    assert list(results) == ["lora"]
    with pytest.raises(error, match=match):
        raise results.failures["sums"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "site"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora"]


def test_ctrl_c_in_a_plugin_ends_the_call(site, fresh, adapted, tmp_path):
    source = good().replace('return {"level"', 'raise KeyboardInterrupt\n        return {"level"')
    install(site, "interrupted", source)
    fresh()
    with pytest.raises(KeyboardInterrupt):
        export_model(adapted, ["sums", "lora"], tmp_path / "out", verify=False)
    assert list((tmp_path / "out").iterdir()) == []


def _names(**environment):
    """What a new process lists, through the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "qlora_kit", "exporters", "--json"],
        capture_output=True, text=True, check=True, timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip
    found = json.loads(done.stdout)
    return {entry["name"] for entry in found["exporters"]} - BUILTINS, found, done.stderr


def test_switches_in_a_new_process(tmp_path):
    install(tmp_path, "plug-a", good("a"))
    install(tmp_path, "plug-b", good("b"), entry_points={"bee": "plug_b"})
    install(tmp_path, "plug-c", "raise RuntimeError('never import me')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    both, found, errors = _names(PYTHONPATH=path)
    assert {"a", "b"} <= both
    assert found["broken"] == ["plugin 'plug_c' of plug-c: RuntimeError: never import me"]
    assert "Skipping plugin 'plug_c' of plug-c" in errors

    none, found, errors = _names(PYTHONPATH=path, QLORA_KIT_DISABLE_PLUGINS="1")
    assert not none
    assert not found["broken"]
    assert not errors
    assert "plugin 'bee' of plug-b" in found["switched_off"]

    # By entry point or by distribution.
    chosen, found, _ = _names(PYTHONPATH=path, QLORA_KIT_PLUGINS=" plug-a ,bee")
    assert chosen == {"a", "b"}
    assert not found["broken"]


def test_switches_and_their_values(site, monkeypatch, caplog):
    install(site, "plug-a", good("a"))
    for value, is_on in [("", True), ("0", True), ("no", True), ("1", False), ("TRUE", False)]:
        monkeypatch.setenv(plugins.DISABLE_VARIABLE, value)
        assert ("a" in ExporterRegistry().names()) == is_on, value
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "plug-a")
    assert "a" not in ExporterRegistry().names()
    monkeypatch.delenv(plugins.DISABLE_VARIABLE)
    assert "a" in ExporterRegistry().names()
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "")
    assert "a" not in ExporterRegistry().names()
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "plug-a,plugg-b")
        registry = ExporterRegistry()
    assert "a" in registry.names()
    assert "QLORA_KIT_PLUGINS lists plugg-b, and no installed plugin" in caplog.text
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "other")
    with pytest.raises(ConfigError, match=r"switched off: plugin 'plug_a' of plug-a"):
        ExporterRegistry().get("a")


def test_plugins_by_hand(site):
    module = install(site, "by-hand", good("handmade"), entry_points={"x": "by_hand"})
    importlib.import_module(module)
    registry = ExporterRegistry(use_entry_points=False)
    assert registry.register(sys.modules[module]) == "by_hand"
    assert str(registry.get_origin("handmade")) == "plugin 'by_hand' of this process"
    with pytest.raises(PluginError, match="already registered"):
        registry.register(sys.modules[module])
    registry.unregister("by_hand")
    assert "handmade" not in registry.names()

    class Clash:
        @qlora_kit.hookimpl
        def qlora_kit_register_exporters(self):
            return [registry.get("lora"), sys.modules[module].Sums()]

    with pytest.raises(PluginError, match=r"'lora' has the name of one from .*qlora-kit"):
        registry.register(Clash())
    assert set(registry.names()) == BUILTINS
    assert not registry.broken
    registry.register(sys.modules[module])
    assert "handmade" in registry.names()


def test_every_plugin_is_asked_once(site):
    source = plugin_packages.GOOD.replace("return [Sums()]", "CALLS.append(1)\n    return [Sums()]")
    install(site, "counting", "CALLS = []\n" + source)
    registry = ExporterRegistry()
    other = install(site, "later", good("later"), entry_points={"x": "later"})
    registry.register(importlib.import_module(other))
    registry.get("sums")
    registry.names()
    assert sys.modules["counting"].CALLS == [1]


def test_a_plugin_that_asks_for_exporters_while_imported_is_told(site, monkeypatch):
    install(site, "impatient", "import qlora_kit\nqlora_kit.available_exporters()")
    install(site, "patient", good("patient"))
    monkeypatch.setattr(plugins, "_registry", {})
    registry = plugins.get_registry()
    assert "patient" in registry.names()
    assert "asked for while it was being made" in registry.broken[0].reason
    assert plugins.get_registry() is registry


def test_listing_formats_loads_no_heavy_library():
    code = (
        "import sys, qlora_kit; qlora_kit.describe_exporters()\n"
        "print([name for name in ('torch', 'transformers', 'bitsandbytes') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"


def test_what_is_missing_is_listed_even_when_the_question_fails(site, fresh):
    lacks = "    def find_missing(self):\n        {}\n\n    def check("
    install(
        site, "lacking", good("lacking").replace("    def check(", lacks.format("return ['frob']"))
    )
    install(site, "asking", good("asking").replace("    def check(", lacks.format("return 1 / 0")))
    fresh()
    found = {entry["name"]: entry for entry in describe_exporters()["exporters"]}
    assert found["lacking"]["missing"] == ["frob"]
    assert not found["lacking"]["is_available"]
    assert found["asking"]["missing"] == [
        "find_missing() failed: ZeroDivisionError: division by zero"
    ]
    assert found["lora"]["is_available"]


def test_the_plugin_of_the_documentation_is_found_as_its_pyproject_says(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    project = tomllib.loads(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])["project"]
    entry_points = project["entry-points"]["qlora_kit"]
    install(tmp_path, project["name"], None, entry_points=entry_points)
    (module,) = entry_points.values()
    (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    added, found, errors = _names(PYTHONPATH=path)
    assert added == {"adapter-npz"}
    assert not found["broken"]
    assert not errors
