"""``chat``: a conversation in a terminal, with one model or with two side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from qlora_kit.cli.asking import AskingForm, read_form
from qlora_kit.errors import ConfigError, QloraKitError, did_you_mean

__all__ = ["Chat", "add_chat_flags", "run_chat"]

_HELP: Final = """\
/reset           forget the conversation
/system TEXT     a new system text, which begins a new conversation; without TEXT none
/compare         answers of the base beside those of the fine-tuned model, on or off
/history         what was said so far
/help            this
/exit            leave, as Ctrl-D does
A line that ends with \\ goes on in the next one; \"\"\" begins and ends several lines.
"""


def add_chat_flags(parser: Any) -> None:
    """The flags of the command besides those of the model and its template."""
    parser.add_argument(
        "--compare", nargs="?", const="", metavar="BASE",
        help="answer with another model too: BASE, or without it the model with its adapter off",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=512)


class Chat:
    """A conversation.

    Args:
        ask: Answers messages: takes them and the number of the model, yields pieces of text.
        names: What the models are called, the one whose answers are remembered first.
        write: Where text goes.
        system: The system text to begin with.
        remembers: Whether the models take whole conversations; each message is asked alone
            otherwise.
    """

    def __init__(
        self,
        ask: Callable[[list[dict[str, str]], int], Iterator[str]],
        names: tuple[str, ...],
        write: Callable[[str], object],
        *,
        system: str | None = None,
        remembers: bool = True,
        compares: bool = True,
    ) -> None:
        self._ask, self._names, self._write = ask, names, write
        self._remembers, self._compares = remembers, compares and len(names) > 1
        self._system = system
        self.messages: list[dict[str, str]] = []

    def talk(self, lines: Iterator[str]) -> None:
        """Take messages until there are no more, or until one says so."""
        for text in _join_lines(lines):
            if text.startswith("/"):
                if not self._obey(text):
                    return
            elif text.strip():
                self._answer(text)

    def _obey(self, text: str) -> bool:
        """Do what a command says; whether the conversation goes on."""
        command, _, rest = text.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command == "/reset":
            self.messages = []
            self._write("A new conversation.\n")
        elif command == "/system":
            self._set_system(rest.strip())
        elif command == "/compare":
            self._toggle()
        elif command == "/history":
            for message in self._complete():
                self._write(f"{message['role']}: {message['content']}\n")
        elif command == "/help":
            self._write(_HELP)
        else:
            known = ["/reset", "/system", "/compare", "/history", "/help", "/exit"]
            self._write(f"There is no {command}.{did_you_mean(command, known) or ' See /help.'}\n")
        return True

    def _set_system(self, text: str) -> None:
        if not self._remembers:
            self._write("This model's template has its own system text; see --system.\n")
            return
        self._system, self.messages = text or None, []
        self._write("A new conversation, " + ("with" if text else "without") + " a system text.\n")

    def _toggle(self) -> None:
        if len(self._names) == 1:
            self._write("There is no other model to compare with. Begin with --compare.\n")
            return
        self._compares = not self._compares
        self._write(f"Comparing is {'on' if self._compares else 'off'}.\n")

    def _complete(self) -> list[dict[str, str]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return system + self.messages

    def _answer(self, text: str) -> None:
        before = self.messages
        question = {"role": "user", "content": text}
        self.messages = [*(before if self._remembers else []), question]
        asked = self._complete()
        answer = ""
        for number, name in enumerate(self._names):
            if number and not self._compares:
                break
            if len(self._names) > 1 and self._compares:
                self._write(f"[{name}]\n")
            try:
                pieces = self._show(asked, number)
            except QloraKitError as error:
                # The conversation goes on as if this had not been said.
                self.messages = before
                self._write(f"{type(error).__name__}: {error}\n")
                return
            if number == 0:
                answer = pieces
        self.messages.append({"role": "assistant", "content": answer})

    def _show(self, asked: list[dict[str, str]], number: int) -> str:
        """Write an answer as it comes; Ctrl-C ends it where it is."""
        said = ""
        try:
            for piece in self._ask(asked, number):
                said += piece
                self._write(piece)
        except KeyboardInterrupt:
            self._write(" [interrupted]")
        self._write("\n")
        return said


def _join_lines(lines: Iterator[str]) -> Iterator[str]:
    """Messages of one line, or of several that are marked as such."""
    for line in lines:
        text = line.rstrip("\n")
        if text.strip().startswith('"""'):
            yield _read_block(text.strip()[3:], lines)
            continue
        while text.endswith("\\"):
            following = next(lines, None)
            text = text[:-1] + ("" if following is None else "\n" + following.rstrip("\n"))
        yield text


def _read_block(first: str, lines: Iterator[str]) -> str:
    parts = []
    text: str | None = first
    while text is not None:
        if text.rstrip().endswith('"""'):
            parts.append(text.rstrip()[:-3])
            break
        parts.append(text)
        following = next(lines, None)
        text = None if following is None else following.rstrip("\n")
    return "\n".join(parts).strip("\n")


def run_chat(
    options: argparse.Namespace, load: Callable[..., Any], settings: dict[str, Any]
) -> None:
    """Load what is talked to, and talk.

    Args:
        options: The command's.
        load: Loads a model by the options, or another one by its name.
        settings: Of generation.
    """
    plan = read_form(options)
    model = load(options)
    form = plan.complete(model)
    speakers: list[tuple[Any, AskingForm, bool]] = [(model, form, False)]
    names = [str(options.model)]
    if options.compare == "":
        if not hasattr(model.model, "disable_adapter"):
            raise ConfigError(
                f"{options.model} has no adapter to switch off. Name the other model: --compare "
                "BASE."
            )
        speakers.append((model, form, True))
        names.append("without the adapter")
    elif options.compare is not None:
        other = load(options, options.compare)
        # Asked alike, where it can be: what differs should be the weights.
        speakers.append((other, read_form(options, options.compare).complete(other), False))
        names.append(options.compare)

    def ask(messages: list[dict[str, str]], number: int) -> Iterator[str]:
        yield from _stream(*speakers[number], messages, settings)

    remembers = all(form.takes_conversations for _, form, _ in speakers)
    if not remembers:
        sys.stderr.write(
            "Asked with a template of single instructions: every message is asked by itself.\n"
        )
    chat = Chat(ask, tuple(names), _print, remembers=remembers)
    if sys.stdin.isatty():
        sys.stderr.write("/help says what there is besides talking; Ctrl-D ends.\n")
    chat.talk(_read_lines())


def _stream(
    model: Any,
    form: AskingForm,
    is_bare: bool,
    messages: list[dict[str, str]],
    settings: dict[str, Any],
) -> Iterator[str]:
    import contextlib

    from qlora_kit import generate_stream

    off = model.model.disable_adapter() if is_bare else contextlib.nullcontext()
    with off:
        for chunk in generate_stream(model, form.ask_messages(messages), **settings):
            yield chunk.text


def _read_lines() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "") + "\n"
        except EOFError:
            return


def _print(text: str) -> None:
    print(text, end="", flush=True)
