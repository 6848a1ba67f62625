"""Formatters of other packages: found by entry point, rebuilt, named, and held to a contract."""

import json
import logging
import re

import pytest

from plugin_packages import GOOD, good, install
from qlora_kit import (
    AlpacaFormatter,
    ChatFormatter,
    FormatterBase,
    PromptCompletionFormatter,
    Segment,
    export_model,
    formatter_from_spec,
    load_quantized,
    plugins,
    train_sft,
)
from qlora_kit.data import TextFormatter, plan_formatter, read_source
from qlora_kit.errors import ConfigError, PluginError
from qlora_kit.plugins import ExporterRegistry, FormatterRegistry
from qlora_kit.testing import ContractError, check_formatter

BUILTINS = {"alpaca", "chat", "prompt-completion", "text"}

DIALECT = """
import qlora_kit
from qlora_kit import FormatterBase, Segment

class Dialect(FormatterBase):
    name = "dialect"
    roles = ("question", "answer")

    def __init__(self, tokenizer, *, ask="Q: ", **options):
        super().__init__(tokenizer, **options)
        self.ask = ask

    def segments(self, row):
        return [
            Segment(f"{self.ask}{row['question']}\\nA: "),
            Segment(row["answer"], is_trained=True),
        ]

    def template_spec(self):
        return super().template_spec() | {"ask": self.ask}

    @classmethod
    def from_spec(cls, spec, tokenizer):
        return cls(tokenizer, ask=spec["ask"], **cls.read_common(spec))

@qlora_kit.hookimpl
def qlora_kit_register_formatters():
    return [Dialect]
"""


def dialect(name="dialect"):
    return DIALECT.replace('name = "dialect"', f'name = "{name}"')


@pytest.fixture
def fresh(monkeypatch):
    """Look for plugins again, as a new process would."""

    def make():
        monkeypatch.setattr(plugins, "_registry", {})
        return plugins.get_formatter_registry()

    return make


def test_a_formatter_of_another_package_survives_export_reload_and_checkpoints(
    site, fresh, make_adapted, tmp_path
):
    install(site, "dialect-for-qlora", DIALECT)
    registry = fresh()
    assert set(registry.names()) == BUILTINS | {"dialect"}
    assert str(registry.get_origin("dialect")) == "plugin 'dialect_for_qlora' of dialect-for-qlora"
    model = make_adapted()
    formatter = registry.get("dialect")(model.tokenizer, ask="Please: ", response_only=True)
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(4)]
    result = train_sft(
        model, rows, formatter=formatter, output_dir=tmp_path / "run", max_steps=1, save_steps=1
    )
    artifact = export_model(model, "lora", tmp_path / "out", verify=False)
    assert artifact.manifest["formatter"]["kind"] == "dialect"
    for folder in (artifact.path, result.checkpoint):
        again = load_quantized(folder, dtype="float32").record.formatter
        assert type(again) is type(formatter)
        assert again.fingerprint == formatter.fingerprint
        assert again.prompt("Hi") == "Please: Hi\nA: "


def test_it_is_named_as_a_template_and_checked_before_there_is_a_tokenizer(
    site, fresh, tiny_llama, capsys, tmp_path
):
    from qlora_kit.cli import main

    install(site, "dialect-for-qlora", DIALECT)
    fresh()
    plan = plan_formatter(template="dialect", columns={"question": "q"})
    plan.check(read_source([{"q": "a", "answer": "b"}]))
    with pytest.raises(ConfigError, match="system was given, and the 'dialect' formatter takes no"):
        plan_formatter(template="dialect", system="Be brief.")
    with pytest.raises(ConfigError, match="Did you mean 'dialect'"):
        plan_formatter(template="dialec")
    plan_formatter(template="dialect", ask="Say: ")
    argv = ["generate", str(tiny_llama), "Hi", "--template", "dialect", "--max-new-tokens", "1"]
    assert main(argv) == 0
    capsys.readouterr()


def test_a_template_that_is_not_there_names_the_plugins_that_failed(site, fresh):
    install(site, "broken-one", "raise RuntimeError('no licence file')")
    fresh()
    with pytest.raises(ConfigError, match="not usable: plugin 'broken_one' of broken-one: Runtime"):
        plan_formatter(template="dialect")
    with pytest.raises(ConfigError, match=r"'dialect' cannot be rebuilt .*\n  not usable: plugin"):
        formatter_from_spec({"kind": "dialect"}, None)


