"""Reading a layer's storage: run by run with the slots each fills, or as one dense tensor of all positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .blocks import Block
from .clustered.frozen import SharedSlab
from .clustered.store import ClusteredPages
from .codecs.base import Codec, Packed
from .entries import Entries
from .host_tier import Fetched
from .lanes import LanePages
from .masks import Lines, Slots
from .storage import LayerStorage
from .tiers import Tail


@dataclass(frozen=True)
class PageRun:
    """Packed tokens to attend to: fields `[B, H, 1, ...]`, or `[lines, 1, 1, ...]` if `lanes` says whose they are.

    Only the first `tokens` of `capacity` can hold any. `block` is what lines came from, `codecs` what they are packed
    with, and `tier` names those codecs.
    """

    keys: Packed
    values: Packed
    capacity: int
    tokens: int
    slots: Slots
    codecs: Mapping[str, Codec]
    tier: str = "packed"
    lanes: torch.Tensor | None = None
    block: Block | None = None


def lane_stores(storage: LayerStorage) -> Iterator[tuple[str, LanePages, Tail | None]]:
    """The tiers of a layer that evicts, each with a name; the first has no `Tail`."""
    assert isinstance(storage.pages, LanePages)
    yield "packed", storage.pages, None
    for depth, tail in enumerate(storage.tail.chain() if storage.tail is not None else ()):
        yield f"tail{depth or ''}", tail.pages, tail


def page_runs(storage: LayerStorage, queries: torch.Tensor | None) -> Iterator[PageRun]:
    """The sealed pages, slab by slab or block by block; of a host tier those that `queries` `[B, H, M, D]` favour.

    Without queries nothing is read from a host tier.
    """
    if isinstance(storage.pages, LanePages):
        above = storage.pages, "packed"
        for name, pages, tail in lane_stores(storage):
            if tail is None or not tail.host:
                yield from (_lane_run(pages, block, name) for block in pages.blocks)
                above = pages, name
                continue
            fetched = None if queries is None else tail.fetch(queries.flatten(0, 1))
            if fetched is not None:  # packed as in the tier above it
                yield _lane_run(above[0], fetched, above[1])
        return
    sinks = max(storage.window.sinks, default=0)  # a row that has sealed anything has all its sinks
    for slab, tokens in storage.pages.runs():
        counts = [min(count, slab.end) for count in storage.pages.counts]
        slots = _page_slots(storage, sinks, slab.start, tokens, counts)
        if isinstance(slab, SharedSlab):
            assert isinstance(storage.pages, ClusteredPages)
            yield PageRun({}, {}, tokens, tokens, slots, storage.pages.run_of(slab, tokens), "exact")
            continue
        keys, values = storage.pages.packed("key", slab), storage.pages.packed("value", slab)
        yield PageRun(keys, values, slab.capacity, tokens, slots, storage.pages.codecs)


def _lane_run(pages: LanePages, block: Block, tier: str) -> PageRun:
    lanes = block.index("lanes")
    lines = Lines(lanes // pages.heads, lanes % pages.heads, pages.heads)
    tokens = max(block.counts)
    full = min(block.counts) == block.capacity and not pages.holes and not isinstance(block, Fetched)
    slots = Slots(partial(_positions_of, block, tokens), None, past=True, full=full, lines=lines)
    keys, values = pages.packed(block, "key"), pages.packed(block, "value")
    return PageRun(keys, values, block.capacity, tokens, slots, pages.codecs, tier, lanes, block)


def _positions_of(block: Block, tokens: int, device: torch.device) -> torch.Tensor:
    return block.positions[:, :tokens].to(device, torch.long)


def _page_slots(storage: LayerStorage, sinks: int, start: int, tokens: int, counts: list[int]) -> Slots:
    full = min(counts) >= start + tokens

    def positions(device: torch.device) -> torch.Tensor:
        at = storage.positions.of_slots(sinks + start, sinks + start + tokens, device)
        if full:
            return at
        # A row with fewer sealed tokens has its next slots in the window: they are not here.
        numbers = torch.arange(start, start + tokens, device=device)
        return at.masked_fill(numbers >= torch.tensor(counts, device=device)[:, None], -1)

    return Slots(positions, ("pages", sinks, start, tokens, tuple(counts), *_key(storage)), past=True, full=full)


def entry_slots(storage: LayerStorage, entries: Entries) -> Slots:
    """Where the tokens of entries stand, an entry a row."""
    sinks, at = max(storage.window.sinks, default=0), storage.positions

    def positions(device: torch.device) -> torch.Tensor:
        inside, held = torch.arange(entries.capacity), torch.tensor(entries.held)[:, None]
        number = torch.tensor(entries.starts)[:, None] + inside + sinks
        if at.table is None:
            found = number + torch.tensor(at.offsets)[entries.rows][:, None]
        else:
            rows = torch.tensor(entries.rows)[:, None]
            found = at.table[rows, number.clamp(max=at.table.shape[1] - 1)].long()
        return found.masked_fill(inside >= held, -1).to(device)

    told = (*entries.rows, *entries.starts, *entries.held)
    full = min(entries.held) == entries.capacity
    key = ("entries", sinks, entries.capacity, *told, *_key(storage))
    return Slots(positions, key, past=True, full=full, rows=entries.row_index)


def exact_run(storage: LayerStorage) -> tuple[torch.Tensor, torch.Tensor, Slots] | None:
    """Sinks and recent window as one run of keys and values `[B, H, n, D]`, with the slots they fill."""
    window = storage.window
    if not any(window.sinks) and not any(window.recent):
        return None
    length = window.sink_length + max(window.recent)  # unused sink slots of a short row are only hidden

    def positions(device: torch.device) -> torch.Tensor:
        return storage.exact_positions().to(device)

    full = set(window.sinks) == {window.sink_length} and len(set(window.recent)) == 1
    key = ("exact", tuple(window.sinks), tuple(storage.pages.counts), *_key(storage))
    return window.keys[:, :, :length], window.values[:, :, :length], Slots(positions, key, past=True, full=full)


def _key(storage: LayerStorage) -> tuple:
    positions = storage.positions
    return (*positions.offsets, *positions.counts) if positions.table is None else (id(positions.table),)


def read_dense(storage: LayerStorage, role: str, start: int, end: int) -> torch.Tensor:
    """Keys or values at the positions `start .. end`, `[B, H, end - start, D]` in the model's dtype.

    Positions without a token (padding that was dropped, tokens evicted or still in flight) are zero.
    """
    shape = (storage.batch, storage.heads[role], end - start, storage.dims[role])
    dense = torch.zeros(shape, dtype=storage.dtype, device=storage.device)
    window, sealed = storage.window, storage.pages.counts
    exact = window.keys if role == "key" else window.values
    sinks = max(window.sinks, default=0)
    _place(dense, storage, exact[:, :, :sinks], [0] * storage.batch, window.sinks, start, end)
    if isinstance(storage.pages, LanePages):
        for _, pages, _ in lane_stores(storage):
            _scatter(dense, pages, role, start, end)
    else:
        for slab, tokens in storage.pages.runs():
            held = [min(max(count - slab.start, 0), tokens) for count in sealed]
            piece = storage.pages.decode(role, slab, tokens)
            _place(dense, storage, piece, [sinks + slab.start] * storage.batch, held, start, end)
    recent = exact[:, :, window.sink_length : window.sink_length + max(window.recent, default=0)]
    first = [s + c for s, c in zip(window.sinks, sealed, strict=True)]
    _place(dense, storage, recent, first, window.recent, start, end)
    return dense


def _scatter(dense: torch.Tensor, pages: LanePages, role: str, start: int, end: int) -> None:
    """Write every lane's own tokens where they stand."""
    table = pages.table(range(pages.batch))
    at = pages.look_up("positions", table, -1).long()
    lane, place = ((at >= start) & (at < end)).nonzero(as_tuple=True)
    if len(lane):
        decoded = pages.decode(role, table)[lane, place].to(dense)
        at, lane = (at[lane, place] - start).to(dense.device), lane.to(dense.device)
        dense[lane // pages.heads, lane % pages.heads, at] = decoded


def read_kept(storage: LayerStorage, role: str) -> torch.Tensor:
    """Keys or values of the tokens that one row still holds, `[1, H, n, D]` in the order of positions.

    All heads must hold equally many.
    """
    pages, window = storage.pages, storage.window
    assert isinstance(pages, LanePages)
    exact = window.keys if role == "key" else window.values
    sealed = pages.decode(role, pages.table([0]))[None].to(storage.dtype)
    recent = exact[:, :, window.sink_length : window.sink_length + window.recent[0]]
    return torch.cat([exact[:, :, : window.sinks[0]], sealed, recent], dim=2)


def _place(
    dense: torch.Tensor,
    storage: LayerStorage,
    piece: torch.Tensor,
    first: Sequence[int],
    held: Sequence[int],
    start: int,
    end: int,
) -> None:
    """Copy the first `held[row]` tokens of each row of a piece, which fill the slots from `first[row]` on."""
    alike = storage.positions.uniform and len(set(first)) == 1 and len(set(held)) == 1
    for row in range(1 if alike else storage.batch):
        if held[row] == 0:
            continue
        at = storage.positions.of_row(row, first[row], first[row] + held[row])
        inside = (at >= start) & (at < end)
        if not bool(inside.any()):
            continue
        rows = slice(None) if alike else slice(row, row + 1)
        low, high = int(inside.nonzero()[0]), int(inside.nonzero()[-1]) + 1  # slots are sorted by position
        target = (at[low:high] - start).to(dense.device)
        dense[rows, :, target] = piece[rows, :, low:high].to(dense.dtype)
