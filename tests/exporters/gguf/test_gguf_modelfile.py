"""The Modelfile says what the model was trained on; a small Go-template reader checks it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gguf_tiny as tiny
from qlora_kit.data import AlpacaFormatter, ChatFormatter
from qlora_kit.exporters.gguf.modelfile import (
    _CHAT_LAYOUTS,
    Modelfile,
    _to_go,
    describe_prompt,
    write_modelfile,
)

ALPACA = {
    "kind": "alpaca",
    "name": "alpaca",
    "prompt_input": "Below.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n",
    "prompt_no_input": "Below.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    "suffix": "",
    "system": None,
    "stop": ["<|im_end|>"],
    "eos_token": "<|im_end|>",
    "response_only": True,
}


def render_go(template: str, **values: str) -> str:
    """The few constructs the Modelfiles use: fields, string literals, ``if`` and ``end``."""
    out, shown = [], [True]
    for literal, action in re.findall(
        r"((?:(?!\{\{).)*)(?:\{\{ (.*?) \}\}|$)", template, re.DOTALL
    ):
        if all(shown):
            out.append(literal)
        if action.startswith("if ."):
            shown.append(bool(values.get(action[4:])))
        elif action == "end":
            shown.pop()
        elif action.startswith("."):
            out.append(values.get(action[1:], "") if all(shown) else "")
        elif action.startswith('"'):
            out.append(action[1:-1] if all(shown) else "")
        else:
            assert not action, f"an unknown action: {action}"
    assert shown == [True]
    return "".join(out)


@pytest.mark.parametrize(
    ("arguments", "system"),
    [
        ({}, None),
        ({"template": "alpaca-zh"}, None),
        ({"template": "Q: {instruction}\n{input}\nA: {output}<|im_end|>"}, None),
        ({"template": "{{json}} {instruction} {input} ->{output}\n"}, None),
        ({"system": 'You are {"terse"}.'}, 'You are {"terse"}.'),
        ({"eos_token": "<|endoftext|>"}, None),
    ],
)
def test_ollama_would_ask_as_the_alpaca_formatter_does(arguments, system):
    tokenizer = tiny.byte_level_tokenizer()
    formatter = AlpacaFormatter(tokenizer, **arguments)
    found = describe_prompt(formatter.template_spec(), tokenizer, (tokenizer.eos_token_id,))
    asked = render_go(found.template, Prompt="Say {hi}.", System=found.system or "")
    prompt = str(formatter.prompt("Say {hi}."))
    end = formatter.template_spec()["suffix"] + formatter.eos_token
    assert asked == prompt + end
    assert found.system == system
    assert formatter.eos_token in found.stop
    assert tokenizer.eos_token in found.stop


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ollama_would_ask_as_the_chat_formatter_does(system):
    tokenizer = tiny.byte_level_tokenizer()
    for template in (None, ZEPHYR, LLAMA3):
        formatter = ChatFormatter(tokenizer, chat_template=template, system=system)
        found = describe_prompt(formatter.template_spec(), tokenizer, (0,))
        asked = render_go(found.template, Prompt="Hi", System=found.system or "", Response="#")
        assert asked.split("#")[0] == str(formatter.prompt("Hi"))
        assert found.system == system
        assert formatter.eos_token in found.stop
        assert "<|endoftext|>" in found.stop


def test_an_alpaca_prompt_is_rendered_as_it_was_trained():
    tokenizer = tiny.byte_level_tokenizer()
    found = describe_prompt(ALPACA, tokenizer, (2, 0))
    prompt = ALPACA["prompt_no_input"].format(instruction="Say {hi} {{x}}.")
    assert render_go(found.template, Prompt="Say {hi} {{x}}.") == prompt + "<|im_end|>"
    assert found.system is None
    assert found.stop == ("<|im_end|>", "<|endoftext|>")
    assert "'alpaca'" in found.origin


def test_the_formatters_system_text_becomes_the_system_line():
    tokenizer = tiny.byte_level_tokenizer()
    system = "You are {terse}."
    filled = "You are {{terse}}.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    spec = ALPACA | {"prompt_no_input": filled, "prompt_input": filled, "system": system}
    found = describe_prompt(spec, tokenizer)
    assert found.system == system
    rendered = render_go(found.template, System=found.system, Prompt="Hi")
    assert rendered == filled.format(instruction="Hi") + "<|im_end|>"
    assert render_go(found.template, System="Else.", Prompt="Hi").startswith("Else.\n\n###")


def test_a_template_with_one_prompt_leaves_its_input_empty():
    spec = ALPACA | {"prompt_no_input": None, "prompt_input": "Q: {instruction}{input}\nA:"}
    found = describe_prompt(spec | {"suffix": "\n"}, tiny.byte_level_tokenizer())
    assert render_go(found.template, Prompt="Hi", Response=" Ho") == "Q: Hi\nA: Ho\n<|im_end|>"


@given(text=st.text(max_size=30), instruction=st.text(alphabet="ab {}", max_size=8))
def test_any_literal_text_survives_both_template_languages(text, instruction):
    escaped = text.replace("{", "{{").replace("}", "}}")
    go = _to_go(escaped + "{instruction}" + escaped, {"instruction": "{{ .Prompt }}"})
    assert render_go(go, Prompt=instruction) == text + instruction + text


class Chat:
    """A tokenizer with a chat template, and nothing else."""

    bos_token_id = 1

    def __init__(self, template, bos="<s>", eos="</s>", *, adds_bos=True):
        self.chat_template, self.bos_token, self.eos_token = template, bos, eos
        self.adds_bos = adds_bos

    def __call__(self, text):
        return {"input_ids": [1, 9] if self.adds_bos else [9]}

    def convert_ids_to_tokens(self, index):
        return f"<{index}>"

    def apply_chat_template(self, messages, **settings):
        return tiny.byte_level_tokenizer().apply_chat_template(messages, **settings)


ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{% endif %}"
)
DEFAULTED = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    + tiny.CHAT
)


@pytest.mark.parametrize(
    ("template", "name", "system"),
    [
        (tiny.CHAT, "ChatML", None),
        (DEFAULTED, "ChatML", "You are kind."),
        (ZEPHYR, "Zephyr", None),
        (GEMMA, "Gemma", None),
        (LLAMA3, "Llama 3", None),
    ],
)
def test_chat_templates_are_recognized_by_what_they_render(template, name, system):
    tokenizer = Chat(template)
    found = describe_prompt(None, tokenizer, (7,))
    assert name in found.origin
    assert found.system == system
    messages = [{"role": "user", "content": "Hi"}]
    jinja = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    layout = next(layout for layout in _CHAT_LAYOUTS if layout.name == name)
    rendered = render_go(found.template, System=found.system or "", Prompt="Hi")
    assert rendered == jinja + layout.assistant[1]
    assert found.stop == ("<7>", "</s>")


def test_the_beginning_token_is_left_to_llama_cpp():
    template = "{{ bos_token }}" + LLAMA3
    assert "Llama 3" in describe_prompt(None, Chat(template)).origin
    assert "<s>" not in describe_prompt(None, Chat(template)).template
    # Where llama.cpp adds none, a template that wants it cannot be written.
    assert "as they are" in describe_prompt(None, Chat(template, adds_bos=False)).origin
    assert "Llama 3" in describe_prompt(None, Chat(LLAMA3, adds_bos=False)).origin
    # SmolLM2's beginning token is also what begins its turns.
    assert "ChatML" in describe_prompt(None, Chat(tiny.CHAT, bos="<|im_start|>")).origin


def test_a_chat_formatters_own_template_and_system_come_first():
    spec = {"chat_template": ZEPHYR, "system": "Be brief.", "stop": ["</s>"]}
    found = describe_prompt(spec, Chat(tiny.CHAT))
    assert "Zephyr" in found.origin
    assert found.system == "Be brief."


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}!{% endfor %}"])
def test_what_is_not_recognized_is_passed_on_raw_and_said(template):
    found = describe_prompt(None, Chat(template))
    assert render_go(found.template, Prompt="x", Response="y") == "xy"
    assert "as they are" in found.origin


def test_the_file_names_every_gguf_and_refuses_what_it_cannot_quote():
    text = write_modelfile(
        Modelfile("T {{ .Prompt }}", "S", ("</s>", "\n"), "Why."), ["a.gguf", "b.gguf"]
    )
    assert text is not None
    lines = text.splitlines()
    assert "FROM ./a.gguf" in lines
    assert "# FROM ./b.gguf" in lines
    assert 'TEMPLATE """T {{ .Prompt }}"""' in lines
    assert 'SYSTEM """S"""' in lines
    assert 'PARAMETER stop "</s>"' in lines
    assert 'PARAMETER stop """' in lines
    assert write_modelfile(Modelfile('"""', None, (), ""), ["a.gguf"]) is None


@pytest.mark.parametrize("kind", ["TextFormatter", "PromptCompletionFormatter"])
def test_rendered_texts_are_passed_on_as_they_are_beside_a_chat_template(tiny_llama, kind):
    from transformers import AutoTokenizer

    from qlora_kit import data

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert "ChatML" in describe_prompt(None, tokenizer).origin
    found = describe_prompt(getattr(data, kind)(tokenizer).template_spec(), tokenizer)
    assert found.template == "{{ .Prompt }}{{ .Response }}"
    assert "rendered texts" in found.origin
