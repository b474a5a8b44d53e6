"""Which entries stay: recency, decayed frequency, and what it costs to compute an entry again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..config import choose, expect

POLICIES = ("lru", "lfu", "adaptive")
PRIORITIES = ("low", "normal", "high")
WEIGHTS = {"recency_weight": 0.4, "frequency_weight": 0.3, "size_weight": 0.3}
HALF_LIFE = 600.0  # seconds in which a use counts for half


@dataclass
class Usage:
    """When and how often an entry was used, and what it cost.

    frequency: uses, each of which counts for half as much every `HALF_LIFE` seconds, as of `last_used`.
    seconds: what it took to compute, beyond the entry that it continues.
    """

    created: float
    last_used: float
    seconds: float = 0.0
    frequency: float = 0.0
    hits: int = 0
    priority: str = "normal"
    pins: int = 0

    def use(self, now: float, half_life: float) -> None:
        """Count one use."""
        self.frequency, self.last_used, self.hits = self.decayed(now, half_life) + 1, now, self.hits + 1

    def decayed(self, now: float, half_life: float) -> float:
        return self.frequency * 0.5 ** (max(now - self.last_used, 0) / half_life)


class Ranked(Protocol):
    """What is ranked."""

    usage: Usage

    @property
    def nbytes(self) -> int: ...


Entry = TypeVar("Entry", bound=Ranked)


class Ranking:
    """Orders entries by how little would be lost without them.

    Args:
        policy: "lru" looks at the last use, "lfu" at the decayed frequency, "adaptive" at both and at the seconds that
            a byte of the entry saves.
        half_life: seconds in which a use counts for half.
    """

    def __init__(self, policy: str = "lru", half_life: float = HALF_LIFE):
        self.policy = choose("eviction_policy", policy, POLICIES)
        self.half_life = half_life
        self.weights = dict(WEIGHTS)

    def configure(self, weights: Mapping[str, float]) -> None:
        """Set the weights of "adaptive", scaled to a sum of 1. Raises ValueError for unknown or negative ones."""
        new = {**self.weights, **{choose("weights", name, tuple(WEIGHTS)): value for name, value in weights.items()}}
        for name, value in new.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise expect(name, "a number of at least 0", value)
        total = sum(new.values())
        if total <= 0:
            raise expect("weights", "at least one above 0", dict(weights))
        self.weights = {name: value / total for name, value in new.items()}

    def first_to_go(self, entries: Sequence[Entry], now: float) -> Entry:
        """The entry to evict next: the lowest priority, and of those the lowest score."""
        score = self._scorer(entries, now)
        return min(entries, key=lambda entry: (PRIORITIES.index(entry.usage.priority), score(entry)))

    def _scorer(self, entries: Sequence[Ranked], now: float) -> Callable[[Ranked], tuple[float, float]]:
        if self.policy == "lru":
            return lambda entry: (entry.usage.last_used, 0.0)
        if self.policy == "lfu":
            return lambda entry: (entry.usage.decayed(now, self.half_life), entry.usage.last_used)
        most = max((self._saved(entry) for entry in entries), default=0.0) or 1.0
        often = max((entry.usage.decayed(now, self.half_life) for entry in entries), default=0.0) or 1.0

        def score(entry: Ranked) -> tuple[float, float]:
            usage, weights = entry.usage, self.weights
            recency = 0.5 ** (max(now - usage.last_used, 0) / self.half_life)
            frequency = usage.decayed(now, self.half_life) / often
            parts = (recency, frequency, self._saved(entry) / most)
            return sum(w * part for w, part in zip(weights.values(), parts, strict=True)), usage.last_used

        return score

    @staticmethod
    def _saved(entry: Ranked) -> float:
        """Seconds that a byte of the entry saves."""
        return entry.usage.seconds / max(entry.nbytes, 1)
