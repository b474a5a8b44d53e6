"""Text that occurs again: spans of a page's tokens that stood somewhere before, at any offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .capture import Captured


@dataclass(frozen=True)
class Repeat:
    """A held page, and the reading and position of an earlier span with the same tokens."""

    page: int
    reading: int
    start: int


def find_repeats(captured: Captured) -> dict[str, list[Repeat]]:
    """Of every held page the first span with the same tokens: "within" its reading before it, "across" in another."""
    size, sinks = captured.page_size, captured.sinks
    tables = [_first_places(reading.ids.tolist(), size, sinks) for reading in captured.readings]
    found: dict[str, list[Repeat]] = {"within": [], "across": []}
    starts, owners = captured.starts.tolist(), captured.owner.tolist()
    for page, (start, owner) in enumerate(zip(starts, owners, strict=True)):
        tokens = tuple(captured.readings[owner].ids[start : start + size].tolist())
        place = tables[owner].get(tokens)
        if place is not None and place + size <= start:
            found["within"].append(Repeat(page, owner, place))
        for other, table in enumerate(tables):
            if other != owner and tokens in table:
                found["across"].append(Repeat(page, other, table[tokens]))
                break
    return found


def shared_prefix(ids: Sequence[torch.Tensor]) -> list[int]:
    """Of every sequence the most leading tokens that it has in common with another one."""
    found = [0] * len(ids)
    for i, own in enumerate(ids):
        for j in range(i):
            n = min(len(own), len(ids[j]))
            differs = (own[:n] != ids[j][:n]).nonzero()
            same = int(differs[0]) if len(differs) else n
            found[i], found[j] = max(found[i], same), max(found[j], same)
    return found


def _first_places(ids: list[int], size: int, start: int) -> dict[tuple[int, ...], int]:
    """The first position from `start` on of every run of `size` tokens."""
    found: dict[tuple[int, ...], int] = {}
    for place in range(start, len(ids) - size + 1):
        found.setdefault(tuple(ids[place : place + size]), place)
    return found
