"""Pages that are equal number by number in several rows, found by hash before anything is coded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .search import Pass
    from .store import ClusteredPages

_CLASH = 2.0  # a twin's error that much above the plain codec's shows that only the hashes are equal
_FIRST, _SECOND = 0x2545F4914F6CDD1D, 0x9E3779B97F4A7C15 - (1 << 64)


def hash_pages(pages: torch.Tensor) -> torch.Tensor:
    """64 bits of each page `[..., T, D]`, from the bits of its numbers; never 0."""
    words = pages.contiguous().flatten(-2)
    numbers = words.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[words.element_size()]).long()
    place = torch.arange(1, numbers.shape[-1] + 1, device=pages.device)
    mixed = (numbers + place * _FIRST) * (place * _SECOND | 1)
    total = ((mixed ^ (mixed >> 29)) * _FIRST).sum(-1)
    return torch.where(total == 0, 1, total)


def find_duplicates(
    store: ClusteredPages, run: Pass, number: int, low: int, tokens: int
) -> dict[str, dict[tuple[int, int, int], int]]:
    """By role: pages (row, page of the slab, head) just sealed, and the row whose page with this number is the same."""
    slab, page, rows = store.slabs[number], store.page_size, torch.tensor(run.rows)
    first, inside = (low - slab.start) // page, low - run.start
    found: dict[str, dict[tuple[int, int, int], int]] = {}
    for role in store.codecs:
        tables, shape = store.hashes[role], (len(store.counts), store.heads, slab.capacity // page)
        table = tables.setdefault(slab.start, torch.zeros(shape, dtype=torch.int64))
        exact = run.exact[role][:, :, inside : inside + tokens].unflatten(2, (-1, page))
        last = first + exact.shape[2]
        table[rows, :, first:last] = hash_pages(exact).cpu()
        for row, count in enumerate(store.counts):
            table[row, :, max(min(count - slab.start, slab.capacity), 0) // page :] = 0  # taken back since
        new = table[:, :, first:last]
        twin = (new[:, None] == new[None]).int().argmax(1)  # [B, H, n]: the first row with this hash
        mine = torch.zeros(len(store.counts), dtype=torch.bool)
        mine[rows] = True
        other = mine[:, None, None] & (twin != torch.arange(len(twin))[:, None, None]) & (new != 0)
        if not bool(other.any()):
            continue
        at = other.nonzero()
        twins = twin[other]
        good = _alike(store, run, role, number, low, at, twins)
        found[role] = {
            (row, first + j, head): own
            for (row, head, j), own, fine in zip(at.tolist(), twins.tolist(), good, strict=True)
            if fine
        }
    return found


def _alike(
    store: ClusteredPages, run: Pass, role: str, number: int, low: int, at: torch.Tensor, twins: torch.Tensor
) -> list[bool]:
    """Whether what the twins decode to is these pages indeed, not a clash of hashes."""
    slab, page = store.slabs[number], store.page_size
    inside = low - slab.start
    tile = store.decode_from(role, slab, inside, min(slab.capacity, max(store.counts) - slab.start))
    held = tile.unflatten(2, (-1, page))
    row, head, j = at.to(store.device).unbind(1)
    which = torch.tensor([run.rows.index(r) for r in at[:, 0].tolist()], device=store.device)
    exact = run.exact[role][:, :, low - run.start :].unflatten(2, (-1, page))[which, head, j].float()
    own, other = held[row, head, j], held[twins.to(store.device), head, j]
    plain, shared = ((x - exact).square().sum((1, 2)) for x in (own, other))
    return (shared <= _CLASH * plain + 1e-12).tolist()
