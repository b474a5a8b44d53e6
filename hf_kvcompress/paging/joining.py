"""Rows of several paged caches in one cache, and back: blocks change hands, nothing packed is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..codecs.base import Packed
from ..config import expect
from ..layer import CompressedLayer
from .cache import PagedCache
from .pages import PagedSlab, PagedStore, layout
from .tables import BlockTable


def holding(cache: PagedCache) -> list[tuple[int, CompressedLayer]]:
    """The layers that hold tokens. Raises ValueError if one is not of this package."""
    found = []
    for index, layer in enumerate(cache.layers):
        if type(layer) is CompressedLayer:
            found.append((index, layer))
        elif type(layer).__name__ not in ("DummyLayer", "EmptyLayer"):
            raise expect("model", "one whose layers all have keys and values that are packed", type(layer).__name__)
    return found


def join(caches: Sequence[PagedCache], config: Any) -> PagedCache:
    """One cache of the rows of all, in order, aligned at their ends; the others must not be used any more.

    Rows must be without holes between their tokens. Raises ValueError for caches of other settings.
    """
    first = caches[0]
    if any(cache.settings != first.settings or cache.pool is not first.pool for cache in caches):
        raise expect("caches", "caches of the same settings in the same pool", "others")
    for cache in caches:
        cache.commit()
    made = type(first).from_settings(config, first.settings.to_dict(), pool=first.pool, calibration=first.calibration)
    for index, layer in holding(made):
        _join_layer(layer, [cache.layers[index] for cache in caches], made)
    return made


def select(cache: PagedCache, rows: Sequence[int]) -> None:
    """Keep these rows, in this order, aligned at their ends again."""
    cache.batch_select_indices(torch.tensor(rows, dtype=torch.long))
    for _, layer in holding(cache):
        align(layer)
        pages = layer.storage.pages if layer.storage is not None else None
        if isinstance(pages, PagedStore) and pages.counts:
            pages.truncate(0, pages.counts[0])  # entries that only rows which have gone had come to


def lengths(cache: PagedCache) -> list[int]:
    """Tokens that each row has read."""
    cache.commit()
    storage = holding(cache)[0][1].storage
    return [] if storage is None else list(storage.positions.counts)


def align(layer: CompressedLayer) -> None:
    """Let all rows end at the same position, that of the longest."""
    assert layer.storage is not None
    positions = layer.storage.positions
    if positions.table is not None:
        raise expect("caches", "rows without holes between their tokens", "rows with holes")
    layer.seen = max(positions.counts)
    positions.offsets = [layer.seen - count for count in positions.counts]


def _join_layer(layer: CompressedLayer, parts: Sequence[CompressedLayer], made: PagedCache) -> None:
    storages = [part.storage for part in parts if part.storage is not None]
    first = storages[0]
    batch = sum(storage.batch for storage in storages)
    shapes = [(batch, first.heads[role], 0, first.dims[role]) for role in ("key", "value")]
    layer.lazy_initialization(*(torch.empty(s, dtype=first.dtype, device=first.device) for s in shapes))
    made._prepare(layer)
    storage = layer.storage
    assert storage is not None and isinstance(storage.pages, PagedStore)
    windows = [own.window for own in storages]
    slots = max(window.keys.shape[2] for window in windows)
    padded = [
        [torch.nn.functional.pad(part, (0, 0, 0, slots - part.shape[2])) for part in window.parts] for window in windows
    ]
    storage.window.parts = tuple(torch.cat(same) for same in zip(*padded, strict=True))
    storage.window.sinks = [n for window in windows for n in window.sinks]
    storage.window.recent = [n for window in windows for n in window.recent]
    storage.positions.counts = [n for own in storages for n in own.positions.counts]
    storage.positions.table = next((own.positions.table for own in storages if own.positions.table is not None), None)
    queries = [own.queries for own in storages]
    storage.queries.counts = [n for own in queries for n in own.counts]
    known = next((own.sums for own in queries if own.sums is not None), None)
    if known is not None:
        sums = [known.new_zeros(len(q.counts), *known.shape[1:]) if q.sums is None else q.sums for q in queries]
        storage.queries.sums = torch.cat(sums)
    _join_pages(storage.pages, [own.pages for own in storages])  # type: ignore[misc]
    align(layer)


def _join_pages(pages: PagedStore, parts: Sequence[PagedStore]) -> None:
    batches = [len(part.counts) for part in parts]
    pages.counts = [n for part in parts for n in part.counts]
    pages._sealing = range(len(pages.counts))
    for role in pages.histories:
        pages.histories[role] = _joined([part.histories[role] for part in parts], batches)
    found: dict[int, list[PagedSlab | None]] = {}
    for number, part in enumerate(parts):
        for slab in part.slabs:
            found.setdefault(slab.start, [None] * len(parts))[number] = slab
    for start in sorted(found):
        own = found[start]
        known = next(slab for slab in own if slab is not None)
        if any(slab is not None and slab.capacity != known.capacity for slab in own):
            raise expect("caches", "pages that were cut at the same tokens", "others")
        pages.slabs.append(_join_slab(pages, own, known, batches))


def _join_slab(pages: PagedStore, own: Sequence[PagedSlab | None], known: PagedSlab, batches: list[int]) -> PagedSlab:
    """One slab of the rows of all; where a row has not come so far, or is beyond it, stands an empty entry."""
    count = pages.pool.blocks_for(layout(pages.codecs, pages.heads, known.capacity)[1])
    runs = []
    for slab, batch in zip(own, batches, strict=True):
        for row in range(batch):
            runs.append(pages.pool.hold_empty(count) if slab is None else pages.pool.hold(slab.table[row]))
    table = BlockTable(pages.pool, runs)
    joined = PagedSlab(known.start, known.capacity, table, pages.codecs, pages.heads, sum(batches))
    for role in joined.statistics:
        parts = [{} if slab is None else slab.statistics[role] for slab in own]
        joined.statistics[role] = _joined(parts, batches)
    return joined


def _joined(parts: Sequence[Packed], batches: Sequence[int]) -> Packed:
    """Tensors `[rows, ...]` of all by name, zeros where one lacks a name."""
    made: Packed = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        known = next(part[name] for part in parts if name in part)
        rows = [
            part[name] if name in part else known.new_zeros(batch, *known.shape[1:])
            for part, batch in zip(parts, batches, strict=True)
        ]
        made[name] = torch.cat(rows)
    return made
