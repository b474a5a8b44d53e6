"""Blocks that a pass will take, so that they can be had before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ..storage import LayerStorage
from .pages import ENTRY_LENGTH, PagedStore, layout


def runs_needed(storage: LayerStorage, new: Sequence[int], record: bool) -> tuple[Counter[int], set[int]]:
    """Runs by their blocks that sealing takes as each row gets `new[row]` tokens, and sizes of the empty runs it wants.

    With `record` a sliding layer packs all of a long prompt.
    """
    pages = storage.pages
    assert isinstance(pages, PagedStore)
    spans = [span for row, tokens in enumerate(new) if (span := _span(storage, row, tokens, record))]
    needed: Counter[int] = Counter()
    empties: set[int] = set()
    if not spans:
        return needed, empties
    for slab in pages.slabs:
        writers = [slab.table[row] for row, start, end in spans if start < slab.end and end > slab.start]
        for run in set(writers):
            count = writers.count(run)
            needed[run.count] += count if run.holders > count or pages.pool.is_empty(run) else count - 1
    for start, end in _new_slabs(pages, min(span[1] for span in spans), max(span[2] for span in spans)):
        count = pages.pool.blocks_for(layout(pages.codecs, pages.heads, end - start)[1])
        needed[count] += sum(low < end and high > start for _, low, high in spans)
        if len(new) > 1:
            empties.add(count)
    return needed, empties


def _span(storage: LayerStorage, row: int, new: int, record: bool) -> tuple[int, int, int] | None:
    """A row and the numbers of the sealed tokens that it gets, as `LayerStorage` seals; None without any."""
    window, pages = storage.window, storage.pages
    assert isinstance(pages, PagedStore)
    new -= min(window.sink_length - window.sinks[row], new)
    total, page = window.recent[row] + new, pages.page_size
    sealing = (total - storage.config.residual_length) // page * page
    if sealing < page:
        return None
    start = pages.counts[row]
    end = start + sealing
    if storage.sliding_window is not None and not record:
        needed = max(start + total - (storage.sliding_window - 1), 0)
        start += max(min(pages.segment_of(needed)[0] - start, sealing), 0)
    return (row, start, end) if start < end else None


def _new_slabs(pages: PagedStore, start: int, end: int) -> Iterator[tuple[int, int]]:
    """First token and end of the slabs that are added so that there is room from `start` to `end`."""
    slabs = pages.slabs
    first = slabs[0].start if slabs else pages.segment_of(start)[0]
    last = slabs[-1].end if slabs else first
    while first > start:
        before = pages.segment_of(first - 1)[0]
        yield before, first
        first = before
    while last < end:
        behind = last + min(ENTRY_LENGTH, pages.segment_of(last)[1] - last)
        yield last, behind
        last = behind
