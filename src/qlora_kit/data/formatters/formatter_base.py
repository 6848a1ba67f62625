r"""What every formatter shares: reading rows, encoding them, prompts.

A formatter of your own says which columns a row has and which segments it becomes::

    class QuestionFormatter(FormatterBase):
        name = "question"
        roles = ("question", "answer")

        def segments(self, row):
            return [Segment(f"Q: {row['question']}\nA: "), Segment(row["answer"], is_trained=True)]

Loading, row checks, the beginning and end tokens, truncation, caching, previews and
statistics come with the base class.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from qlora_kit.data.formatters.row_reader import RowReader
from qlora_kit.data.sources.row_checks import RowSchema, load_rows
from qlora_kit.data.sources.row_problems import BadRowPolicy, BadRows, check_policy
from qlora_kit.data.sources.rows import Rows
from qlora_kit.data.tokens.encoding import EncodedExamples, encode_rows
from qlora_kit.data.tokens.inspection import DataReport, Preview, describe_rows, render_preview
from qlora_kit.data.tokens.segment_ids import RowEncoding, join_segments
from qlora_kit.data.tokens.segments import Prompt, Segment
from qlora_kit.data.tokens.text_tokenizer import TextTokenizer
from qlora_kit.errors import ConfigError, did_you_mean, invalid_value
from qlora_kit.hookspecs import UNNAMED_FORMATTER
from qlora_kit.messages import Setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FormatterBase", "SpecialTokens", "check_tokenizer"]

logger = logging.getLogger(__name__)

SpecialTokens = Literal["text", "tokens"]


class FormatterBase(RowReader):
    """Everything about a formatter but its text: override :meth:`segments`, set ``roles``.

    Args:
        tokenizer: The model's tokenizer.
        response_only: Whether only the answers carry loss, or the prompts too.
        eos_token: The token that ends an answer; the tokenizer's own end token by default.
        columns: Which column holds which role, for data whose columns are named differently,
            for example ``{"instruction": "question", "output": "answer"}``.
        on_bad_rows: What :meth:`load` does about rows it cannot use: ``"raise"`` or ``"skip"``.
        max_reported_rows: How many bad rows a message lists one by one.
        special_tokens: Whether the name of a special token in a row stays ``"text"`` or becomes
            the token (``"tokens"``), as for tokens that were added to be learned.

    Raises:
        ConfigError: When an argument cannot work.
    """

    #: What the spec's ``kind`` says, and ``--template`` where it is registered. A class without
    #: one of its own is no other's: its specs name the class itself.
    name: ClassVar[str] = UNNAMED_FORMATTER
    #: Whether the tokenizer's beginning-of-text token and the end token are added here; a
    #: chat template writes its own.
    adds_bos: bool = True
    adds_eos: bool = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        response_only: bool = False,
        eos_token: str | None = None,
        columns: Mapping[str, str] | None = None,
        on_bad_rows: BadRowPolicy = "raise",
        max_reported_rows: int = 10,
        special_tokens: SpecialTokens = "text",
    ) -> None:
        check_tokenizer(tokenizer)
        if special_tokens not in ("text", "tokens"):
            raise ConfigError(f"special_tokens must be 'text' or 'tokens', got {special_tokens!r}.")
        self.special_tokens = special_tokens
        if not isinstance(max_reported_rows, int) or max_reported_rows < 1:
            raise invalid_value(
                "max_reported_rows", "must be at least 1", max_reported_rows, "formatter"
            )
        self.tokenizer = tokenizer
        self.text = TextTokenizer(tokenizer)
        if not isinstance(response_only, bool):
            raise invalid_value(
                "response_only", "must be True or False", response_only, "formatter"
            )
        self.response_only = response_only
        self.read_rows_as(columns, on_bad_rows, max_reported_rows)
        self.eos_token = self._check_eos(eos_token)
        self.eos_token_id = self.text.get_token_id(self.eos_token, what="end token")
        self.text.protect(self.eos_token)

    def read_rows_as(
        self,
        columns: Mapping[str, str] | None = None,
        on_bad_rows: BadRowPolicy = "raise",
        max_reported_rows: int = 10,
    ) -> None:
        """Set how rows are read, which no spec says; arguments as in the constructor."""
        self.on_bad_rows = check_policy(on_bad_rows)
        self.max_reported_rows = max_reported_rows
        self.columns = self.map_columns(columns)
        self._named_columns = columns or {}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Self:
        """The formatter whose ``template_spec()`` this was.

        Override it together with :meth:`template_spec` where a class has options of its own.

        Args:
            spec: What ``template_spec()`` returned.
            tokenizer: The tokenizer of the model it belongs to.
        """
        return cls(tokenizer, **cls.read_common(spec))

    @staticmethod
    def read_common(spec: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments in a spec that every formatter has."""
        return {
            "response_only": spec.get("response_only", False),
            "eos_token": spec.get("eos_token"),
            **({"special_tokens": spec["special_tokens"]} if spec.get("special_tokens") else {}),
        }

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse arguments that cannot work, before there is a tokenizer.

        Raises:
            ConfigError: When the class takes no such argument.
        """
        names, kind = [], cls
        for kind in cls.__mro__:
            if "__init__" not in kind.__dict__:
                continue
            parameters = list(inspect.signature(kind.__init__).parameters.values())[2:]
            names += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
        for name, value in options.items():
            if value is not None and name not in names:
                raise ConfigError(
                    f"{name} was given, and the {cls.name!r} formatter takes none."
                    f"{did_you_mean(name, names)} It takes: {', '.join(names) or 'nothing'}."
                )

    def _check_eos(self, eos_token: str | None) -> str:
        if eos_token is not None and not isinstance(eos_token, str):
            raise invalid_value(
                "eos_token", "is a token's text, such as '</s>'", eos_token, "formatter"
            )
        eos = self.tokenizer.eos_token if eos_token is None else eos_token
        if not isinstance(eos, str) or not eos:
            raise ConfigError(
                f"The tokenizer has no end token ({eos!r}), so a model could not learn to stop.",
                advice=(
                    "Name one of its tokens: ",
                    Setting("eos_token", "<|im_end|>", "formatter"),
                    ", for example.",
                ),
            )
        return eos

    # -- what a formatter of your own overrides ------------------------------------------------

    def segments(self, row: Mapping[str, Any]) -> Sequence[Segment]:
        """The segments of one row, in order, the end token left out."""
        raise NotImplementedError(f"{type(self).__name__} must define segments(row).")

    def parse_row(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The roles of a raw row, and what is wrong with it."""
        return self.read_row(row, self._named_columns)

    def find_missing_columns(self, present: Sequence[str]) -> dict[str, str]:
        """The required roles whose column is not among those present, with that column."""
        return self.find_missing(present, self._named_columns)

    def template_spec(self) -> dict[str, Any]:
        """Everything needed to rebuild the formatter and to stop where it stops."""
        return {
            "kind": self._get_kind(),
            "name": self.name,
            "prompt_input": None,
            "prompt_no_input": None,
            "system": None,
            "stop": [self.eos_token],
            "eos_token": self.eos_token,
            "response_only": self.response_only,
            **({"special_tokens": "tokens"} if self.special_tokens == "tokens" else {}),
        }

    @classmethod
    def _get_kind(cls) -> str:
        # Under an inherited name a spec would come back as another class, without a word.
        has_name = cls.__dict__.get("name", UNNAMED_FORMATTER) != UNNAMED_FORMATTER
        return cls.name if has_name else f"{cls.__module__}.{cls.__qualname__}"

    def prompt(self, *args: Any, **kwargs: Any) -> Prompt:
        """What a model is given before it answers: the untrained start of the example.

        Takes the roles in order, or by name, the answer left out.
        """
        roles = (*self.roles, *self.optional_roles)
        row = dict.fromkeys(roles, "") | dict(zip(roles, args, strict=False)) | kwargs
        start: list[Segment] = []
        for segment in self.segments(row):
            if segment.is_trained:
                break
            start.append(segment)
        return self.make_prompt(start)

    # -- what comes with it --------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same rows would become other tokens or other loss."""
        ends = {"adds_bos": self.adds_bos, "adds_eos": self.adds_eos}
        content = json.dumps([self.template_spec(), ends], sort_keys=True) + self.text.fingerprint()
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def load(
        self,
        source: Any,
        split: str = "train",
        *,
        on_bad_rows: BadRowPolicy | None = None,
        local_files_only: bool = True,
    ) -> Rows:
        """Read and check rows.

        Args:
            source: A ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file, a folder of them, a
                ``datasets.Dataset`` (or a dictionary of splits), a list of dictionaries, or the
                name of a hub dataset that is in the local cache.
            split: Which split to take, where the source has splits.
            on_bad_rows: ``"raise"`` or ``"skip"``; the formatter's own setting by default.
            local_files_only: Never touch the network. ``False`` lets a hub dataset be downloaded.

        Returns:
            The rows, each a dictionary from role to text.

        Raises:
            DataError: When the source cannot be read, has no rows, or has bad rows and they are
                not to be skipped; all of them are reported at once, with line numbers.
            OfflineError: When a hub dataset would have to be downloaded.
        """
        policy = self.on_bad_rows if on_bad_rows is None else check_policy(on_bad_rows)
        rows = load_rows(
            source,
            split,
            RowSchema(
                self.parse_row,
                self.find_missing_columns,
                self.columns,
                lambda present: self.list_used(present, self._named_columns),
            ),
            BadRows(policy, self.max_reported_rows),
            formatter=self,
            local_files_only=local_files_only,
        )
        self.review_rows(rows)
        if rows.unused:
            logger.warning("%s", rows.describe_unused())
        return rows

    def encode(
        self,
        rows: Any,
        *,
        max_length: int,
        truncation: str = "end",
        num_proc: int | None = None,
        cache: bool | None = None,
    ) -> EncodedExamples:
        """Turn rows into token ids and labels.

        Args:
            rows: What :meth:`load` returned, or anything it takes.
            max_length: Longest example, in tokens.
            truncation: What happens to a longer one: ``"end"`` cuts it off there (and so leaves
                its end token out), ``"drop"`` leaves it out, ``"error"`` raises.
            num_proc: Processes to use. A fast tokenizer uses all cores from one process; a slow
                one gets a process per core by default.
            cache: Keep the result on disk and use it again for the same rows, formatter and
                settings. ``None`` does so from 2,000 rows on.

        Returns:
            The dataset with ``input_ids`` and ``labels``, and the report.

        Raises:
            DataError: When no row is left with a token to learn, or rows are too long and
                ``truncation="error"``.
        """
        rows = self._adopt(rows)
        return encode_rows(
            self._encoding,
            rows,
            max_length=max_length,
            truncation=truncation,
            num_proc=num_proc,
            cache=cache,
        )

    def preview(self, rows: Any, n: int = 3, color: bool | None = None) -> Preview:
        """The first ``n`` examples as text, with the tokens that carry loss marked.

        A notebook shows them in colours.

        Args:
            rows: What :meth:`load` returned, or anything it takes.
            n: How many.
            color: Mark them in colour (``True``) or in plain characters (``False``); by default
                in colour on a terminal.
        """
        rows = self._adopt(rows)
        return render_preview(self._encoding, rows, n=n, color=color)

    def describe(self, rows: Any, max_length: int = 2048) -> DataReport:
        """Counts, lengths, truncation, the share of trained tokens, duplicates.

        Args:
            rows: What :meth:`load` returned, or anything it takes.
            max_length: The length to count truncated rows against, in tokens.
        """
        rows = self._adopt(rows)
        return describe_rows(self._encoding, rows, max_length=max_length)

    @property
    def _encoding(self) -> RowEncoding:
        """How rows become tokens, as a value for everything that does not ask what they mean."""
        return RowEncoding(
            segments=self.segments,
            text=self.text,
            end_id=self.eos_token_id if self.adds_eos else None,
            adds_bos=self.adds_bos,
            trains_all=not self.response_only,
            reads_specials=self.special_tokens == "tokens",
            bad_rows=BadRows(self.on_bad_rows, self.max_reported_rows),
            fingerprint=lambda: self.fingerprint,
            # A subclass from elsewhere, or typed into a console, may run any code.
            is_described=str(type(self).segments.__module__).startswith("qlora_kit.data."),
        )

    def _adopt(self, rows: Any) -> Rows:
        """Rows that have this formatter's roles as they are, anything else loaded."""
        if isinstance(rows, Rows) and rows.has_roles_of(self):
            return rows
        return self.load(rows)

    def review_rows(self, rows: Rows) -> None:
        """Log what is odd about rows that can be used all the same."""

    def make_prompt(self, segments: Sequence[Segment]) -> Prompt:
        """A prompt from segments: their text, and the ids training puts there."""
        segments = self._encoding.read_specials(segments)
        ids, _ = join_segments(self._encoding, [segments], is_open=True)[0]
        return Prompt("".join(segment.text for segment in segments), ids)


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is not a tokenizer, such as the model's handle."""
    if not callable(getattr(tokenizer, "convert_tokens_to_ids", None)):
        raise ConfigError(
            f"The first argument is the tokenizer, got {type(tokenizer).__name__}. With a "
            "loaded model: AlpacaFormatter(model.tokenizer)."
        )