BROKEN = {
    "raises": ("raise RuntimeError('no licence file')", r"RuntimeError: no licence file"),
    "empty": ("", r"has no qlora_kit_register_formatters\(\); the entry point names the module"),
    "unmarked": (
        DIALECT.replace("@qlora_kit.hookimpl", ""),
        r"qlora_kit_register_formatters is not marked with @qlora_kit\.hookimpl",
    ),
    "half-marked": (
        GOOD + "\ndef qlora_kit_register_formatters():\n    return []",
        r"qlora_kit_register_formatters is not marked",
    ),
    "misspelt": (
        DIALECT.replace("register_formatters", "register_formatter"),
        r"unknown hook 'qlora_kit_register_formatter'",
    ),
    "fails": (DIALECT.replace("return [Dialect]", "return 1 / 0"), r"ZeroDivisionError"),
    "single": (DIALECT.replace("[Dialect]", "Dialect"), r"returned type, not a list of formatters"),
    "instance": (DIALECT.replace("[Dialect]", "[7]"), r"formatter int is not a class; the hook"),
    "unnamed": (DIALECT.replace('    name = "dialect"\n', ""), r"Dialect has no name of its own"),
    "shouts": (dialect("DIA"), r"formatter Dialect has no usable name \(got 'DIA'; lower case"),
    "stranger": (
        DIALECT.replace("return [Dialect]", "return [type('X', (), {'name': 'x'})]"),
        r"formatter X has no method from_spec\(\)",
    ),
    "impostor": (dialect("chat"), r"formatter 'chat' has the name of one from .*, which stays"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_named_and_its_neighbours_work(kind, site, caplog):
    source, reason = BROKEN[kind]
    install(site, f"broken-{kind}", source)
    install(site, "neighbour", dialect("neighbourly"))
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        registry = FormatterRegistry()
    assert set(registry.names()) == BUILTINS | {"neighbourly"}
    (broken,) = registry.broken
    assert re.search(reason, broken.reason), broken.reason
    assert f"Skipping {broken}" in caplog.text
    assert registry.get("chat") is ChatFormatter


def test_a_plugin_may_have_either_hook_or_both(site):
    install(site, "exports-only", good("sums"))
    install(site, "formats-only", dialect("one"))
    install(site, "both", good("others") + dialect("two").replace("import qlora_kit\n", "", 1))
    formatters, exporters = FormatterRegistry(), ExporterRegistry()
    assert set(formatters.names()) == BUILTINS | {"one", "two"}
    assert {"sums", "others"} <= set(exporters.names())
    assert formatters.broken == exporters.broken == []


def test_a_plugin_broken_for_both_is_warned_about_once(site, fresh, caplog):
    install(site, "broken-one", "raise RuntimeError('no licence file')")
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        fresh()
        assert plugins.get_registry().broken == plugins.get_formatter_registry().broken
    assert caplog.text.count("no licence file") == 1


def test_a_kind_claimed_twice_is_nobodys(site, fresh):
    install(site, "first-dist", dialect("twin"))
    install(site, "second-dist", dialect("twin"))
    fresh()
    for ask in (
        lambda: formatter_from_spec({"kind": "twin"}, None),
        lambda: plan_formatter(template="twin"),
    ):
        with pytest.raises(PluginError, match="Two formatters are named 'twin'") as caught:
            ask()
        assert "first-dist" in str(caught.value)
        assert "second-dist" in str(caught.value)


def test_the_switches_are_those_of_exporters(site, monkeypatch):
    install(site, "plug-a", dialect("a"))
    monkeypatch.setenv(plugins.DISABLE_VARIABLE, "1")
    registry = FormatterRegistry()
    assert "a" not in registry.names()
    with pytest.raises(ConfigError, match="switched off: plugin 'plug_a' of plug-a"):
        registry.get("a")
    monkeypatch.setenv(plugins.DISABLE_VARIABLE, "0")
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "plug-a")
    assert "a" in FormatterRegistry().names()
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "")
    assert "a" not in FormatterRegistry().names()


def test_by_hand_it_takes_the_hook_that_is_asked_for(site):
    install(site, "by-hand", good("handmade"), entry_points={})
    import by_hand

    registry = FormatterRegistry(use_entry_points=False)
    with pytest.raises(PluginError, match=r"it has no qlora_kit_register_formatters\(\)"):
        registry.register(by_hand)
    assert set(registry.names()) == BUILTINS


def test_what_from_spec_raises_names_the_plugin_and_a_model_still_loads(
    site, fresh, make_adapted, tmp_path, caplog
):
    install(site, "dialect-for-qlora", DIALECT)
    registry = fresh()
    model = make_adapted()
    model.record.formatter = registry.get("dialect")(model.tokenizer)
    export_model(model, "lora", tmp_path / "out", verify=False)
    manifest = tmp_path / "out" / "qlora_kit_manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    del content["formatter"]["ask"]
    manifest.write_text(json.dumps(content), encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        assert load_quantized(tmp_path / "out", dtype="float32").record.formatter is None
    assert "'dialect' (plugin 'dialect_for_qlora' of dialect-for-qlora)" in caplog.text
    assert "KeyError: 'ask'" in caplog.text


class Inherits(AlpacaFormatter):
    """Says more than its parent, under its parent's name."""

    def segments(self, row):
        return [Segment("Hear: "), *super().segments(row)]


def test_a_class_under_an_inherited_name_does_not_come_back_as_its_parent(make_adapted):
    spec = Inherits(make_adapted().tokenizer).template_spec()
    assert spec["kind"] == "test_formatter_plugins.Inherits"
    with pytest.raises(ConfigError, match=r"kind 'test_formatter_plugins\.Inherits' cannot be"):
        formatter_from_spec(spec, None)


MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": f"Ask {n}"},
            {"role": "assistant", "content": f"Answer {n}"},
        ]
    }
    for n in (1, 2)
]
BUILT_IN = {
    AlpacaFormatter: {},
    TextFormatter: {},
    PromptCompletionFormatter: {"prompt": {"text": "The prompt of row 1 is a sentence."}},
    ChatFormatter: {
        "rows": MESSAGES,
        "prompt": {"messages": MESSAGES[0]["messages"][:1]},
        "options": {"system": "Be brief."},
    },
}


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.__name__)
def test_every_built_in_keeps_every_promise(kind):
    assert len(check_formatter(kind, **BUILT_IN[kind])) == 13


