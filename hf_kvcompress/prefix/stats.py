"""What a prefix store has done and holds."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..showing import Shown

if TYPE_CHECKING:
    from .tree import Node


@dataclass(frozen=True)
class EntryStats:
    """One entry: tokens of the whole prefix, bytes of what it adds to the prefix that it continues."""

    key: str
    tokens: int
    nbytes: int
    hits: int
    frequency: float
    age_seconds: float
    idle_seconds: float
    recompute_seconds: float
    priority: str
    pinned: bool

    @classmethod
    def of(cls, node: Node, now: float, half_life: float) -> EntryStats:
        usage = node.usage
        return cls(
            key=node.key,
            tokens=node.end,
            nbytes=node.nbytes,
            hits=usage.hits,
            frequency=usage.decayed(now, half_life),
            age_seconds=now - usage.created,
            idle_seconds=now - usage.last_used,
            recompute_seconds=usage.seconds,
            priority=usage.priority,
            pinned=usage.pins > 0,
        )


@dataclass
class PrefixStats(Shown):
    """Counts since the store was made.

    hits: prompts of which at least one block was known; tokens_reused: tokens that were not computed again.
    """

    hits: int = 0
    misses: int = 0
    tokens_reused: int = 0
    tokens_read: int = 0
    fetches: int = 0
    tokens_fetched: int = 0
    evictions: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def asked(self, reused: int, read: int) -> None:
        """Count one prompt."""
        with self._lock:
            self.hits += reused > 0
            self.misses += reused == 0
            self.tokens_reused += reused
            self.tokens_read += read

    def fetched(self, tokens: int) -> None:
        """Count one entry that a tier gave."""
        with self._lock:
            self.fetches += 1
            self.tokens_fetched += tokens

    def evicted(self) -> None:
        """Count one entry that went."""
        with self._lock:
            self.evictions += 1

    @property
    def hit_rate(self) -> float:
        """Part of the prompts that were hits."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def token_hit_rate(self) -> float:
        """Part of the prompts' tokens that were reused."""
        return self.tokens_reused / max(self.tokens_reused + self.tokens_read, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        with self._lock:
            own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**own, "hit_rate": self.hit_rate, "token_hit_rate": self.token_hit_rate}

    _index = "of"
    _bars = {"part known": ("part known", 1.0)}
    _unit = ""

    def _title(self) -> str:
        prompts = self.hits + self.misses
        return f"{prompts:,} prompts, {self.tokens_reused:,} tokens reused, {self.evictions:,} evictions"

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"of": "prompts", "known": self.hits, "new": self.misses, "part known": self.hit_rate},
            {"of": "tokens", "known": self.tokens_reused, "new": self.tokens_read, "part known": self.token_hit_rate},
        ]
