"""``generate`` over a file: every row is asked, and what an earlier run answered is kept."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from qlora_kit.cli.asking import AskingForm, AskingPlan, read_form
from qlora_kit.data.formatters.chat_messages import read_json
from qlora_kit.data.formatters.chat_rows import read_conversation
from qlora_kit.errors import ConfigError, DataError, QloraKitError
from qlora_kit.file_locks import take_lock

__all__ = ["Question", "add_file_flags", "answer_file", "read_questions"]

#: Columns that hold a conversation; a text in the last one is a plain prompt.
_CHATS: Final = ("messages", "conversations", "prompt")


class Question(NamedTuple):
    """A row that can be asked.

    Attributes:
        row: Its number in the input, from 0.
        asked: What of it is asked: text, messages, or an instruction with its input.
    """

    row: int
    asked: dict[str, Any]


def add_file_flags(parser: Any) -> None:
    """The flags that belong to files of rows."""
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="answer every row of the file --input, as JSON lines; a half-written file is "
        "finished",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="begin an --output anew")
    parser.add_argument(
        "--at-once", type=int, default=64, metavar="N", help="most answers at the same time (64)"
    )
    parser.add_argument(
        "--on-bad-rows", choices=("raise", "skip"), default="raise",
        help="what to do about rows that cannot be asked (raise)",
    )  # fmt: skip


def read_questions(source: str, *, on_bad_rows: str) -> list[Question]:
    """The rows of a file that can be asked, of any of the known kinds.

    Raises:
        DataError: When there is none, or when some cannot be asked and are not to be skipped.
    """
    from qlora_kit.data import read_source

    rows = read_source(source).rows
    found: list[Question] = []
    problems: list[str] = []
    replied = 0
    for number, row in enumerate(rows):
        asked = row.problem or _read_row(row.value)
        if isinstance(asked, str):
            problems.append(f"{row.location}: {asked}")
        else:
            replied += bool(asked.pop("_had_answer", False))
            found.append(Question(number, asked))
    shown = "; ".join(problems[:5]) + ("; and others" if len(problems) > 5 else "")
    if problems and on_bad_rows == "raise":
        raise DataError(
            f"{len(problems)} of {len(rows)} rows cannot be asked: {shown}. Mend them, or give "
            "--on-bad-rows skip."
        )
    if problems:
        sys.stderr.write(f"Skipped {len(problems)} of {len(rows)} rows: {shown}.\n")
    if replied:
        sys.stderr.write(
            f"{replied} conversations end with an answer, which is left out: what was said before "
            "it is asked.\n"
        )
    if not found:
        raise DataError(f"{source} has no row that can be asked.")
    return found


def _read_row(row: Any) -> dict[str, Any] | str:
    """What a row asks, or why it asks nothing."""
    if isinstance(row, str):
        return {"prompt": row} if row.strip() else "an empty prompt"
    if not isinstance(row, Mapping):
        return f"a row is a dictionary or a text, not {type(row).__name__}"
    for column in _CHATS:
        if isinstance(read_json(row.get(column)), list):
            return _read_chat(row, column)
    if row.get("instruction"):
        texts = {name: row.get(name) or "" for name in ("instruction", "input")}
        bad = [name for name, text in texts.items() if not isinstance(text, str)]
        return f"{bad[0]} is no text" if bad else texts
    if not row.get("prompt"):
        return "none of instruction, messages or prompt is there; its columns are " + (
            ", ".join(map(str, row)) or "none"
        )
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        return "prompt is no text"
    return {"prompt": row["prompt"]}


def _read_chat(row: Mapping[str, Any], column: str) -> dict[str, Any] | str:
    # What is read for training ends with an answer; so does this, until it is read.
    reply = {"role": "assistant", "content": "."}
    parsed, reasons = read_conversation({**row, column: [*read_json(row[column]), reply]}, column)
    if reasons:
        return ", ".join(reasons)
    messages = list(parsed["messages"][:-1])
    had_answer = bool(messages) and messages[-1]["role"] == "assistant"
    if had_answer:
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        return "the conversation asks nothing"
    beside = {name: parsed[name] for name in ("tools", "chat_template_kwargs") if parsed.get(name)}
    return {"messages": messages, **beside, "_had_answer": had_answer}


def answer_file(options: argparse.Namespace, load: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Answer what a file asks and write it to another.

    Args:
        options: The command's.
        load: Loads the model; called after everything else was checked.
        settings: Of generation, ``max_new_tokens`` included.

    Returns:
        What was done, in numbers.
    """
    if not options.input:
        raise ConfigError("--output goes with --input, a file of rows to answer.")
    if options.at_once < 1:
        raise ConfigError(f"--at-once must be at least 1, got {options.at_once}.")
    output: Path = options.output
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"--output is a file in a folder that exists, got {output}.")
    if output.exists() and Path(options.input).exists() and output.samefile(options.input):
        raise ConfigError("--output is the file that --input names. Give another one.")
    plan = read_form(options)
    questions = read_questions(options.input, on_bad_rows=options.on_bad_rows)
    asked = {"template": options.template, "system": options.system, **settings}
    by = {name: value for name, value in asked.items() if value is not None}
    head = {"model": str(options.model), "settings": by}
    with _sole_writer(output):
        return _answer(options, load, settings, questions, plan, head)


