"""What a monitor has seen, in bounded memory: series that are full are thinned out, so they go on covering it all."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .samples import Mass, Pages
from .series import Series

Lane = tuple[int, int]  # layer, key-value head
EVENTS = 1000  # that are kept; more are counted
STEP_BYTES = 1000  # of a step's numbers in memory, roughly


@dataclass
class Recording:
    """Steps, events, attention by page and pages of one run, from a monitor or from a folder that one wrote.

    header: settings, versions, the cache's class and what was looked at. All methods may be called from any thread.
    """

    header: dict[str, Any]
    max_bytes: int = 64 * 2**20
    steps: Series = field(default_factory=Series)
    events: list[dict[str, Any]] = field(default_factory=list)
    masses: dict[Lane, Series] = field(default_factory=dict)
    pages: dict[Lane, dict[int, dict[str, torch.Tensor]]] = field(default_factory=dict)
    thinned: int = 0  # times that a series was halved
    more_events: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._strides: dict[Lane, int] = {}

    # -- writing -------------------------------------------------------------------------------------------------------

    def add_step(self, step: dict[str, Any]) -> None:
        """Numbers of one pass: a sixteenth of the memory is for them."""
        with self._lock:
            self.steps.add(step)
            if len(self.steps) > max(self.max_bytes // 16 // STEP_BYTES, 16):
                self.steps.halve()
                self.thinned += 1

    def add_event(self, event: dict[str, Any]) -> None:
        """Something that happened: what was taken back, an error, the end. The same again and again is one event."""
        with self._lock:
            last = self.events[-1] if self.events else {}
            if event["kind"] in ("crop", "rows") and last.get("kind") == event["kind"]:
                last.update({**event, "first_step": last.get("first_step", last["step"])})
                last["times"] = last.get("times", 1) + 1
            elif len(self.events) < EVENTS:
                self.events.append(dict(event))
            else:
                self.more_events += 1

    def add_mass(self, mass: Mass) -> None:
        """One query's attention: half of the memory is for these."""
        with self._lock:
            series = self.masses.setdefault((mass.layer, mass.head), Series())
            series.add(mass)
            # Pages only grow in number: the newest is the largest.
            if len(series) * mass.nbytes > self.max_bytes // 2 // len(self.masses) and len(series) > 4:
                series.halve()
                self.thinned += 1

    def add_pages(self, pages: Pages) -> None:
        """Features of new pages: the rest of the memory is for these; of too many only every second number stays."""
        with self._lock:
            lane = pages.layer, pages.head
            own, stride = self.pages.setdefault(lane, {}), self._strides.setdefault(lane, 1)
            names = ("key_sketch", "value_sketch", "key_norm", "value_norm")
            for i, number in enumerate(pages.numbers.tolist()):
                if number % stride == 0:
                    own[number] = {name: pages.parts[name][i].clone() for name in names}
            each = sum(t.nbytes + 200 for t in next(iter(own.values())).values()) if own else 1
            while len(own) > max(self.max_bytes * 7 // 16 // len(self.pages) // each, 8):
                stride = self._strides[lane] = 2 * stride
                for number in [number for number in own if number % stride]:
                    del own[number]
                self.thinned += 1

    def take_back(self, tokens: int, page_size: int) -> None:
        """Forget pages that hold tokens from number `tokens` on: what comes there now is something else."""
        with self._lock:
            for own in self.pages.values():
                for number in [number for number in own if (number + 1) * page_size > tokens]:
                    del own[number]
            whole = tokens // page_size

            def cut(mass: Mass) -> Mass | None:
                if len(mass.mass) <= whole:
                    return mass
                return replace(mass, mass=mass.mass[:whole], held=mass.held[:whole]) if whole else None

            for series in self.masses.values():
                series.change(cut)

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def page_size(self) -> int:
        return int(self.header.get("page_size") or 32)

    @property
    def nbytes(self) -> int:
        """Bytes of what is recorded, roughly for what is no tensor."""
        with self._lock:
            masses = sum(mass.nbytes for series in self.masses.values() for mass in series)
            pages = sum(t.nbytes for own in self.pages.values() for page in own.values() for t in page.values())
            return masses + pages + STEP_BYTES * len(self.steps)

    def copy(self) -> Recording:
        """What is here now; what comes later is not in it."""
        with self._lock:
            made = Recording(dict(self.header), self.max_bytes, Series(self.steps), [dict(e) for e in self.events])
            made.masses = {lane: Series(series) for lane, series in self.masses.items()}
            made.pages = {lane: dict(own) for lane, own in self.pages.items()}
            made.thinned, made.more_events = self.thinned, self.more_events
            return made

    def lanes(self) -> list[Lane]:
        """Layers and heads of which anything is known."""
        with self._lock:
            return sorted({*self.masses, *self.pages})

    def extend(self, items: Iterable[Mass | Pages]) -> None:
        """Add what worker or reader found."""
        for item in items:
            self.add_mass(item) if isinstance(item, Mass) else self.add_pages(item)
