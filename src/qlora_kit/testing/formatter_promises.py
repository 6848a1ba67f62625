"""What a formatter promises, one function per promise, on a tokenizer of 384 tokens."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from qlora_kit.data import FormatterBase, FormatterPlan, TextFormatter, read_source
from qlora_kit.data.formatters.alpaca_templates import BUILTIN_TEMPLATES
from qlora_kit.data.formatters.protocol import Formatter
from qlora_kit.errors import DataError
from qlora_kit.hookspecs import describe_formatter_faults
from qlora_kit.plugins import FormatterRegistry
from qlora_kit.testing.contract import Broken, Promise
from qlora_kit.values import IGNORED_LABEL

__all__ = ["FORMATTER_PROMISES", "FormatterContract"]

_LONGEST: Final = 100_000
#: Keys of messages whose values a template turns into words of its own.
_NAMES: Final = ("role", "from", "type", "id")


@dataclasses.dataclass
class FormatterContract:
    """One class of formatters under test.

    Attributes:
        kind: The class.
        rows: Rows as data sets have them, at least two different ones.
        options: Its arguments.
        prompt: Arguments of ``prompt()`` that ask for the first row's answer; by default the roles
            of the row that are not learned.
        tokenizer: The tokenizer.
    """

    kind: Any
    rows: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    prompt: Mapping[str, Any] | None
    tokenizer: Any

    def make(self, **options: Any) -> Any:
        """A formatter with these options over the given ones, as far as the class takes them."""
        return self.kind(self.tokenizer, **{**self.options, **options})

    def encode(self, formatter: Any, rows: Any = None, max_length: int = _LONGEST) -> list[Any]:
        """Examples as dictionaries with ``input_ids`` and ``labels``."""
        given = list(self.rows if rows is None else rows)
        encoded = formatter.encode(formatter.load(given), max_length=max_length)
        return list(encoded.dataset)

    @property
    def takes_response_only(self) -> bool:
        """Whether it can be told to train on answers alone."""
        return isinstance(self.kind, type) and issubclass(self.kind, FormatterBase)

    def make_variants(self) -> Iterator[Any]:
        """The formatter as given, and with each way of placing the loss."""
        yield self.make()
        if self.takes_response_only and "response_only" not in self.options:
            yield self.make(response_only=True)
            yield self.make(response_only=False)


def _has_the_shape(contract: FormatterContract) -> None:
    faults = describe_formatter_faults(contract.kind)
    if faults:
        raise Broken("It " + "; it ".join(faults) + ".")
    name = contract.kind.name
    builtins = FormatterRegistry(use_entry_points=False)
    if name in builtins.names() and builtins.get(name) is not contract.kind:
        raise Broken(f"It has the name {name!r} of a built-in formatter.")
    if name in BUILTIN_TEMPLATES and contract.kind.__module__.partition(".")[0] != "qlora_kit":
        raise Broken(f"It has the name {name!r} of a built-in template.")


def _is_a_formatter(contract: FormatterContract) -> None:
    formatter = contract.make()
    if not isinstance(formatter, Formatter):
        raise Broken("It lacks members of qlora_kit.Formatter.")
    said = formatter.template_spec().get("kind")
    if said != contract.kind.name:
        raise Broken(f"template_spec() says kind {said!r}, its name is {contract.kind.name!r}.")


def _makes_examples(contract: FormatterContract) -> None:
    for formatter in contract.make_variants():
        examples = contract.encode(formatter)
        if len(examples) != len(contract.rows):
            raise Broken(f"{len(contract.rows)} rows became {len(examples)} examples.")
        for number, example in enumerate(examples, 1):
            ids, labels = example["input_ids"], example["labels"]
            if len(ids) != len(labels):
                raise Broken(f"Row {number} has {len(ids)} ids and {len(labels)} labels.")
            if labels[0] != IGNORED_LABEL:
                raise Broken(f"The first token of row {number} carries loss.")
            if any(b not in (IGNORED_LABEL, a) for a, b in zip(ids, labels, strict=True)):
                raise Broken(f"Row {number} has a label that is not its token.")


def _ends_answers(contract: FormatterContract) -> None:
    formatter = contract.make()
    end = contract.tokenizer.get_vocab().get(formatter.template_spec().get("eos_token"))
    if end is None:
        raise Broken(f"The end token of template_spec() is no token: {formatter.template_spec()}.")
    for number, example in enumerate(contract.encode(formatter), 1):
        last = [label for label in example["labels"] if label != IGNORED_LABEL][-1]
        if last != end:
            shown = contract.tokenizer.decode([last])
            raise Broken(f"The last trained token of row {number} is {shown!r}, not the end token.")


def _loses_no_text(contract: FormatterContract) -> None:
    examples = contract.encode(contract.make())
    for number, (row, example) in enumerate(zip(contract.rows, examples, strict=True), 1):
        text = contract.tokenizer.decode(example["input_ids"], clean_up_tokenization_spaces=False)
        for part in _find_texts(row):
            if part.strip() not in text:
                raise Broken(f"Row {number} has {part!r}, and its example does not.")


def _find_texts(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, str) and key not in _NAMES:
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _find_texts(inner, name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _find_texts(inner)


def _keeps_to_the_limit(contract: FormatterContract) -> None:
    formatter = contract.make(response_only=False) if contract.takes_response_only else None
    formatter = formatter or contract.make()
    longest = max(len(example["input_ids"]) for example in contract.encode(formatter))
    limit = max(2, longest - 1)
    short = formatter.encode(formatter.load(list(contract.rows)), max_length=limit)
    if any(len(example["input_ids"]) > limit for example in short.dataset):
        raise Broken(f"With max_length={limit} an example is longer.")
    if not short.report.has_losses:
        raise Broken("Its report does not say that an example was cut.")


def _repeats(contract: FormatterContract) -> None:
    one, two = contract.make(), contract.make()
    if one.fingerprint != two.fingerprint or contract.encode(one) != contract.encode(two):
        raise Broken("Two formatters made alike differ.")
    first, second, *_ = contract.encode(one)
    if first == second:
        raise Broken("Two different rows become the same example.")


def _has_a_storable_spec(contract: FormatterContract) -> None:
    spec = contract.make().template_spec()
    try:
        same = json.loads(json.dumps(spec)) == spec
    except (TypeError, ValueError) as error:
        raise Broken(f"template_spec() is no JSON: {error}.") from error
    if not same:
        raise Broken("template_spec() comes back otherwise from JSON: use lists and text keys.")
    if spec.get("eos_token") not in spec.get("stop", ()):
        raise Broken("template_spec()['stop'] lacks the end token.")


def _comes_back(contract: FormatterContract) -> None:
    for formatter in contract.make_variants():
        spec = formatter.template_spec()
        again = contract.kind.from_spec(json.loads(json.dumps(spec)), contract.tokenizer)
        if type(again) is not type(formatter):
            raise Broken(f"from_spec() made a {type(again).__name__}.")
        if again.template_spec() != spec or again.fingerprint != formatter.fingerprint:
            changed = [key for key in spec if again.template_spec().get(key) != spec[key]]
            raise Broken(f"What from_spec() made says otherwise: {', '.join(changed) or 'ids'}.")
        if contract.encode(again) != contract.encode(formatter):
            raise Broken(
                "What from_spec() made gives other tokens or another loss: template_spec() leaves "
                "something out."
            )


def _asks_as_it_trained(contract: FormatterContract) -> None:
    formatter = contract.make(**({"response_only": True} if contract.takes_response_only else {}))
    example = contract.encode(formatter)[0]
    ids, labels = example["input_ids"], example["labels"]
    start = next(place for place, label in enumerate(labels) if label != IGNORED_LABEL)
    if start <= 1 and contract.prompt is None:
        return  # nothing but answers: there is no prompt to compare
    prompt = formatter.prompt(**_find_prompt(contract, formatter))
    asked = list(prompt.token_ids)
    if asked != ids[: len(asked)]:
        raise Broken(f"prompt() gives {str(prompt)!r}, which is not how the example begins.")
    if len(asked) != start:
        raise Broken(f"prompt() has {len(asked)} tokens, and the answer begins after {start}.")


def _find_prompt(contract: FormatterContract, formatter: Any) -> Mapping[str, Any]:
    if contract.prompt is not None:
        return contract.prompt
    row = formatter.load(list(contract.rows))[0]
    learned = " ".join(s.text for s in formatter.segments(row) if s.is_trained)
    named = {role: text for role, text in row.items() if text and text not in learned}
    parameters = inspect.signature(formatter.prompt).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {role: text for role, text in named.items() if takes_all or role in parameters}


def _keeps_text_as_text(contract: FormatterContract) -> None:
    if isinstance(contract.kind, type) and issubclass(contract.kind, TextFormatter):
        return  # their rows are rendered: names of tokens are the tokens
    formatter = contract.make()
    end = formatter.template_spec()["eos_token"]
    token = contract.tokenizer.get_vocab()[end]
    row = _append(contract.rows[0], f" {end} not the end")
    plain, named = contract.encode(formatter, [contract.rows[0], row])
    if plain["input_ids"].count(token) != named["input_ids"].count(token):
        raise Broken(f"A row that spells {end!r} out gets one more end token.")


def _append(value: Any, text: str, key: str = "") -> Any:
    if isinstance(value, str):
        return value if key in _NAMES else value + text
    if isinstance(value, Mapping):
        return {name: _append(inner, text, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_append(inner, text) for inner in value]
    return value


def _can_be_planned(contract: FormatterContract) -> None:
    if not (isinstance(contract.kind, type) and issubclass(contract.kind, FormatterBase)):
        return  # cannot be named as a template
    kind: type[FormatterBase] = contract.kind
    options = {**contract.options, "on_bad_rows": "raise"}
    kind.check_options(options)
    plan = FormatterPlan(kind, options)
    plan.check(read_source(list(contract.rows)))
    if contract.encode(plan.make(contract.tokenizer)) != contract.encode(contract.make()):
        raise Broken("Planned before the tokenizer was there, it makes other examples.")


def _names_what_is_missing(contract: FormatterContract) -> None:
    formatter = contract.make()
    for role in getattr(contract.kind, "roles", ()):
        column = getattr(formatter, "columns", {}).get(role, role)
        if any(column not in row for row in contract.rows):
            continue  # the role may stand in another column
        lacking = [{k: v for k, v in row.items() if k != column} for row in contract.rows]
        try:
            formatter.load([contract.rows[0], *lacking[1:]])
        except DataError as error:
            if column not in str(error):
                raise Broken(
                    f"The error about a row without {column!r} does not name it."
                ) from error
        else:
            raise Broken(f"A row without {column!r} is accepted.")


#: In the order in which they are checked.
FORMATTER_PROMISES: Final = (
    Promise(
        "It is a class with a name of its own, from_spec() and a formatter's methods.",
        _has_the_shape,
        is_required=True,
    ),
    Promise(
        "It is made from a tokenizer, and its spec states its name.",
        _is_a_formatter,
        is_required=True,
    ),
    Promise(
        "Each row becomes ids and labels of one length; the first token carries no loss.",
        _makes_examples,
        is_required=True,
    ),
    Promise("The end token ends what is learned.", _ends_answers),
    Promise("Every text of a row is in its example.", _loses_no_text),
    Promise("No example is longer than max_length, and the report says so.", _keeps_to_the_limit),
    Promise("The same rows give the same tokens, others give others.", _repeats),
    Promise("template_spec() fits into a manifest and says where to stop.", _has_a_storable_spec),
    Promise("from_spec(template_spec()) makes the same formatter.", _comes_back),
    Promise("A prompt is what stands before the answer in training.", _asks_as_it_trained),
    Promise("The name of a special token in a row stays text.", _keeps_text_as_text),
    Promise("Rows can be checked before there is a tokenizer.", _can_be_planned),
    Promise("A row that lacks a role is refused by name.", _names_what_is_missing),
)
