"""Reading a layer's storage: run by run with the slots each fills, or as one dense tensor of all positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .masks import Slots
from .pages import Slab
from .storage import LayerStorage


def page_runs(storage: LayerStorage) -> Iterator[tuple[Slab, int, Slots]]:
    """The sealed pages slab by slab: the slab, the tokens its fullest row has in it, and their slots."""
    sinks = max(storage.window.sinks, default=0)  # a row that has sealed anything has all its sinks
    for slab, tokens in storage.pages.runs():
        counts = [min(count, slab.end) for count in storage.pages.counts]
        yield slab, tokens, _page_slots(storage, sinks, slab.start, tokens, counts)


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


def exact_run(storage: LayerStorage) -> tuple[torch.Tensor, torch.Tensor, Slots] | None:
    """Sinks and recent window as one run of keys and values `[B, H, n, D]`, with the slots they fill."""
    window = storage.window
    if not any(window.sinks) and not any(window.recent):
        return None
    length = window.sink_length + max(window.recent)  # unused sink slots of a short row are only hidden

    def positions(device: torch.device) -> torch.Tensor:
        table = torch.full((storage.batch, length), -1)
        for row, (sinks, sealed, recent) in enumerate(
            zip(window.sinks, storage.pages.counts, window.recent, strict=True)
        ):
            at, first = window.sink_length, sinks + sealed
            table[row, :sinks] = storage.positions.of_row(row, 0, sinks)
            table[row, at : at + recent] = storage.positions.of_row(row, first, first + recent)
        return table.to(device)

    full = set(window.sinks) == {window.sink_length} and len(set(window.recent)) == 1
    key = ("exact", tuple(window.sinks), tuple(storage.pages.counts), *_key(storage))
    return window.keys[:, :, :length], window.values[:, :, :length], Slots(positions, key, past=True, full=full)


def _key(storage: LayerStorage) -> tuple:
    positions = storage.positions
    return (*positions.offsets, *positions.counts) if positions.table is None else (id(positions.table),)


def read_dense(storage: LayerStorage, role: str, start: int, end: int) -> torch.Tensor:
    """Keys or values at the positions `start .. end`, `[B, H, end - start, D]` in the model's dtype.

    Positions without a token (padding that was dropped, or tokens still in flight) are zero.
    """
    shape = (storage.batch, storage.heads[role], end - start, storage.dims[role])
    dense = torch.zeros(shape, dtype=storage.dtype, device=storage.device)
    window, sealed = storage.window, storage.pages.counts
    exact = window.keys if role == "key" else window.values
    sinks = max(window.sinks, default=0)
    _place(dense, storage, exact[:, :, :sinks], [0] * storage.batch, window.sinks, start, end)
    for slab, tokens in storage.pages.runs():
        held = [min(max(count - slab.start, 0), tokens) for count in sealed]
        piece = storage.pages.decode(role, slab, tokens)
        _place(dense, storage, piece, [sinks + slab.start] * storage.batch, held, start, end)
    recent = exact[:, :, window.sink_length : window.sink_length + max(window.recent, default=0)]
    first = [s + c for s, c in zip(window.sinks, sealed, strict=True)]
    _place(dense, storage, recent, first, window.recent, start, end)
    return dense


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
