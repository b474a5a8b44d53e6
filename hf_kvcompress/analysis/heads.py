"""One head, one kind of numbers: everything that is measured of its pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..clustered.duplicates import hash_pages
from .capture import Captured
from .channels import channel_statistics
from .distributions import beyond, histogram, share_at_least, summary
from .metrics import METRICS, Pages, Scale, compare
from .neighbours import SCOPES, nearest_pairs, random_pairs
from .repeats import Repeat
from .views import View


@dataclass(frozen=True)
class Plan:
    """What is compared in every head alike: settings, and spans of repeated text that are held in one piece.

    Args:
        spans: by scope, pages and the slots where the earlier spans begin, `[M, 2]`.
    """

    captured: Captured
    thresholds: tuple[float, ...]
    max_pairs: int
    seed: int
    repeats: Mapping[str, list[Repeat]]
    spans: Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls, captured: Captured, thresholds: tuple[float, ...], max_pairs: int, seed: int,
        repeats: Mapping[str, list[Repeat]],
    ) -> Plan:  # fmt: skip
        spans = {}
        for scope, own in repeats.items():
            held = [(r.page, slot) for r in own if (slot := captured.slot(r.reading, r.start)) is not None]
            spans[scope] = torch.tensor(held, dtype=torch.long).view(-1, 2)
        return cls(captured, thresholds, max_pairs, seed, repeats, spans)


@dataclass(frozen=True)
class HeadResult:
    """What was measured: a JSON-ready row, cosines by what was compared, and the nearest pairs with theirs."""

    row: dict[str, Any]
    cosines: dict[str, torch.Tensor]
    similar: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def histograms(self) -> dict[str, torch.Tensor]:
        """Of the cosines, by what was compared."""
        return {name: histogram(cosines) for name, cosines in self.cosines.items() if len(cosines)}


def measure_head(plan: Plan, view: View, head: int) -> HeadResult:
    """Compare the pages of one head."""
    size, owner = plan.captured.page_size, plan.captured.owner
    x, scale = view.tokens[head], Scale.of(view.tokens[head])
    pages = Pages.of(x.unflatten(0, (-1, size)), scale)
    shuffled = Pages.of(view.shuffled[head].unflatten(0, (-1, size)), Scale.of(view.shuffled[head]))
    compared: dict[str, dict[str, torch.Tensor]] = {}
    pairs: dict[str, torch.Tensor] = {}
    for scope in SCOPES:
        pairs[scope] = nearest_pairs(pages.centred, owner, scope)
        compared[f"nearest_{scope}"] = compare(pages, pairs[scope])
        compared[f"nearest_{scope}_shuffled"] = compare(shuffled, nearest_pairs(shuffled.centred, owner, scope))
        drawn = random_pairs(owner, scope, plan.max_pairs, torch.Generator().manual_seed(plan.seed))
        compared[f"pairs_{scope}"] = compare(pages, drawn)
        compared[f"pairs_{scope}_shuffled"] = compare(shuffled, drawn)
        compared[f"repeated_{scope}"] = _repeated(plan, x, scale, pages, scope)
    cosines = {name: own["cosine"] for name, own in compared.items()}
    row = {
        "layer": view.layer,
        "head": head,
        "kind": view.kind,
        "pages": len(pages),
        "duplicates": int(duplicates(x.unflatten(0, (-1, size))).sum()),
        "compared": {
            name: {metric: summary(values) for metric, values in own.items()}
            for name, own in compared.items()
            if len(own["cosine"])
        },
        "beyond_baseline": {s: beyond(cosines[f"nearest_{s}"], cosines[f"nearest_{s}_shuffled"]) for s in SCOPES},
        "at_least": {
            name: share_at_least(cosines[name], plan.thresholds, len(pages))
            for s in SCOPES
            for name in (f"nearest_{s}", f"nearest_{s}_shuffled")
        },
        "channels": channel_statistics(x, scale),
    }
    limits = {s: _limit(cosines[f"nearest_{s}_shuffled"]) for s in SCOPES}
    similar = {}
    for scope in SCOPES:
        good = cosines[f"nearest_{scope}"] > limits[scope]
        similar[scope] = (pairs[scope][good], cosines[f"nearest_{scope}"][good])
    return HeadResult(row, cosines, similar)


def duplicates(pages: torch.Tensor) -> torch.Tensor:
    """Which pages `[P, T, D]` are bit for bit an earlier one: `[P]` bool. Found by hash, then looked at."""
    order = hash_pages(pages).tolist()
    first: dict[int, int] = {}
    return torch.tensor(
        [(at := first.setdefault(key, page)) != page and torch.equal(pages[at], pages[page])
         for page, key in enumerate(order)]
    )  # fmt: skip


def _repeated(plan: Plan, x: torch.Tensor, scale: Scale, pages: Pages, scope: str) -> dict[str, torch.Tensor]:
    """Pages beside the earlier spans with the same text."""
    own = plan.spans[scope]
    if not len(own):
        return {metric: torch.empty(0) for metric in METRICS}
    some = own[:: -(-len(own) // plan.max_pairs)]
    spans = Pages.of(x[some[:, 1:] + torch.arange(plan.captured.page_size)], scale)
    return compare(pages, torch.stack([some[:, 0], torch.arange(len(some))], dim=1), spans)


def _limit(baseline: torch.Tensor) -> float:
    return float(torch.quantile(baseline.double(), 0.99)) if len(baseline) else 1.0
