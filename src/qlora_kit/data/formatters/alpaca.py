"""Alpaca rows: an instruction, an optional input, an answer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qlora_kit.data.formatters.alpaca_templates import AlpacaTemplate, resolve_template
from qlora_kit.data.formatters.chat_messages import read_json
from qlora_kit.data.formatters.formatter_base import FormatterBase, SpecialTokens
from qlora_kit.data.sources.row_problems import BadRowPolicy, check_text
from qlora_kit.data.sources.rows import Rows, is_filled
from qlora_kit.data.tokens.segments import Prompt, Segment
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["AlpacaFormatter"]

logger = logging.getLogger(__name__)

_Prompts = tuple[list[Segment], list[Segment]]
#: How many system texts are kept compiled.
_MOST_SYSTEMS = 1000


class AlpacaFormatter(FormatterBase):
    """Formats ``instruction``, ``input``, ``output`` rows, for training and for prompts.

    The prompt and the answer are tokenized apart and joined as ids, so the boundary of the
    loss is exact and a prompt for generation is what training saw. Text of a row that looks
    like a special token stays text. The tokenizer's beginning token comes first, once, if it
    adds one; the end token comes last, once, and always carries loss.

    Args:
        tokenizer: The model's tokenizer.
        template: ``"alpaca"`` (Stanford's wording, the default), ``"alpaca-zh"``, a text with
            ``{instruction}``, ``{input}`` and ``{output}``, or an
            :class:`~qlora_kit.data.AlpacaTemplate`. Special tokens in a template count as such.
        response_only: Whether only the answers carry loss, or the prompts too.
        eos_token: The token that ends an answer; the tokenizer's own end token by default.
        columns: Which column holds which role, for data whose columns are named differently:
            ``{"instruction": "question", "output": "answer"}``.
        system: Text in place of the template's opening sentence, where it has ``{system}``.
        on_bad_rows: What :meth:`load` does about rows it cannot use: ``"raise"`` or ``"skip"``.
        max_reported_rows: How many bad rows a message lists one by one.
        special_tokens: Whether the name of a special token in a row stays ``"text"`` or becomes
            the token (``"tokens"``).

    Raises:
        ConfigError: When an argument cannot work.
    """

    name = "alpaca"
    roles = ("instruction", "output")
    optional_roles = ("input", "system", "history")
    # Dolly's names.
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input": ("context",),
        "output": ("response",),
    }

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | AlpacaTemplate | None = None,
        *,
        response_only: bool = False,
        eos_token: str | None = None,
        columns: Mapping[str, str] | None = None,
        system: str | None = None,
        on_bad_rows: BadRowPolicy = "raise",
        max_reported_rows: int = 10,
        special_tokens: SpecialTokens = "text",
    ) -> None:
        super().__init__(
            tokenizer,
            response_only=response_only,
            eos_token=eos_token,
            columns=columns,
            on_bad_rows=on_bad_rows,
            max_reported_rows=max_reported_rows,
            special_tokens=special_tokens,
        )
        self._plain_template = resolve_template(template)
        self.system = system
        self.template = resolve_template(template).with_system(system)
        no_input = self.template.prompt_no_input
        self._prompt_input = self._compile(self.template.prompt_input)
        self._prompt_no_input = self._prompt_input if no_input is None else self._compile(no_input)
        self._turns: dict[str | None, tuple[_Prompts, _Prompts]] = {}
        self._answer_end, self._after = self._compile_suffix(self.template.suffix)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Self:
        """The formatter whose ``template_spec()`` this was."""
        if not spec.get("prompt_input"):
            raise ConfigError(f"The formatter spec has no 'prompt_input': {dict(spec)!r}.")
        # The spec's prompts have the system text in them already.
        formatter = cls(
            tokenizer,
            AlpacaTemplate(
                name=spec.get("name", "custom"),
                prompt_input=spec["prompt_input"],
                prompt_no_input=spec.get("prompt_no_input"),
                suffix=spec.get("suffix", ""),
            ),
            **cls.read_common(spec),
        )
        formatter.system = spec.get("system")
        own = spec.get("own_system_template")
        if isinstance(own, Mapping):
            formatter._plain_template = AlpacaTemplate(**own)
        return formatter

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse a template or a system text that cannot work, before there is a tokenizer."""
        super().check_options(options)
        resolve_template(options.get("template")).with_system(options.get("system"))

    def segments(self, row: Mapping[str, Any]) -> Sequence[Segment]:
        """Prompt, answer, and whatever the template puts between the answer and the end."""
        if row.get("system") or row.get("history"):
            return self._make_conversation(row)
        prompt = self._choose_prompt(row)
        return [
            *(s if s.is_special else Segment(s.text.format_map(row)) for s in prompt),
            Segment(row["output"] + self._answer_end, is_trained=True),
            *self._after,
        ]

    def _make_conversation(self, row: Mapping[str, Any]) -> list[Segment]:
        """A row with a system text of its own, or with turns in front of it (LLaMA-Factory's)."""
        opening, following = self._compile_turns(row.get("system") or None)
        segments: list[Segment] = []
        turns = [{"instruction": q, "input": "", "output": a} for q, a in row.get("history") or ()]
        for number, turn in enumerate([*turns, row]):
            if number:
                segments += [
                    Segment(self.eos_token, is_trained=True, is_special=True), Segment("\n\n"),
                ]  # fmt: skip
            with_input, without = following if number else opening
            prompt = with_input if turn["input"].strip() else without
            segments += (s if s.is_special else Segment(s.text.format_map(turn)) for s in prompt)
            segments += [
                Segment(turn["output"] + self._answer_end, is_trained=True), *self._after,
            ]  # fmt: skip
        return segments

    def _compile_turns(self, system: str | None) -> tuple[_Prompts, _Prompts]:
        """The prompts of a first turn under a system text, and of the turns after it.

        The system text stands where the template has its own, else in front; it is not said again.
        """
        if system not in self._turns:
            plain = self._plain_template
            is_placed = "{system}" in plain.prompt_input
            first = self.template
            if system is not None and is_placed:
                first = plain.with_system(system)
            later = plain.with_system("") if is_placed else plain.with_system(None)
            opening = self._compile_both(first)
            if system is not None and not is_placed:
                front = Segment(system.replace("{", "{{").replace("}", "}}") + "\n\n")
                opening = ([front, *opening[0]], [front, *opening[1]])
            following = self._compile_both(later)
            if is_placed:
                following = (_strip_start(following[0]), _strip_start(following[1]))
            if len(self._turns) > _MOST_SYSTEMS:
                self._turns.clear()
            self._turns[system] = (opening, following)
        return self._turns[system]

    def _compile_both(self, template: AlpacaTemplate) -> _Prompts:
        with_input = self._compile(template.prompt_input)
        without = template.prompt_no_input
        return with_input, with_input if without is None else self._compile(without)

    @classmethod
    def read_row(
        cls, row: Mapping[str, Any], columns: Mapping[str, str] | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        """The roles of a raw row; system and history only where it has them."""
        column = cls.map_columns(columns)["history"]
        history = read_json(row.get(column))
        if column in row:
            row = {name: value for name, value in row.items() if name != column}
        values, reasons = super().read_row(row, columns)
        if not values["system"]:
            del values["system"]
        del values["history"]
        if not is_filled(history):
            return values, reasons
        turns, reason = _read_history(history)
        if reason:
            reasons.append(f"{column!r} {reason}")
        elif turns:
            values["history"] = turns
        return values, reasons

    def prompt(self, instruction: str, input: str = "") -> Prompt:
        """The prompt for an instruction, with the ids that training would put there.

        Args:
            instruction: What the model is asked to do.
            input: What it is asked to do it with, if anything.

        Returns:
            Text that also carries its ``token_ids``.

        Raises:
            DataError: When the instruction is empty or either is not text.
        """
        row = {"instruction": instruction, "input": input}
        for name, value in row.items():
            if not isinstance(value, str):
                raise DataError(f"{name} must be text, got {type(value).__name__}: {value!r}.")
        if not instruction.strip():
            raise DataError("instruction is empty; say what the model should do.")
        return self.make_prompt(
            self.segments(row | {"output": ""})[: len(self._choose_prompt(row))]
        )

    def _choose_prompt(self, row: Mapping[str, Any]) -> list[Segment]:
        return self._prompt_input if row["input"].strip() else self._prompt_no_input

    def review_rows(self, rows: Rows) -> None:
        """Say when answers bring an end token along as text, and when inputs are left out."""
        left_out = sum(bool(row.get("input")) for row in rows)
        if left_out and "{input}" not in self.template.prompt_input:
            logger.warning(
                "%s rows of %s have an input, for which the template has no {input}: it is left "
                "out of training and prompts.",
                f"{left_out:,}",
                rows.source,
            )
        count = sum(row["output"].rstrip().endswith(self.eos_token) for row in rows)
        if count:
            logger.warning(
                "%s answers of %s end with the text %r. It stays text; the formatter adds the "
                "token itself. Remove it from the data, or the model learns to write it out.",
                f"{count:,}",
                rows.source,
                self.eos_token,
            )

    def template_spec(self) -> dict[str, Any]:
        """The template and its tokens as JSON values; ``formatter_from_spec`` reads it back.

        ``prompt_input`` and ``prompt_no_input`` are format strings that end where the answer
        begins; ``suffix`` stands between the answer and the end token.
        """
        return super().template_spec() | {
            "name": self.template.name,
            "prompt_input": self.template.prompt_input,
            "prompt_no_input": self.template.prompt_no_input,
            "suffix": self.template.suffix,
            "system": self.system,
            # Where rows bring system texts of their own, {system} has to be there still.
            "own_system_template": dataclasses.asdict(self._plain_template),
        }

    def _compile(self, prompt: str) -> list[Segment]:
        """A prompt's format string cut at the special tokens its own text names."""
        from string import Formatter as FormatParser

        parts = [
            (literal, "" if name is None else "{" + name + "}")
            for literal, name, _, _ in FormatParser().parse(prompt)
        ]
        segments: list[Segment] = []
        text = ""
        for literal, placeholder in parts:
            for piece in self.text.split_special(literal):
                if piece.is_special:
                    segments += [Segment(text), piece]
                    text = ""
                else:
                    text += piece.text.replace("{", "{{").replace("}", "}}")
            text += placeholder
        segments.append(Segment(text))
        return [segment for segment in segments if segment.text]

    def _compile_suffix(self, suffix: str) -> tuple[str, list[Segment]]:
        """Text that joins the answer, and the segments after it, without the end token."""
        segments = self.text.split_special(suffix, is_trained=True)
        ends = [i for i, s in enumerate(segments) if s.is_special and s.text == self.eos_token]
        if ends:
            rest = "".join(segment.text for segment in segments[ends[0] + 1 :])
            if rest.strip():
                raise ConfigError(
                    f"The template goes on after the end token {self.eos_token!r} with {rest!r}, "
                    "which a model that has stopped never writes. End the template there, or "
                    "choose another eos_token."
                )
            segments = segments[: ends[0]]
        if segments and not segments[0].is_special:
            return segments[0].text, segments[1:]
        return "", segments


def _strip_start(segments: list[Segment]) -> list[Segment]:
    """A prompt without the empty lines that an empty system text leaves in front."""
    if not segments or segments[0].is_special:
        return segments
    return [segments[0]._replace(text=segments[0].text.lstrip()), *segments[1:]]


def _read_history(history: Any) -> tuple[list[list[str]], str | None]:
    """Earlier turns as pairs of a question and its answer, and what is wrong with them."""
    if not isinstance(history, list | tuple):
        return [], f"is not a list of pairs but {type(history).__name__}"
    turns = []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            return [], f"has an entry {number} that is not a pair of a question and an answer"
        reason = check_text(pair[0]) or check_text(pair[1])
        if reason:
            return [], f"has a text in entry {number} that {reason}"
        turns.append(list(pair))
    return turns, None


@hookimpl
def qlora_kit_register_formatters() -> list[type[AlpacaFormatter]]:
    """The built-in formatter of this module."""
    return [AlpacaFormatter]
