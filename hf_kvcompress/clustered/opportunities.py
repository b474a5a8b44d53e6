"""A look at what is stored: which pages are alike, what sharing them could save, what stands against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .residual import plain_bytes
from .search import unrotated

if TYPE_CHECKING:
    from .store import ClusteredPages

MB = 1024 * 1024
_LEAST_BITS = 1  # of a difference that is worth having


class Opportunities(Mapping[str, Any]):
    """A report, by name.

    pages, pairs_above_threshold (pages with an earlier one at least that similar), clusters,
    potential_memory_savings_mb (if every such page took a 1-bit difference: an upper bound), saved_mb (by what is
    shared already), against (pages by what stands against sharing them), layers (the same by layer and role).
    """

    def __init__(self, layers: list[dict[str, Any]], threshold: float):
        against: dict[str, int] = {}
        for own in layers:
            for reason, count in own["against"].items():
                against[reason] = against.get(reason, 0) + count
        names = ("pages", "pairs_above_threshold", "clusters", "potential_memory_savings_mb", "saved_mb")
        self._found: dict[str, Any] = {
            **{name: sum(own[name] for own in layers) for name in names},
            "similarity_threshold": threshold,
            "against": against,
            "layers": layers,
        }

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self._found.items() if name != "layers"]
        return "\n".join(lines)


def opportunities_of(stores: Sequence[ClusteredPages]) -> Opportunities:
    """Compare the pages of every store, role, row and head, means removed, keys before their rotation."""
    layers = []
    for store in stores:
        layers += [_of_role(store, role) for role in store.codecs]
    return Opportunities(layers, stores[0].clusters.settings.similarity_threshold if stores else 0.0)


def _of_role(store: ClusteredPages, role: str) -> dict[str, Any]:
    size, codec = store.page_size, store.codecs[role]
    plain = plain_bytes(codec, size)
    found: dict[str, Any] = {"layer": store.layer, "role": role, "pages": 0, "pairs_above_threshold": 0, "clusters": 0}
    against: dict[str, int] = {}
    saving = 0.0
    for pages, shared in _pages(store, role):
        _, near = store.clusters.tracker.similar(pages)
        alike = near[:, 0].cpu() >= 0
        found["pages"] += len(pages)
        found["pairs_above_threshold"] += int(alike.sum())
        found["clusters"] += len(store.clusters.tracker.clusters(pages))
        free = alike & ~shared
        saving += float(free.sum()) * max(plain - size * codec.dim * _LEAST_BITS / 8, 0.0)
        reasons = {
            "shared already": shared,
            "nothing similar before it": ~alike & ~shared,
            "similar, but not in fewer bytes at no more error": free,
        }
        for reason, pages_of in reasons.items():
            against[reason] = against.get(reason, 0) + int(pages_of.sum())
    own = store.contents()
    saved = own["saved_by_role"].get(role, 0.0)
    return {**found, "potential_memory_savings_mb": saving / MB, "saved_mb": saved / MB, "against": against}


def _pages(store: ClusteredPages, role: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of every row and head the pages `[P, page, D]` as they were before the rotation, and which are shared."""
    for row, count in enumerate(store.counts):
        parts, flags = [], []
        for slab, tokens in store.runs():
            own = min(max(count - slab.start, 0), tokens)
            if own:
                at = torch.arange(slab.start, slab.start + own, device=store.device)
                parts.append(unrotated(store, role, store.decode(role, slab, tokens)[row, :, :own], at))
                flags.append(store.shared_pages(role, slab)[row, :, : own // store.page_size].cpu())
        if not parts:
            continue
        x, shared = torch.cat(parts, dim=1), torch.cat(flags, dim=1)
        x = x - x.mean(1, keepdim=True)
        for head in range(store.heads):
            yield x[head].unflatten(0, (-1, store.page_size)).contiguous(), shared[head]
