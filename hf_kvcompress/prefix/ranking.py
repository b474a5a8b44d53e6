"""Which entries stay: recency, decayed frequency, and what it costs to compute an entry again."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..config import choose, expect

POLICIES = ("lru", "lfu", "adaptive")
PRIORITIES = ("low", "normal", "high")
WEIGHTS = {"recency_weight": 0.4, "frequency_weight": 0.3, "size_weight": 0.3}
HALF_LIFE = 600.0  # seconds in which a use counts for half
USES = 3  # the newest ones, whose times "adaptive" looks at
GHOSTS = 4096  # evicted entries whose uses are remembered
LEAST_SECONDS = 1e-6  # of an entry that took no time that could be measured


@dataclass
class Usage:
    """When and how often an entry was used, and what it cost.

    frequency: uses, each of which counts for half as much every `HALF_LIFE` seconds, as of `last_used`.
    seconds: what it took to compute, beyond the entry that it continues.
    times: of the newest uses.
    """

    created: float
    last_used: float
    seconds: float = 0.0
    frequency: float = 0.0
    hits: int = 0
    priority: str = "normal"
    pins: int = 0
    times: tuple[float, ...] = ()

    def use(self, now: float, half_life: float) -> None:
        """Count one use."""
        self.frequency, self.last_used, self.hits = self.decayed(now, half_life) + 1, now, self.hits + 1
        self.times = (*self.times, now)[-USES:]

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

    "adaptive" multiplies three parts, each to the power of its weight, as GreedyDual-Size-Frequency (Cherkasova 1998)
    does: what the last use counts for, what the newest uses count for together, and the seconds that a byte of the
    entry saves. A use counts `1 / (1 + age / half_life)`: unlike a power of two it lets no two old entries be equal.
    An entry that was evicted and comes back has its uses back.

    Args:
        policy: "lru" looks at the last use, "lfu" at the decayed frequency, "adaptive" at the three parts.
        half_life: seconds in which a use counts for half.
    """

    def __init__(self, policy: str = "lru", half_life: float = HALF_LIFE):
        self.policy = choose("eviction_policy", policy, POLICIES)
        self.half_life = half_life
        self.weights = dict(WEIGHTS)
        self._ghosts: OrderedDict[str, tuple[float, ...]] = OrderedDict()

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
        score = self._scorer(now)
        return min(entries, key=lambda entry: (PRIORITIES.index(entry.usage.priority), score(entry)))

    def _scorer(self, now: float) -> Callable[[Ranked], tuple[float, float]]:
        if self.policy == "lru":
            return lambda entry: (entry.usage.last_used, 0.0)
        if self.policy == "lfu":
            return lambda entry: (entry.usage.decayed(now, self.half_life), entry.usage.last_used)
        weights = self.weights

        def score(entry: Ranked) -> tuple[float, float]:
            usage = entry.usage
            recency = self._counts(usage.last_used, now)
            frequency = sum(self._counts(time, now) for time in usage.times) or recency
            saved = max(usage.seconds, LEAST_SECONDS) / max(entry.nbytes, 1)
            parts = (recency, frequency, saved)
            return sum(w * math.log(part) for w, part in zip(weights.values(), parts, strict=True)), usage.last_used

        return score

    def _counts(self, time: float, now: float) -> float:
        """What a use at `time` counts for."""
        return 1 / (1 + max(now - time, 0) / self.half_life)

    # -- what was evicted ----------------------------------------------------------------------------------------------

    def remember(self, key: str, usage: Usage) -> None:
        """Keep the times at which an entry that goes was used, of the last 4,096 that went."""
        self._ghosts[key] = usage.times
        if len(self._ghosts) > GHOSTS:
            self._ghosts.popitem(last=False)

    def recall(self, key: str, now: float) -> tuple[float, ...]:
        """Times at which an entry that comes was used, this time included."""
        return (*self._ghosts.pop(key, ()), now)[-USES:]
