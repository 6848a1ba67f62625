"""llama.cpp's tokenizers in plain Python, to check a file without llama.cpp.

Restates ``tokenizer_st_partition``, ``llm_tokenizer_bpe`` and ``llm_tokenizer_spm`` of
``src/llama-vocab.cpp``; tests hold it against llama.cpp itself. Slow, and meant for strings of
a line or two.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from qlora_kit.exporters.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS, split_text
from qlora_kit.exporters.gguf.tokenizer.vocabulary import (
    CONTROL,
    TAKEN_FOR_SPECIAL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
)

__all__ = ["LlamaTokenizer"]

_SPACE: Final = "\u2581"

# What llama.cpp's phi-3 rule leaves alone, and what C's isspace() takes for a space.
_NEVER_STRIPPING: Final = ("<unk>", "<s>", "<|endoftext|>")
_C_SPACES: Final = " \t\n\v\f\r"


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    # bytes_to_unicode of GPT-2's encoder.py: printable Latin-1 stands for itself, the 68 others
    # are numbered from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in alphabet)
    return alphabet | {byte: chr(256 + index) for index, byte in enumerate(others)}


_ALPHABET: Final = _byte_alphabet()
_BYTE_OF: Final = {character: byte for byte, character in _ALPHABET.items()}


class LlamaTokenizer:
    """Encodes and decodes as llama.cpp does with a file's vocabulary.

    Args:
        vocabulary: What the file says.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        # Later duplicates win, as in llama.cpp's map; exported vocabularies have none.
        self._ids = {token: index for index, token in enumerate(vocabulary.tokens)}
        self._ranks = {merge: rank for rank, merge in enumerate(vocabulary.merges)}
        special = [
            index
            for index, kind in enumerate(vocabulary.types)
            if vocabulary.tokens[index]
            and (
                kind in (CONTROL, USER_DEFINED, UNKNOWN)
                or vocabulary.tokens[index] in TAKEN_FOR_SPECIAL
            )
        ]
        self._special = sorted(
            special, key=lambda index: len(vocabulary.tokens[index].encode()), reverse=True
        )

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids, with special tokens in the text recognized."""
        vocabulary = self._vocabulary
        ids: list[int] = []
        if add_special and vocabulary.adds_bos:
            ids.append(vocabulary.special_ids["bos"])
        follows_special = True
        for fragment in self._partition(text):
            if isinstance(fragment, int):
                ids.append(fragment)
                follows_special = True
            elif vocabulary.model == "gpt2":
                ids.extend(self._encode_bpe(fragment))
            else:
                prefix = " " if vocabulary.adds_space_prefix and follows_special else ""
                ids.extend(self._encode_spm((prefix + fragment).replace(" ", _SPACE)))
                follows_special = False
        if add_special and vocabulary.adds_eos:
            ids.append(vocabulary.special_ids["eos"])
        return ids

    def decode(self, ids: list[int]) -> bytes:
        """The bytes that the tokens stand for, special tokens as their text."""
        return b"".join(self._piece(index) for index in ids)

    def _piece(self, index: int) -> bytes:
        token, kind = self._vocabulary.tokens[index], self._vocabulary.types[index]
        if kind in (CONTROL, USER_DEFINED, UNKNOWN):
            return token.encode()
        if self._vocabulary.model == "gpt2":
            return bytes(_BYTE_OF[character] for character in token)
        if token.startswith("<0x") and len(token) == 6:
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE, " ").encode()

    def _partition(self, text: str) -> Iterator[str | int]:
        """Cut special tokens out, the longest first."""
        fragments: list[str | int] = [text] if text else []
        for index in self._special:
            token = self._vocabulary.tokens[index]
            if token not in text:
                continue
            cut: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    cut.append(fragment)
                    continue
                strips = self._vocabulary.strips_after_special and token not in _NEVER_STRIPPING
                first, *others = fragment.split(token)
                cut += [first] if first else []
                for part in others:
                    rest = part.lstrip(_C_SPACES) if strips else part
                    cut += [index, rest] if rest else [index]
            fragments = cut
        yield from fragments

    def _encode_bpe(self, text: str) -> Iterator[int]:
        known = PRE_TOKENIZERS[self._vocabulary.pre]
        for word in split_text(text, known.patterns):
            symbols = [_ALPHABET[byte] for byte in word.encode()]
            whole = "".join(symbols)
            if known.ignores_merges and whole in self._ids:
                yield self._ids[whole]
                continue
            for symbol in self._merge(symbols):
                if symbol in self._ids:
                    yield self._ids[symbol]
                else:
                    # llama.cpp drops characters that are no token of their own.
                    yield from (self._ids[part] for part in symbol if part in self._ids)

    def _merge(self, symbols: list[str]) -> list[str]:
        # llm_tokenizer_bpe_session keeps a queue by (rank, position); taking the leftmost pair of
        # the lowest rank until none is left gives the same order, in quadratic time.
        while len(symbols) > 1:
            ranks = [self._ranks.get(f"{left} {right}", -1) for left, right in pairwise(symbols)]
            possible = [rank for rank in ranks if rank >= 0]
            if not possible:
                break
            at = ranks.index(min(possible))
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return symbols

    def _encode_spm(self, text: str) -> Iterator[int]:
        # llm_tokenizer_spm_session: the pair whose union is the token of the highest score, the
        # leftmost of equals, which the strict > below keeps.
        symbols = list(text)
        made_of: dict[str, tuple[str, str]] = {}
        scores = self._vocabulary.scores
        while len(symbols) > 1:
            best, at = float("-inf"), -1
            for position, (left, right) in enumerate(pairwise(symbols)):
                index = self._ids.get(left + right)
                if index is not None and scores[index] > best:
                    best, at = scores[index], position
            if at < 0:
                break
            made_of[symbols[at] + symbols[at + 1]] = (symbols[at], symbols[at + 1])
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            yield from self._segment(symbol)

    def _segment(self, symbol: str) -> Iterator[int]:
        if symbol in self._ids:
            yield self._ids[symbol]
        else:
            yield from (self._ids[f"<0x{byte:02X}>"] for byte in symbol.encode())
