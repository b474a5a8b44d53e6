"""What a monitor looks at, how often, and how much it may keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..config import expect
from ..policies.settings import parse_bytes


@dataclass(frozen=True)
class MonitorSettings:
    """Settings of a monitor, JSON-ready by `to_dict`.

    Args:
        layers, heads: how many of them are looked at, evenly spread, or their numbers (heads are key-value heads).
        row: the row of the batch that is looked at.
        page_size: positions of a page; None for the cache's own, 32 for a cache without pages.
        share: part of the wall time that the monitor may take, its background thread included.
        max_bytes: memory for what was recorded; of every series the half is thinned out when its part is full.
        max_disk_bytes: what is written at most; afterwards only memory records go on.
        contents: pages of a head whose keys and values are written out as they are, evenly spread, 0 for none.
        used: a page counts as used by a query if it gets this many times an even share of the attention.
        similar: least cosine of pages that are called similar.
    """

    layers: int | tuple[int, ...] = 4
    heads: int | tuple[int, ...] = 2
    row: int = 0
    page_size: int | None = None
    share: float = 0.05
    max_bytes: int | str = "64MB"
    max_disk_bytes: int | str = "256MB"
    contents: int = 8
    used: float = 1.0
    similar: float = 0.85

    def __post_init__(self) -> None:
        for name in ("layers", "heads"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
                if not value or not all(_is_count(number, 0) for number in value):
                    raise expect(name, "a number of them, or the numbers of some", value)
            elif not _is_count(value, 1):
                raise expect(name, "a number of them, or the numbers of some", value)
        for name, least in (("row", 0), ("contents", 0)):
            if not _is_count(getattr(self, name), least):
                raise expect(name, f"a whole number from {least} on", getattr(self, name))
        if self.page_size is not None and not _is_count(self.page_size, 1):
            raise expect("page_size", "a whole number from 1 on, or None", self.page_size)
        for name, low, high in (("share", 0, 1), ("similar", 0, 1), ("used", 0, float("inf"))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
                raise expect(name, f"a number above {low}, up to {high}", value)
        for name in ("max_bytes", "max_disk_bytes"):
            value = getattr(self, name)
            object.__setattr__(self, name, _bytes(name, value))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def _bytes(name: str, given: Any) -> int:
    try:
        size = parse_bytes(given) if isinstance(given, str) else given
    except ValueError:
        size = 0
    if not _is_count(size, 1):
        raise expect(name, "bytes, as a whole number or such as '64MB'", given)
    return int(size)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def spread(number: int | Sequence[int], available: Sequence[int], name: str) -> list[int]:
    """`number` of the available ones evenly spread, or the given ones. Raises ValueError for one that is not there."""
    if isinstance(number, int):
        if number >= len(available):
            return list(available)
        step = len(available) / number
        return [available[int(step * (i + 0.5))] for i in range(number)]
    missing = [one for one in number if one not in available]
    if missing:
        raise expect(name, f"some of {list(available)}", missing)
    return list(number)
