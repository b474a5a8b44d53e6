"""A list that goes on covering a whole run when it may not grow any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class Series(list[Any]):
    """Every n-th of the items that were added, evenly spread, and always the newest; n doubles with each `halve`."""

    def __init__(self, items: Iterable[Any] = ()):
        super().__init__()
        self.stride, self.added = 1, 0
        self._numbers: list[int] = []
        for item in items:
            self.add(item)

    def add(self, item: Any) -> None:
        """Append an item; the one before it goes if it was there only as the newest."""
        if self and self._numbers[-1] % self.stride:
            self.pop()
            self._numbers.pop()
        self.append(item)
        self._numbers.append(self.added)
        self.added += 1

    def halve(self) -> None:
        """Let every second item go."""
        self.stride *= 2
        last = len(self) - 1
        kept = [i for i, number in enumerate(self._numbers) if number % self.stride == 0 or i == last]
        self[:], self._numbers = [self[i] for i in kept], [self._numbers[i] for i in kept]

    def change(self, function: Callable[[Any], Any]) -> None:
        """Put `function(item)` in the place of every item; None takes it out."""
        pairs = [(function(item), number) for item, number in zip(self, self._numbers, strict=True)]
        kept = [pair for pair in pairs if pair[0] is not None]
        self[:], self._numbers = [item for item, _ in kept], [number for _, number in kept]
