"""How much a monitor may do now, so that all it does stays a small part of the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

BURST = 0.1  # seconds of work saved up at most while nothing is looked at
GUESS = 0.001  # seconds that a kind of work is thought to take before it was done once
PARTS = {"step": 0.3, "mass": 0.5, "pages": 0.2}


class Throttle:
    """An account in seconds for each kind of work: of the time that passes `share` goes in, what work took comes out.

    Kinds have accounts of their own, so that cheap work does not use up what dear work is saving for.

    Args:
        share: part of the time, of all kinds together.
        parts: of the share, by kind; their sum is 1.
        clock: seconds; a test's own, or `time.perf_counter`.
    """

    def __init__(
        self, share: float, parts: Mapping[str, float] = PARTS, clock: Callable[[], float] = time.perf_counter
    ):
        self.share, self.parts, self._clock = share, parts, clock
        self._lock = threading.Lock()
        self._last = self.started = clock()
        self._saved = dict.fromkeys(parts, 0.0)
        self._cost = dict.fromkeys(parts, GUESS)
        self.spent = 0.0

    def allows(self, kind: str) -> bool:
        """There is time for work of this kind, judged by what it took before."""
        with self._lock:
            now = self._clock()
            earned, self._last = (now - self._last) * self.share, now
            for name, part in self.parts.items():
                most = max(BURST * part, 2 * self._cost[name])
                self._saved[name] = min(self._saved[name] + earned * part, most)
            return self._saved[kind] >= self._cost[kind]

    def charge(self, seconds: float, kind: str | None = None) -> None:
        """Take the time that work took, of any thread, out of its account; without a kind out of all of them."""
        with self._lock:
            self.spent += seconds
            if kind is None:
                for name, part in self.parts.items():
                    self._saved[name] -= seconds * part
            else:
                self._saved[kind] -= seconds
                self._cost[kind] = 0.5 * (self._cost[kind] + seconds)

    @contextmanager
    def working(self, kind: str) -> Iterator[None]:
        """Charge what is done inside."""
        begun = self._clock()
        try:
            yield
        finally:
            self.charge(self._clock() - begun, kind)

    @property
    def part(self) -> float:
        """What was taken so far, as a part of the time since the start."""
        return self.spent / max(self._clock() - self.started, 1e-9)
