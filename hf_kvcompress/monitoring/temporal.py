"""What attention by page over time says: hot and cold pages, how long one rests, and alike pages used at other times.

Everything is seen at the captured queries only: between two of them a page may have been used unseen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.features import nearest
from .recording import Lane, Recording
from .samples import Mass

NEAREST = 4  # alike pages that are looked at for one
APART = 0.25  # of the queries that used either page at most this part used both: they are used at different times
RESTS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens


@dataclass
class Usage:
    """Attention of one head by page and captured query, `[n, P]`: parts of 1, NaN before a page was there.

    seen: positions at each query, `[n]`; held: tokens of each page at the last one; used: mass is `above` times an even
    share or more.
    """

    lane: Lane
    seen: list[int]
    mass: torch.Tensor
    used: torch.Tensor
    held: torch.Tensor

    @classmethod
    def of(cls, lane: Lane, series: Sequence[Mass], above: float) -> Usage:
        """From what was recorded, in the order of time."""
        pages = max(len(own.mass) for own in series)
        mass = torch.full((len(series), pages), math.nan)
        used = torch.zeros(len(series), pages, dtype=torch.bool)
        for i, own in enumerate(series):
            n = len(own.mass)
            held = own.held.float()
            mass[i, :n] = own.mass
            used[i, :n] = (own.mass >= above * held / held.sum().clamp(min=1)) & (held > 0)
        last = series[-1].held
        return cls(
            lane, [own.seen for own in series], mass, used, torch.nn.functional.pad(last, (0, pages - len(last)))
        )

    @property
    def pages(self) -> int:
        return self.mass.shape[1]

    def average(self) -> torch.Tensor:
        """Mean mass of every page over the queries that could see it, `[P]`."""
        return self.mass.nanmean(0).nan_to_num()

    def concentration(self, part: float = 0.8) -> int:
        """The fewest pages that get `part` of the attention of the average query."""
        ordered = self.average().sort(descending=True).values
        total = ordered.cumsum(0) / ordered.sum().clamp(min=1e-12)
        return int((total < part).sum()) + 1

    def cold(self) -> list[int]:
        """Pages that two queries or more could use and none did, and of which tokens are held."""
        could = (~self.mass.isnan()).sum(0) >= 2
        return (could & ~self.used.any(0) & (self.held > 0)).nonzero()[:, 0].tolist()

    def hot(self, number: int = 5) -> list[tuple[int, float, float]]:
        """The pages with most attention: number, mean mass, and the part of the queries that used it."""
        mean = self.average()
        could = (~self.mass.isnan()).sum(0).clamp(min=1)
        often = self.used.sum(0) / could
        best = mean.sort(descending=True, stable=True).indices[:number].tolist()
        return [(page, float(mean[page]), float(often[page])) for page in best if mean[page] > 0]

    def rests(self) -> tuple[list[int], list[int]]:
        """Tokens that pages went unused, in rests that a use ended and in rests that last.

        A rest begins at the last query that used the page and counts only if a query in between did not.
        """
        ended, lasting = [], []
        for page in range(self.pages):
            uses = self.used[:, page].nonzero()[:, 0].tolist()
            ended += [self.seen[b] - self.seen[a] for a, b in zip(uses, uses[1:], strict=False) if b > a + 1]
            if uses and uses[-1] < len(self.seen) - 1:
                lasting.append(self.seen[-1] - self.seen[uses[-1]])
        return ended, lasting


@dataclass(frozen=True)
class AlikePages:
    """Two pages of one head that are alike, and the part of the queries that used either which used both."""

    layer: int
    head: int
    role: str
    pages: tuple[int, int]
    cosine: float
    overlap: float | None

    @property
    def apart(self) -> bool:
        """Both were used, seldom by the same query."""
        return self.overlap is not None and self.overlap <= APART


def usages(recording: Recording) -> dict[Lane, Usage]:
    """By layer and head, where two queries or more were captured."""
    above = float(recording.header.get("settings", {}).get("used", 1.0))
    return {lane: Usage.of(lane, own, above) for lane, own in sorted(recording.masses.items()) if len(own) > 1}


def alike_pages(recording: Recording, used: dict[Lane, Usage]) -> list[AlikePages]:
    """Pairs of pages whose sketches have a high cosine once their mean is removed, the most alike first.

    The cosine is an estimate: 128 random projections of a page are compared.
    """
    least = float(recording.header.get("settings", {}).get("similar", 0.85))
    found = []
    for lane, own in sorted(recording.pages.items()):
        numbers = sorted(own)
        if len(numbers) < 3:  # of two pages each is the other's opposite once the mean is gone
            continue
        for role in ("key", "value"):
            sketches = torch.stack([own[number][f"{role}_sketch"] for number in numbers]).float()
            cosines, others = nearest(sketches - sketches.mean(0), min(NEAREST, len(numbers) - 1), earlier=True)
            for i, k in (cosines >= least).nonzero().tolist():
                pair = numbers[int(others[i, k])], numbers[i]
                overlap = _overlap(used.get(lane), *pair)
                found.append(AlikePages(*lane, role, pair, float(cosines[i, k]), overlap))
    return sorted(found, key=lambda pair: -pair.cosine)


def _overlap(usage: Usage | None, a: int, b: int) -> float | None:
    """Of the queries that could see both pages and used either; None where one of them was never used."""
    if usage is None or max(a, b) >= usage.pages:
        return None
    could = ~usage.mass[:, a].isnan() & ~usage.mass[:, b].isnan()
    x, y = (usage.used[could, page] for page in (a, b))
    if not bool(x.any()) or not bool(y.any()):
        return None
    return float((x & y).sum() / (x | y).sum())


def returns(rests: tuple[list[int], list[int]]) -> dict[int, float]:
    """For rests of so many tokens or more: the part that a use ended."""
    ended, lasting = rests
    found = {}
    for tokens in RESTS:
        back, not_back = sum(rest >= tokens for rest in ended), sum(rest >= tokens for rest in lasting)
        if back + not_back:
            found[tokens] = back / (back + not_back)
    return found


def drift(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How bytes a stored token and the ratio went: at the first quarter's end, at the end, and by 1,000 tokens seen."""
    filled = [step for step in steps if step["tokens_held"] and step["nbytes"]]
    if len(filled) < 2:
        return {}
    first, last = filled[len(filled) // 4], filled[-1]
    each = [step["nbytes"] / step["tokens_held"] for step in filled]
    slopes = {
        "bytes_per_token": each,
        "compression_ratio": [step["compression_ratio"] for step in filled],
        "tokens_held": [float(step["tokens_held"]) for step in filled],
    }
    seen = [step["seen"] / 1000 for step in filled]
    return {
        "bytes_per_token": [first["nbytes"] / first["tokens_held"], each[-1]],
        "compression_ratio": [first["compression_ratio"], last["compression_ratio"]],
        "per_1000_tokens": {name: _slope(seen, values) for name, values in slopes.items()},
    }


def _slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Of a straight line through the points by least squares; None if all are at one x."""
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle_x) ** 2 for a in x)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread if spread else None
