"""Counting who reads a model: the first to come changes it, the last to leave puts it back."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Readers"]

Found = TypeVar("Found")


@dataclass(eq=False)
class _Group(Generic[Found]):
    found: Found
    count: int = 0


class Readers(Generic[Found]):
    """The readers of any number of models, from any number of threads."""

    def __init__(self) -> None:
        self._groups: weakref.WeakKeyDictionary[Any, _Group[Found]] = weakref.WeakKeyDictionary()
        # Reentrant: a forgotten stream is closed wherever the garbage collector happens to run.
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def reading(
        self,
        model: Any,
        begin: Callable[[Found | None], Found],
        end: Callable[[Found], None],
        prepare: Callable[[], object] | None = None,
    ) -> Iterator[None]:
        """Be one of a model's readers.

        Args:
            model: Anything that can be referred to weakly.
            begin: Called with what the present readers found, ``None`` where there are none.
                Returns what is to be put back: the same, to join them, or something new, which
                then stands in the place of theirs.
            end: Called with what was found, when the last reader leaves.
            prepare: What each reader does to the model on coming, one at a time. Where it fails,
                the reader has left again.
        """
        with self._lock:
            group = self._groups.get(model)
            found = begin(None if group is None else group.found)
            if group is None or found is not group.found:
                group = self._groups[model] = _Group(found)
            group.count += 1
        try:
            if prepare is not None:
                with self._lock:
                    prepare()
            yield
        finally:
            with self._lock:
                group.count -= 1
                # A later group puts back what it found, which was after this one's.
                if group.count == 0 and self._groups.get(model) is group:
                    del self._groups[model]
                    end(group.found)
