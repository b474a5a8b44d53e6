"""How much is measured: `quick` for a glance, `standard` for a table, `full` for a claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Suite:
    """Sizes of a run, in tokens where nothing else is said.

    Args:
        prompt, scored: a prompt and the text after it that is scored in passes of `chunk`.
        stepped: tokens after the same prompt that are scored one at a time; 0 leaves that out.
        windows: passages of each text, evenly spread; each counts as a seed.
        probed: tokens of the pass whose attention outputs are compared; 0 leaves that out.
        generated: decoded after a prompt of `prompt`, for agreement and bytes; 0 leaves that out.
        timed: decoded while the clock runs, `repeats` times; 0 leaves that out.
        tasks: names of long-context tasks, None for all of them.
        task_lengths: contexts of each task.
        task_seeds: samples of each task and length.
    """

    name: str
    prompt: int = 1024
    scored: int = 128
    chunk: int = 32
    stepped: int = 32
    windows: int = 2
    probed: int = 32
    generated: int = 32
    timed: int = 16
    repeats: int = 2
    tasks: Sequence[str] | None = ("needle", "needle-multikey", "turns")
    task_lengths: Sequence[int] = (1024,)
    task_seeds: int = 2

    def __post_init__(self) -> None:
        least = {"prompt": 1, "scored": 2, "chunk": 1, "windows": 1, "repeats": 1, "task_seeds": 0}
        for name in ("prompt", "scored", "chunk", "stepped", "windows", "probed", "generated", "timed", "repeats"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least.get(name, 0):
                raise ValueError(f"{name}: expected a whole number of at least {least.get(name, 0)}, got {value!r}")
        if self.stepped == 1 or self.timed == 1:
            raise ValueError("stepped, timed: expected 0 or at least 2, got 1")
        for name in ("tasks", "task_lengths"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))

    @property
    def longest(self) -> int:
        """Tokens that the longest pass ends with, questions of tasks not counted."""
        after = max(self.scored, self.stepped, self.probed, self.generated, self.timed)
        tasks = max(self.task_lengths, default=0) if self.tasks != () and self.task_seeds else 0
        return max(self.prompt + after, tasks)

    def to_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


SUITES = {
    "quick": Suite("quick"),
    "standard": Suite(
        "standard", prompt=2048, scored=256, stepped=48, windows=3, probed=64, generated=48, timed=32, repeats=3,
        tasks=None, task_lengths=(2048,), task_seeds=3,
    ),
    "full": Suite(
        "full", prompt=4096, scored=512, stepped=128, windows=8, probed=64, generated=128, timed=128, repeats=5,
        tasks=None, task_lengths=(4096, 8192), task_seeds=10,
    ),
}  # fmt: skip


def suite_of(name: str | Suite, **changes: Any) -> Suite:
    """A suite by its name, with other sizes where `changes` says so (None changes nothing)."""
    if isinstance(name, str) and name not in SUITES:
        near = get_close_matches(name, SUITES, n=1)
        raise ValueError(
            f"suite: expected one of {', '.join(SUITES)}, got {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    base = SUITES[name] if isinstance(name, str) else name
    given = {key: value for key, value in changes.items() if value is not None}
    known = [f.name for f in fields(Suite)]
    for key in given:
        if key not in known:
            raise ValueError(f"suite: expected sizes among {', '.join(known)}, got {key!r}")
    return Suite(**{**asdict(base), **given})
