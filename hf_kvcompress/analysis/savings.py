"""What sharing similar pages could save: by threshold, after the bytes that say which page is which."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from ..clustered.choice import PAGE_BYTES
from ..clustered.residual import member_bytes, plain_bytes
from ..codecs.base import Codec, Role
from ..codecs.registry import make_codec
from ..ops.features import pair_sums
from .capture import Captured
from .heads import Plan, duplicates
from .metrics import Scale
from .neighbours import nearest_earlier
from .views import View

CANDIDATES = 4
#: of a difference: the fewest bits that are worth having
DIFFERENCE_BITS = 1
SCOPES = ("within", "batch")
Candidates = list[list[tuple[float, tuple[int, ...]]]]


class Savings:
    """Sums up, layer by layer, the bytes that pages above a threshold would save: an upper bound, as errors are not
    looked at.

    "within": each prompt has a cache of its own; "batch": all prompts are rows of one. Only pages count that a cache
    holds packed at the end of each prompt: not the recent window, and of a sliding layer what its window still sees.

    Args:
        codec: of pages that stay as they are.
        residual: tokens of the recent window.
    """

    def __init__(self, plan: Plan, codec: str, residual: int):
        self.plan, self.codec, self.residual = plan, codec, residual
        self.rows: list[dict[str, Any]] = []

    def add(self, view: View, role: Role) -> None:
        """Look at the pages of one layer and role, head by head."""
        captured = self.plan.captured
        shape = captured.layers[view.layer].shape
        held = _held(captured, shape.window, self.residual)
        codec = make_codec(self.codec, role, view.tokens.shape[2], page_size=captured.page_size)
        sums: dict[tuple[str, float], dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for head in range(view.tokens.shape[0]):
            if len(held):
                self._add_head(view, head, held, codec, shape.window, sums)
        for (scope, threshold), own in sums.items():
            self.rows.append(
                {"layer": view.layer, "role": role, "scope": scope, "threshold": threshold}
                | {name: round(value) for name, value in own.items()}
            )

    def _add_head(
        self, view: View, head: int, held: torch.Tensor, codec: Codec, window: int | None,
        sums: dict[tuple[str, float], dict[str, float]],
    ) -> None:  # fmt: skip
        captured = self.plan.captured
        size = captured.page_size
        plain = plain_bytes(codec, size)
        member, twin = member_bytes(codec, size, DIFFERENCE_BITS), member_bytes(codec, size, 0)
        x = view.tokens[head]
        centred = x - Scale.of(x).mean
        pages = centred.unflatten(0, (-1, size))[held]
        mixed = view.shuffled[head] - view.shuffled[head].mean(0)
        equal = duplicates(x.unflatten(0, (-1, size))[held])
        dense = size * codec.dim * captured.layers[view.layer].keys[0].element_size()
        for scope in SCOPES:
            found = self._candidates(pages, held, scope)
            self._add_spans(found, centred, held, scope, window)
            baseline = self._candidates(mixed.unflatten(0, (-1, size))[held], held, scope)
            for threshold in self.plan.thresholds:
                own = sums[scope, threshold]
                alike, by_chance = (_members(c, threshold) for c in (found, baseline))
                twins = sum(bool(equal[page]) for page in alike)
                overhead = PAGE_BYTES * len(held) + 4 * len(captured.readings)
                saved = len(alike) * (plain - member) + twins * (member - twin) - overhead
                own["pages"] += len(held)
                own["alike"] += len(alike)
                own["duplicates"] += twins
                own["alike_shuffled"] += len(by_chance)
                own["dense_bytes"] += len(held) * dense
                own["plain_bytes"] += len(held) * plain
                own["saved_bytes"] += max(saved, 0.0)

    def _candidates(self, pages: torch.Tensor, held: torch.Tensor, scope: str) -> Candidates:
        """Of every held page the earlier ones most like it: cosines and the numbers (among those held) of its base."""
        owner = self.plan.captured.owner[held]
        groups = owner.unique().tolist() if scope == "within" else [None]
        found: Candidates = [[] for _ in range(len(held))]
        for group in groups:
            own = torch.arange(len(held)) if group is None else (owner == group).nonzero()[:, 0]
            values, near = nearest_earlier(pages[own], CANDIDATES)
            for page, cosines, others in zip(own.tolist(), values.tolist(), near.tolist(), strict=True):
                found[page] = [(c, (int(own[o]),)) for c, o in zip(cosines, others, strict=True) if o >= 0]
        return found

    def _add_spans(
        self, found: Candidates, centred: torch.Tensor, held: torch.Tensor, scope: str, window: int | None
    ) -> None:
        """Earlier spans with the same text, at any offset, where the cache still holds them."""
        captured, size = self.plan.captured, self.plan.captured.page_size
        place = {page: i for i, page in enumerate(held.tolist())}
        some = []
        for kind in ("within", "across") if scope == "batch" else ("within",):
            for repeat in self.plan.repeats[kind]:
                owner = int(captured.owner[repeat.page])
                slot = captured.slot(repeat.reading, repeat.start)
                if repeat.page not in place or slot is None or repeat.reading > owner:
                    continue
                bases = tuple(place.get(p, -1) for p in range(slot // size, (slot + size - 1) // size + 1))
                if -1 not in bases and place[repeat.page] not in bases:
                    some.append((repeat.page, slot, bases))
        if not some:
            return
        pages = centred[torch.tensor([p for p, _, _ in some])[:, None] * size + torch.arange(size)]
        spans = centred[torch.tensor([s for _, s, _ in some])[:, None] + torch.arange(size)]
        own = torch.arange(len(some))
        cosines = pair_sums(pages, torch.stack([own, own], dim=1), spans).cosine
        for (page, _, bases), cosine in zip(some, cosines.tolist(), strict=True):
            found[place[page]].append((cosine, bases))


def _members(found: Candidates, threshold: float) -> list[int]:
    """Pages that would be coded by another one: the best base that is no member itself, page after page."""
    members: set[int] = set()
    for page, candidates in enumerate(found):
        for cosine, bases in sorted(candidates, reverse=True):
            if cosine < threshold:
                break
            if not members.intersection(bases):
                members.add(page)
                break
    return sorted(members)


def _held(captured: Captured, window: int | None, residual: int) -> torch.Tensor:
    """Numbers of the pages that a cache holds packed when a prompt has been read and gone on with."""
    lengths = torch.tensor([len(reading.ids) for reading in captured.readings])[captured.owner]
    held = captured.starts + captured.page_size <= lengths - residual
    if window is not None:
        held &= captured.starts >= lengths - (window - 1)
    return held.nonzero()[:, 0]


def total(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Savings of all layers and roles, by scope and threshold."""
    sums: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        own = sums.setdefault((row["scope"], row["threshold"]), defaultdict(int))
        for name in row.keys() - {"layer", "role", "scope", "threshold"}:
            own[name] += row[name]
    return [
        {
            "scope": scope,
            "threshold": threshold,
            **dict(sorted(own.items())),
            "saved_share": own["saved_bytes"] / own["plain_bytes"],
            "ratio": own["dense_bytes"] / max(own["plain_bytes"] - own["saved_bytes"], 1),
        }
        for (scope, threshold), own in sorted(sums.items(), key=lambda item: (item[0][0] != "within", item[0][1]))
    ]
