"""Text to token ids, for text that must stay text.

For one tokenizer: which tokens it adds around a text, which are special, and how to keep the
special ones out of what users wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_kit.data.tokens.segments import Segment
from qlora_kit.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextTokenizer", "refuse_half_characters"]


def refuse_half_characters(text: str, cause: Exception | None = None) -> None:
    """Refuse a text that no tokenizer takes: bytes that are not UTF-8 become such.

    Raises:
        ConfigError: Where there is half of a surrogate pair; names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"A text has half of a surrogate pair at character {error.start + 1:,} "
            f"({text[error.start]!r}), which is not a character: was it read from bytes that are "
            "not UTF-8?"
        ) from cause or error


#: Stands for the text before a text, when a tokenizer wants to know whether there is any.
_ANCHOR = "\n"


class TextTokenizer:
    """A tokenizer, asked only the questions that training examples need answered.

    Args:
        tokenizer: Any transformers tokenizer; fast ones run on all cores.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._protected: tuple[str, ...] = ()

    def protect(self, token: str) -> None:
        """Keep one more token out of texts: for example an end token that is not special."""
        if token not in self.special_tokens:
            self._protected += (token,)
            for name in ("special_tokens", "special_pattern", "special_starts", "_special_ids"):
                self.__dict__.pop(name, None)

    @property
    def is_fast(self) -> bool:
        """Whether the Rust library does the work, with its own threads."""
        return self._backend is not None

    @property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend if isinstance(backend, Tokenizer) else None

    @cached_property
    def special_tokens(self) -> dict[str, Any]:
        """Every token that users' text must not turn into, by its content."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {token.content: token for token in added.values() if token.special}
        for content in (*self.tokenizer.all_special_tokens, *self._protected):
            special.setdefault(str(content), content)
        return special

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        ids = (self.tokenizer.convert_tokens_to_ids(name) for name in self.special_tokens)
        unknown = self.tokenizer.unk_token_id
        return frozenset(i for i in ids if isinstance(i, int) and i != unknown)

    @property
    def _harmless_padding_id(self) -> int | None:
        padding: int | None = self.tokenizer.pad_token_id
        ends = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
        return None if padding in ends else padding

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Finds the names of special tokens in a text, the longest first."""
        names = sorted((name for name in self.special_tokens if name), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    @cached_property
    def special_starts(self) -> str:
        """The letters that names of special tokens begin with."""
        return "".join(sorted({name[0] for name in self.special_tokens if name}))

    @cached_property
    def prefix_ids(self) -> list[int]:
        """What the tokenizer puts before every text: usually nothing or one BOS token."""
        with_special = list(self.tokenizer("a")["input_ids"])
        plain = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        for start in range(len(with_special) - len(plain) + 1):
            if with_special[start : start + len(plain)] == plain:
                return with_special[:start]
        return []

    def get_token_id(self, token: str, *, what: str = "token") -> int:
        """The id of one token of the vocabulary.

        Raises:
            ConfigError: When the vocabulary has no such token.
        """
        vocabulary = self.tokenizer.get_vocab()
        if token not in vocabulary:
            names = self.special_tokens
            raise ConfigError(
                f"The tokenizer has no {what} {token!r}.{did_you_mean(token, names)} Its special "
                f"tokens include: {', '.join(list(names)[:8]) or 'none'}."
            )
        return int(vocabulary[token])

    def split_special(self, text: str, *, is_trained: bool = False) -> list[Segment]:
        """Template text as segments, its special tokens standing for themselves."""
        if self.special_pattern is None:
            return [Segment(text, is_trained)] if text else []
        segments: list[Segment] = []
        position = 0
        for match in self.special_pattern.finditer(text):
            segments.append(Segment(text[position : match.start()], is_trained))
            segments.append(Segment(match.group(), is_trained, is_special=True))
            position = match.end()
        segments.append(Segment(text[position:], is_trained))
        return [s for s in self._strip_around_special(segments) if s.text]

    def _strip_around_special(self, segments: list[Segment]) -> list[Segment]:
        """Some tokens swallow the white space beside them (Phi-3's ``<|end|>``); do the same."""
        texts = [segment.text for segment in segments]
        for index, segment in enumerate(segments):
            token = self.special_tokens.get(segment.text) if segment.is_special else None
            if getattr(token, "lstrip", False) and index > 0:
                texts[index - 1] = texts[index - 1].rstrip()
            if getattr(token, "rstrip", False) and index + 1 < len(segments):
                texts[index + 1] = texts[index + 1].lstrip()
        return [s._replace(text=text) for s, text in zip(segments, texts, strict=True)]

    @cached_property
    def _marks_beginnings(self) -> bool:
        """Whether a text by itself gets a mark in front that the middle of a text does not.

        Llama 2's tokenizer does so: "Hi" is "▁Hi" at the beginning and "Hi" after a line.
        """
        line, word, both = self._encode_plain([_ANCHOR, "a", _ANCHOR + "a"])
        return both[: len(line)] == line and both[len(line) :] != word

    @cached_property
    def marks_after_special(self) -> bool:
        """Whether it gets that mark after a special token too."""
        special = next(iter(self.special_tokens), None)
        if special is None or not self._marks_beginnings:
            return False
        ids = list(self.tokenizer(special + "a", add_special_tokens=False)["input_ids"])
        return ids[1:] == self._encode_plain(["a"])[0]

    def encode_texts(
        self, texts: Sequence[str], continues: Sequence[bool] | None = None
    ) -> list[list[int]]:
        """Token ids of each text, nothing added, no special token among them.

        Args:
            texts: The texts.
            continues: For each, whether other text comes before it.
        """
        if continues is not None and any(continues) and self._marks_beginnings:
            encoded = self._encode_in_context(texts, continues)
        else:
            encoded = self._encode_plain(texts)
        special = self._special_ids
        for index, ids in enumerate(encoded):
            if not special.isdisjoint(ids):
                encoded[index] = self._encode_apart(texts[index])
        return encoded

    def _encode_in_context(
        self, texts: Sequence[str], continues: Sequence[bool]
    ) -> list[list[int]]:
        line = self._encode_plain([_ANCHOR])[0]
        anchored = self._encode_plain(
            [
                _ANCHOR + text if inner else text
                for text, inner in zip(texts, continues, strict=True)
            ]
        )
        encoded = [
            ids[len(line) :] if inner and ids[: len(line)] == line else ids
            for ids, inner in zip(anchored, continues, strict=True)
        ]
        # Where the line merged with the text there is no boundary to cut at; take it by itself.
        merged = [
            i for i, inner in enumerate(continues) if inner and anchored[i][: len(line)] != line
        ]
        for i, ids in zip(merged, self._encode_plain([texts[i] for i in merged]), strict=True):
            encoded[i] = ids
        return encoded

    def _encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return self._encode_characters(texts)
        except (TypeError, UnicodeEncodeError) as error:
            for text in texts:
                refuse_half_characters(text, error)
            raise

    def _encode_characters(self, texts: Sequence[str]) -> list[list[int]]:
        backend = self._backend
        if backend is not None:
            with _text_only(backend):
                return [
                    encoding.ids
                    for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)
                ]
        return [
            list(
                self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
                    "input_ids"
                ]
            )
            for text in texts
        ]

    def _encode_apart(self, text: str) -> list[int]:
        """For vocabularies that hold special tokens as ordinary words: break those words."""
        ids: list[int] = []
        pieces = [text]
        for name in sorted(self.special_tokens, key=len, reverse=True):
            if len(name) > 1:
                broken = [piece.split(name) for piece in pieces]
                pieces = [
                    part
                    for parts in broken
                    for number, inner in enumerate(parts)
                    for part in ((name[:1], name[1:], inner) if number else (inner,))
                ]
        for piece_ids in self._encode_plain([piece for piece in pieces if piece]):
            ids.extend(piece_ids)
        # An ordinary word may serve as padding ("!"); its id in a text harms nothing, because
        # the loss mask comes from the segments and never from ids.
        clash = self._special_ids.intersection(ids) - {self._harmless_padding_id}
        if clash:
            name = self.tokenizer.convert_ids_to_tokens(min(clash))
            raise DataError(
                f"The tokenizer turns the text {text[:60]!r} into its special token {name!r}, and "
                "there is no way to write it otherwise. Remove that text from the data."
            )
        return ids

    def fingerprint(self) -> str:
        """A digest of everything that decides which ids a text becomes."""
        digest = hashlib.sha256()
        backend = self._backend
        if backend is not None:
            with _text_only(backend):
                digest.update(backend.to_str().encode())
        else:
            digest.update(type(self.tokenizer).__name__.encode())
            for token, index in sorted(self.tokenizer.get_vocab().items()):
                digest.update(f"{token}\0{index}\0".encode())
        digest.update(repr(self.prefix_ids).encode())
        # Chat templates write these by their role; which one pads changes no example.
        names = {**self.tokenizer.special_tokens_map, "pad_token": None}
        digest.update(repr(sorted(names.items())).encode())
        return digest.hexdigest()[:16]


@contextlib.contextmanager
def _text_only(backend: Any) -> Iterator[None]:
    """Truncation, padding and special tokens off; the tokenizer's own settings come back."""
    truncation, padding = backend.truncation, backend.padding
    split = backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        yield
    finally:
        backend.encode_special_tokens = split
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