@contextlib.contextmanager
def _sole_writer(output: Path) -> Iterator[None]:
    """Refuse an output that another process is at.

    Raises:
        ConfigError: When there is one.
    """
    lock = None
    # Pipes and devices have many writers; where nothing can be locked, opening it says what is.
    if not output.exists() or output.is_file():
        with contextlib.suppress(OSError):
            lock = take_lock(output.with_name(f".{output.name}.lock"))
            if lock is None:
                raise ConfigError(
                    f"Another process is answering into {output}. Give another --output."
                )
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _answer(
    options: argparse.Namespace,
    load: Any,
    settings: dict[str, Any],
    questions: Sequence[Question],
    plan: AskingPlan,
    head: Mapping[str, Any],
) -> dict[str, Any]:
    """What no other process may do to the same file meanwhile."""
    output: Path = options.output
    done = 0 if options.overwrite else _count_done(output, questions, head)
    left = questions[done:]
    if done:
        sys.stderr.write(f"{output} has {done} of {len(questions)} answers; going on.\n")
    if left:
        from qlora_kit import generate_batch

        model = load(options)
        form = plan.complete(model)
        if settings.get("seed") is not None:
            # Each answer has the seed of its place, wherever the file was left.
            settings = {**settings, "seed": settings["seed"] + done}
        answers = generate_batch(
            model, [_ask(form, question) for question in left], at_once=options.at_once,
            progress=True, **settings,
        )  # fmt: skip
        _write(output, done, _describe(left, answers, head))
    return {"output": str(output), "answers": len(questions), "found_there": done}


def _ask(form: AskingForm, question: Question) -> Any:
    try:
        return form.ask(question.asked)
    except QloraKitError as error:
        raise ConfigError(f"Row {question.row}: {error}") from error


def _describe(
    questions: Sequence[Question], answers: Any, head: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    for question, answer in zip(questions, answers, strict=True):
        yield {
            "row": question.row,
            **question.asked,
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            "token_count": answer.token_count,
            **head,
        }


def _write(output: Path, done: int, lines: Iterator[dict[str, Any]]) -> None:
    try:
        with output.open("a" if done else "w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error}. The same command goes on from what is there."
        ) from error


def _count_done(output: Path, questions: Sequence[Question], head: Mapping[str, Any]) -> int:
    """How many questions an earlier output has answered; a torn last line is cut off.

    Raises:
        ConfigError: When it is something else, or was asked something else or otherwise.
    """
    if not output.exists():
        return 0
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    advice = "Give another --output, or --overwrite."
    try:
        lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        found = [
            {name: line[name] for name in ("row", *question.asked, *head)}
            for line, question in zip(lines, questions, strict=False)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{output} holds something else than answers. {advice}") from error
    for line, question in zip(found, questions, strict=False):
        # As they are read back: a tuple comes back as a list.
        expected = json.loads(json.dumps({"row": question.row, **question.asked, **head}))
        differing = [name for name in expected if expected[name] != line[name]]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{output} answers something else: {name} of row {question.row} is "
                f"{line[name]!r} there and {expected[name]!r} now. {advice}"
            )
    if len(lines) > len(questions):
        raise ConfigError(
            f"{output} has {len(lines)} answers, and {len(questions)} rows can be asked. {advice}"
        )
    if len(whole) < len(data):
        sys.stderr.write(f"The last line of {output} is torn; it is written anew.\n")
        with output.open("r+b") as file:
            file.truncate(len(whole))
    return len(lines)