class Question(FormatterBase):
    """Keeps every promise in ten lines."""

    name = "question"
    roles = ("question", "answer")

    def segments(self, row):
        return [Segment(f"Q: {row['question']}\nA: "), Segment(row["answer"], is_trained=True)]


def test_ten_lines_keep_every_promise():
    promises = check_formatter(Question)
    assert len(set(promises)) == len(promises) == 13


class WithoutName(FormatterBase):
    roles = Question.roles
    segments = Question.segments


class Inherited(Question):
    pass


class TakesABuiltInsName(Question):
    name = "chat"


class TakesATemplatesName(Question):
    name = "alpaca-zh"


class DropsTheQuestion(Question):
    name = "drops"

    def segments(self, row):
        return [Segment("Q: something\nA: "), Segment(row["answer"], is_trained=True)]


class SaysTheSame(Question):
    name = "same"

    def segments(self, row):
        return [Segment("Q: "), Segment("Yes.", is_trained=True)]


class ForgetsAnOption(Question):
    name = "forgets"

    def __init__(self, tokenizer, *, ask="Q", **options):
        super().__init__(tokenizer, **options)
        self.ask = ask

    def segments(self, row):
        return [Segment(f"{self.ask}: {row['question']} "), Segment(row["answer"], is_trained=True)]


class HasItsOwnArguments(Question):
    name = "own"

    def __init__(self, tokenizer):
        super().__init__(tokenizer)


class AsksOtherwise(Question):
    name = "otherwise"

    def prompt(self, question):
        return self.make_prompt([Segment(f"Question: {question}\nA: ")])


class TurnsTextIntoTokens(Question):
    name = "tokens"

    def segments(self, row):
        return [
            Segment(f"Q: {row['question']}\nA: "),
            *self.text.split_special(row["answer"], is_trained=True),
        ]


class KeepsAnObject(Question):
    name = "object"

    def template_spec(self):
        return super().template_spec() | {"made": {1: "a"}}


class StopsNowhere(Question):
    name = "nowhere"

    def template_spec(self):
        return super().template_spec() | {"stop": []}


class NeverEnds(Question):
    name = "never"
    adds_eos = False


class TakesAnything(Question):
    name = "anything"
    roles = ()
    optional_roles = ("question", "answer")

    @classmethod
    def read_row(cls, row, columns=None):
        return {"question": str(row.get("question")), "answer": str(row.get("answer", "-"))}, []


class TakesHalves(TakesAnything):
    name = "halves"
    roles = ("question",)
    optional_roles = ("answer",)


BREAKING = {
    WithoutName: ["It has no name of its own."],
    Inherited: ["template_spec() says kind 'test_formatter_plugins.Inherited'"],
    TakesABuiltInsName: ["the name 'chat' of a built-in formatter"],
    TakesATemplatesName: ["the name 'alpaca-zh' of a built-in template"],
    DropsTheQuestion: ["Row 1 has 'The question of row 1 is a sentence.', and its example does"],
    SaysTheSame: ["Two different rows become the same example.", "its example does not"],
    ForgetsAnOption: ["template_spec() leaves something out"],
    HasItsOwnArguments: ["It raised TypeError"],
    AsksOtherwise: ["'Question: The question of row 1 is a sentence."],
    TurnsTextIntoTokens: ["A row that spells '<|im_end|>' out gets one more end token."],
    KeepsAnObject: ["comes back otherwise from JSON"],
    StopsNowhere: ["template_spec()['stop'] lacks the end token"],
    NeverEnds: ["not the end token"],
    TakesHalves: ["A row without 'question' is accepted."],
}
OPTIONS = {ForgetsAnOption: {"ask": "Ask"}}


@pytest.mark.parametrize("kind", BREAKING, ids=lambda kind: kind.__name__)
def test_each_broken_promise_is_noticed(kind):
    with pytest.raises(ContractError) as caught:
        check_formatter(kind, options=OPTIONS.get(kind))
    assert str(caught.value).startswith(f"Formatter {kind.name!r} (test_formatter_plugins.")
    for phrase in BREAKING[kind]:
        assert phrase in str(caught.value)
