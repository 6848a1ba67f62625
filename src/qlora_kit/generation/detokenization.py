"""Token ids to text, as far as it is certain.

Half characters and stop strings are held back until the next ids decide.
"""

from __future__ import annotations

from typing import Any

__all__ = ["TextAssembler"]


class TextAssembler:
    """Token ids to text, holding back half characters and what may become a stop string."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._begin = 0  # first id that is decoded again, for the spaces between words
        self._read = 0  # first id whose text was not taken yet
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """New text that is certain, and whether a stop string ended it."""
        self._ids.append(token)
        before = self._decode(self._ids[self._begin : self._read])
        whole = self._decode(self._ids[self._begin :])
        # A trailing replacement character is the first bytes of a longer one.
        if whole.endswith("\ufffd") or len(whole) <= len(before):
            return "", False
        self._begin, self._read = self._read, len(self._ids)
        return self._release(whole[len(before) :])

    def finish(self) -> tuple[str, bool]:
        """What was held back, at the end."""
        before = self._decode(self._ids[self._begin : self._read])
        whole = self._decode(self._ids[self._begin :])
        text, was_stopped = self._release(whole[len(before) :])
        held, self._held = self._held, ""
        return (text, True) if was_stopped else (text + held, False)

    def _release(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    held = max(held, length)
                    break
        self._held = text[len(text) - held :] if held else ""
        return text[: len(text) - held], False

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
