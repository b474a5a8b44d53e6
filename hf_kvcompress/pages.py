"""Packed pages of one layer: slabs of pages, ragged by row, written in place.

A row's sealed tokens are numbered 0, 1, 2 ... ; segments, which share statistics, start at fixed numbers, so what a row
stores never depends on the rows beside it. A slab is room for some pages of one segment, for every row; slabs are
added, never grown, so a step that needs room never copies what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .codecs.base import Codec, Packed
from .entries import EntryRun

SEGMENT_STARTS = (0, 128, 512, 2048)  # then every 2048: a short sequence cannot wait for good statistics
SEGMENT_LENGTH = 2048  # codes of one head, unpacked, stay in a core's cache
SLAB_LENGTH = 512  # room made at least, where the segment has it


@dataclass
class Slab:
    """Room for `capacity` tokens from token number `start` on, all of one segment, for every row.

    The packed tensors are `[B, H, 1, ...]`: a slab is one segment to its codecs.
    """

    start: int
    capacity: int
    keys: Packed
    values: Packed

    @property
    def end(self) -> int:
        return self.start + self.capacity

    def packed(self, role: str) -> Packed:
        return self.keys if role == "key" else self.values


class PageStore:
    """The sealed pages of one layer.

    Args:
        key_codec, value_codec: how keys and values are packed.
        batch, heads: B and H.
        device: where the pages live.
        segment_length: length of all segments; None for the growing schedule.
        first: tokens of a row that stand before its first sealed one.
    """

    plain_slabs = True  # what is stored are the slabs' tensors and nothing else; a sealed page never changes
    gathers = False  # `entries` says what there is

    def __init__(
        self,
        key_codec: Codec,
        value_codec: Codec,
        batch: int,
        heads: int,
        device: torch.device,
        segment_length: int | None = None,
        first: int = 0,
    ):
        self.codecs: dict[str, Codec] = {"key": key_codec, "value": value_codec}
        self.first = first
        self.heads, self.device, self.segment_length = heads, device, segment_length
        self.page_size = key_codec.page_size
        self.slabs: list[Slab] = []
        self.histories: dict[str, Packed] = {"key": {}, "value": {}}  # each tensor `[B, H, 1, ...]`
        self.counts = [0] * batch  # sealed tokens of each row, those that have left a sliding window included

    # -- room ----------------------------------------------------------------------------------------------------------

    def segment_of(self, token: int) -> tuple[int, int]:
        """First token number of the segment that holds `token`, and of the next one."""
        if self.segment_length is not None:
            start = token // self.segment_length * self.segment_length
            return start, start + self.segment_length
        for start, end in zip(SEGMENT_STARTS, SEGMENT_STARTS[1:], strict=False):
            if token < end:
                return start, end
        start = token // SEGMENT_LENGTH * SEGMENT_LENGTH
        return start, start + SEGMENT_LENGTH

    def _add_slab(self, start: int, tokens: int) -> None:
        self.make_slab(start, min(max(tokens, SLAB_LENGTH), self.segment_of(start)[1] - start))

    def make_slab(self, start: int, capacity: int) -> None:
        """Add an empty slab of `capacity` tokens from token number `start` on."""
        self.slabs.append(self._empty_slab(start, capacity))

    def _empty_slab(self, start: int, capacity: int) -> Slab:
        leading = (len(self.counts), self.heads, 1)
        packed = {
            role: {
                name: torch.zeros(field.stored_shape(leading, capacity), dtype=field.dtype, device=self.device)
                for name, field in codec.fields.items()
            }
            for role, codec in self.codecs.items()
        }
        return Slab(start, capacity, packed["key"], packed["value"])

    def _reserve(self, start: int, end: int) -> None:
        if not self.slabs:
            first = self.segment_of(start)[0]
            self._add_slab(first, end - first)
        while self.slabs[0].start > start:  # a shorter row, whose sliding window begins in an earlier segment
            behind = self.slabs[0].start
            first = self.segment_of(behind - 1)[0]
            self.make_slab(first, behind - first)
            self.slabs.insert(0, self.slabs.pop())
        while self.slabs[-1].end < end:
            self._add_slab(self.slabs[-1].end, end - self.slabs[-1].end)

    # -- writing -------------------------------------------------------------------------------------------------------

    def seal(
        self,
        rows: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: int,
        query_ms: torch.Tensor | None = None,
        query_moment: torch.Tensor | None = None,
    ) -> None:
        """Pack the first `tokens` of keys and values `[len(rows), H, >= tokens, D]` behind what the rows hold.

        The rows must hold equally many sealed tokens. What stands behind `tokens` is not packed but may inform the
        statistics of a segment that begins here.
        """
        start = self.counts[rows[0]]
        self._reserve(start, start + tokens)
        index: slice | torch.Tensor = (
            slice(None) if len(rows) == len(self.counts) else torch.tensor(rows, device=self.device)
        )
        for before, slab in zip([None, *self.slabs], self.slabs, strict=False):
            low, high = max(start, slab.start), min(start + tokens, slab.end)
            if low < high:
                pair = (keys[:, :, low - start :], values[:, :, low - start :])
                self._seal_in(slab, before, index, low, high - low, pair, query_ms, query_moment)
        for row in rows:
            self.counts[row] = start + tokens

    def _seal_in(
        self,
        slab: Slab,
        before: Slab | None,
        index: slice | torch.Tensor,
        low: int,
        tokens: int,
        pair: tuple[torch.Tensor, torch.Tensor],
        query_ms: torch.Tensor | None,
        query_moment: torch.Tensor | None,
    ) -> None:
        """Pack `tokens` tokens into a slab at token number `low`, with statistics made, carried over or found there."""
        segment_start, segment_end = self.segment_of(low)
        for role, x in zip(("key", "value"), pair, strict=True):
            codec, packed = self.codecs[role], slab.packed(role)
            at: tuple[Any, ...] = (index, slice(None), slice(0, 1))
            if low == segment_start:
                known = x[:, :, : segment_end - low].unsqueeze(2)
                places = self.places(role, low, known.shape[3])
                ms = query_ms[:, :, None] if query_ms is not None and role == "key" else None
                history = {**self._history(role, at, low), **places}
                for name, statistic in codec.begin_segment(known, ms, history).items():
                    packed[name][at] = statistic
            elif low == slab.start:  # a further slab of the same segment
                assert before is not None
                for name in codec.statistics:
                    packed[name][at] = before.packed(role)[name][at]
            statistics = {name: packed[name][at] for name in codec.statistics} | self.places(role, low, tokens)
            self._learn(role, at, low, x[:, :, None, :tokens])
            inside = low - slab.start
            queries = query_moment if role == "key" else None
            for name, entry in codec.encode(x[:, :, None, :tokens], statistics, queries).items():
                field = codec.fields[name]
                assert field.tokens is not None
                units = slice(inside // field.tokens, (inside + tokens) // field.tokens)
                packed[name][(*at, ..., units) if field.tokens_last else (*at, units)] = entry

    def _history(self, role: str, at: tuple[Any, ...], sealed: int) -> Packed:
        return {name: t[at] for name, t in self.histories[role].items()} if sealed else {}

    def _learn(self, role: str, at: tuple[Any, ...], sealed: int, x: torch.Tensor) -> None:
        """Let the codec remember tokens that rows with `sealed` tokens before are about to seal."""
        kept = self.histories[role]
        history = {**self._history(role, at, sealed), **self.places(role, sealed, x.shape[3])}
        for name, learned in self.codecs[role].learn(history, x).items():
            if name not in kept:
                kept[name] = learned.new_zeros(len(self.counts), *learned.shape[1:])
            kept[name][at] = learned

    def write(self, slab: Slab, role: str, name: str, unit: int, data: torch.Tensor) -> None:
        """Copy packed entries `data` of a field into a slab, from entry number `unit` on."""
        axis = -1 if self.codecs[role].fields[name].tokens_last else 3
        slab.packed(role)[name].narrow(axis, unit, data.shape[axis]).copy_(data)

    # -- reading -------------------------------------------------------------------------------------------------------

    def entries(self) -> list[EntryRun] | None:
        """All sealed tokens row by row, where they are to be read so instead of slab by slab."""
        return None

    def places(self, role: str, start: int, tokens: int) -> Packed:
        """Where sealed tokens stand in their rows, `[tokens]` as "at", for a codec that asks for it.

        They are counted, so this is exact wherever no padding stands between a row's tokens.
        """
        if not self.codecs[role].wants_positions:
            return {}
        begin = self.first + start
        return {"at": torch.arange(begin, begin + tokens, dtype=torch.int32, device=self.device)}

    def packed(self, role: str, slab: Slab) -> Packed:
        """A slab's fields, with positions for a codec that asks for them."""
        return {**slab.packed(role), **self.places(role, slab.start, slab.capacity)}

    def runs(self) -> Iterator[tuple[Slab, int]]:
        """Each slab with the tokens that its fullest row has in it."""
        most = max(self.counts, default=0)
        for slab in self.slabs:
            if most > slab.start:
                yield slab, min(most, slab.end) - slab.start

    def decode(self, role: str, slab: Slab, tokens: int) -> torch.Tensor:
        """Read back the first `tokens` tokens of a slab, `[B, H, tokens, D]` float32."""
        return self.codecs[role].decode(self.packed(role, slab)).flatten(2, 3)[:, :, :tokens]

    def read_row(self, row: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read back keys and values of the tokens `start .. end` of one row, `[1, H, end - start, D]` float32 each."""
        both = []
        for role in ("key", "value"):
            parts = []
            for slab, tokens in self.runs():
                low, high = max(start - slab.start, 0), min(end - slab.start, tokens)
                if low < high:
                    parts.append(self.decode(role, slab, tokens)[row : row + 1, :, low:high])
            both.append(torch.cat(parts, dim=2))
        return both[0], both[1]

    def state(self, row: int) -> tuple[int, ...]:
        """Rows with the same state pack the same tokens alike."""
        return (self.counts[row],)

    # -- rows and tokens -----------------------------------------------------------------------------------------------

    def map_rows(self, rows: torch.Tensor) -> None:
        """Make row i of the store what row `rows[i]` was."""
        self.counts = [self.counts[row] for row in rows.tolist()]
        rows = rows.to(self.device)
        for slab in self.slabs:
            slab.keys = {name: t.index_select(0, rows) for name, t in slab.keys.items()}
            slab.values = {name: t.index_select(0, rows) for name, t in slab.values.items()}
        for history in self.histories.values():
            history.update({name: t.index_select(0, rows) for name, t in history.items()})

    def drop_before(self, token: int) -> None:
        """Give back the slabs that end at or before token number `token`."""
        while self.slabs and self.slabs[0].end <= token:
            self.slabs.pop(0)

    def truncate(self, row: int, tokens: int) -> None:
        """Forget a row's tokens from number `tokens` on (a multiple of the page size)."""
        self.counts[row] = min(self.counts[row], tokens)
        most = max(self.counts)
        while self.slabs and self.slabs[-1].start >= most:
            self.slabs.pop()

    def tensors(self) -> Iterator[torch.Tensor]:
        for slab in self.slabs:
            yield from slab.keys.values()
            yield from slab.values.values()
        for history in self.histories.values():
            yield from history.values()

    def tokens_in_slabs(self) -> int:
        """Sealed tokens that are still held, over all rows."""
        filled = (min(max(count - slab.start, 0), slab.capacity) for slab in self.slabs for count in self.counts)
        return sum(filled)

    def used_bytes(self) -> int:
        """Bytes of the entries that hold tokens, statistics included; the rest of the tensors is slack."""
        total = 0
        for codec in self.codecs.values():
            for slab in self.slabs:
                for count in self.counts:
                    tokens = min(max(count - slab.start, 0), slab.capacity)
                    for field in codec.fields.values():
                        entry = field.dtype.itemsize * self.heads
                        for size in field.shape:
                            entry *= size
                        units = int(tokens > 0) if field.tokens is None else tokens // field.tokens
                        total += entry * units
        return total
