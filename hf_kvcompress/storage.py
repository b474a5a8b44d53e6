"""What one layer stores: exact sinks, sealed pages, exact recent window, ragged by row. It knows no transformers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from .clustered.importance import newest_queries
from .clustered.shared import Sharing
from .clustered.store import ClusteredPages
from .codecs.base import CodecContext
from .config import LayerConfig
from .eviction import Evictor
from .exact_copies import ExactCopies
from .lanes import LanePages
from .observation import Observation
from .pages import PageStore
from .positions import Positions
from .queries import QueryStatistics
from .sealing_error import SealingMonitor
from .shards import first_head
from .storage_parts import codecs_of, copies_of, tail_of
from .tiers import Tail
from .window import ExactWindow, Parts

SLIDING_SEGMENT = 128  # what has left a sliding window is given back a segment at a time


class LayerStorage:
    """The kept tokens of one layer, in slots sorted by position: sinks, sealed pages, recent window.

    Args:
        config: codecs and lengths.
        keys, values: a first chunk `[B, H, q, D]`, for shapes, dtype and device only.
        sliding_window: tokens that a query sees, itself included; None for full attention.
        index: the layer's number, for the monitor.
        monitor: measures what sealing loses, if given.
        context: what codecs may have to know of the layer.
        sharing: store pages that are like others by them, if given.
    """

    def __init__(
        self,
        config: LayerConfig,
        keys: torch.Tensor,
        values: torch.Tensor,
        sliding_window: int | None,
        index: int,
        monitor: SealingMonitor | None,
        context: CodecContext | None = None,
        sharing: Sharing | None = None,
    ):
        self.context = context or CodecContext(index)
        self.config, self.sliding_window, self.index, self.monitor = config, sliding_window, index, monitor
        batch, heads, _, key_dim = keys.shape
        self.dtype, self.device = keys.dtype, keys.device
        self.heads = {"key": heads, "value": values.shape[1]}
        self.dims = {"key": key_dim, "value": values.shape[-1]}
        sinks = config.sink_length if sliding_window is None else 0
        room = config.residual_length + config.tokens_per_page  # what comes on top is sealed before it is stored
        codecs = codecs_of(self)
        evicts = config.eviction is not None and (sliding_window is None or config.sliding == "evict")
        first = first_head(self.context.heads or heads, heads)
        self.evictor = Evictor(config, index, batch, heads, sliding_window, first) if evicts else None
        mass = self.evictor is not None and self.evictor.wants_mass
        self.window = ExactWindow(batch, heads, key_dim, values.shape[-1], sinks, room, self.dtype, self.device, mass)
        self.positions = Positions(batch)
        self.pages: PageStore | LanePages
        self.tail: Tail | None = None
        self.copies: ExactCopies | None = None  # of what is in the tail
        if self.evictor is not None:
            self.pages = LanePages(*codecs, batch, heads, self.device, mass, self.first_position)
            self.tail = tail_of(self, self.evictor.settings, mass)
            self.copies = copies_of(self, self.evictor.settings)
        else:
            segment = max(SLIDING_SEGMENT, config.tokens_per_page) if sliding_window is not None else None
            made = *codecs, batch, heads, self.device, segment, sinks
            self.pages = PageStore(*made)
            if sharing is not None:
                self.pages = ClusteredPages(sharing, index, self.first_position, *made)
        self.queries = QueryStatistics(batch, heads, codecs[0].wants_query_moment)

    @property
    def batch(self) -> int:
        return self.positions.batch

    @property
    def wants_queries(self) -> bool:
        """Sealing asks for the queries of the pass."""
        asks = isinstance(self.pages, ClusteredPages) and self.pages.clusters.settings.importance
        return asks or self.pages.codecs["key"].wants_queries

    def observe_queries(
        self, queries: Sequence[torch.Tensor], scaling: float, kept: Sequence[torch.Tensor] | None
    ) -> None:
        """Show whoever seals the queries `[B, Hq, q, D]` of the layers that read this pass's keys."""
        if self.pages.codecs["key"].wants_queries:
            for own in queries:
                self.queries.observe(own, kept)
        if queries and isinstance(self.pages, ClusteredPages):
            self.pages.newest = newest_queries(queries[0], scaling, kept)

    @property
    def ragged(self) -> bool:
        """Rows or heads may hold different numbers of tokens."""
        uniform = self.evictor is None or self.evictor.settings.uniform_heads
        return self.batch > 1 or self.tail is not None or not uniform

    # -- appending -----------------------------------------------------------------------------------------------------

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
        kept: Sequence[torch.Tensor] | None,
        record: bool,
        observed: Observation | None = None,
    ) -> None:
        """Append a chunk `[B, H, q, D]` that stands at `start`, of each row what is at `kept[row]`; seal, evict.

        With `record` a sliding layer gives nothing back, so that the chunk can be cropped again. `observed` is the
        attention that tokens received in this pass.
        """
        length = keys.shape[2]
        chunk: Parts = (keys, values)
        if self.window.mass is not None:
            chunk += (self._add_mass(observed, keys),)
        self.positions.append(start, kept, length)
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row in self._append_one(chunk) if length == 1 and kept is None and self.batch > 1 else range(self.batch):
            new = length if kept is None else len(kept[row])
            if new:
                state = (self.window.sinks[row], *self.pages.state(row), self.window.recent[row], new)
                alike[state].append(row)
        if self.evictor is not None:
            self.evictor.note_prompts([length] * self.batch if kept is None else [len(own) for own in kept])
        for (*_, new), rows in alike.items():
            if len(rows) == self.batch and new == length:
                self._append_rows(rows, chunk, record)
                continue
            index = torch.tensor(rows, device=keys.device)[:, None]
            picked = torch.arange(length)[None] if kept is None else torch.stack([kept[row] for row in rows])
            picked = picked.to(keys.device)
            own = (part.transpose(1, 2)[index, picked].transpose(1, 2).contiguous() for part in chunk)
            self._append_rows(rows, tuple(own), record)
        self.queries.newest = None  # they were of this pass only
        if isinstance(self.pages, ClusteredPages):
            self.pages.newest = None
        if self.evictor is not None:
            self.evictor.evict(self)
        elif not record:
            self.drop_expired()

    def _append_one(self, chunk: Parts) -> list[int]:
        """Append a token to all rows at once that only have to write it down; gives those that have more to do."""
        window, most = self.window, self.config.residual_length + self.pages.page_size - 1
        if isinstance(self.pages, ClusteredPages):
            return list(range(self.batch))
        ready = [s == window.sink_length and r < most for s, r in zip(window.sinks, window.recent, strict=True)]
        rows = [row for row, own in enumerate(ready) if own]
        if rows:
            window.append_one(rows, chunk)
        return [row for row, own in enumerate(ready) if not own]

    def _add_mass(self, observed: Observation | None, keys: torch.Tensor) -> torch.Tensor:
        """Credit stored tokens with what they received; returns the new tokens' own `[B, H, q, 1]`."""
        if observed is None:
            return keys.new_zeros(*keys.shape[:3], 1, dtype=torch.float32)
        assert self.window.mass is not None and isinstance(self.pages, LanePages)
        if observed.exact is not None:
            self.window.mass[:, :, : observed.exact.shape[2]] += observed.exact
        for block, mass in observed.blocks:
            block.credit(mass)
        assert observed.new is not None
        return observed.new[..., None]

    def _append_rows(self, rows: list[int], tokens: Parts, record: bool) -> None:
        """Append new tokens to rows that are alike in sinks, sealed and recent tokens."""
        window, page = self.window, self.pages.page_size
        if isinstance(self.pages, ClusteredPages):
            self.pages.note(rows, self.seen_by(rows[0]), tokens[1])
        sinks = min(window.sink_length - window.sinks[rows[0]], tokens[0].shape[2])
        if sinks:
            window.add_sinks(rows, tuple(part[:, :, :sinks] for part in tokens))
            tokens = tuple(part[:, :, sinks:] for part in tokens)
        recent = window.recent[rows[0]]
        sealing = (recent + tokens[0].shape[2] - self.config.residual_length) // page * page
        if sealing < page:
            window.append(rows, tokens)
            return
        if recent:
            old = window.recent_of(rows)
            tokens = tuple(torch.cat(pair, dim=2) for pair in zip(old, tokens, strict=True))
        skipped = 0 if record else self._skip_unseen(rows, tokens[0].shape[2], sealing)
        self._seal(rows, tuple(part[:, :, skipped:] for part in tokens), sealing - skipped)
        window.replace(rows, tuple(part[:, :, sealing:] for part in tokens))

    def _skip_unseen(self, rows: list[int], new: int, sealing: int) -> int:
        """Tokens of a long prompt that have left a sliding window before they were ever sealed are not packed."""
        if self.sliding_window is None or isinstance(self.pages, LanePages):
            return 0
        start = self.pages.counts[rows[0]]
        needed = max(start + new - (self.sliding_window - 1), 0)
        skip = min(self.pages.segment_of(needed)[0] - start, sealing)
        if skip <= 0:
            return 0
        for row in rows:
            self.pages.counts[row] += skip
        self.drop_expired()
        return skip

    def _seal(self, rows: list[int], tokens: Parts, number: int) -> None:
        if number == 0:
            return
        before, pages = self.pages.counts[rows[0]], self.pages
        keys, values, *mass = tokens
        queries = self.queries.mean_square(rows), self.queries.moment(rows)
        if isinstance(pages, LanePages):
            assert self.evictor is not None
            sinks = self.window.sinks[rows[0]]  # all a row may have, as it seals
            at = [self.positions.of_row(row, sinks + before, sinks + before + keys.shape[2]) for row in rows]
            own_mass = mass[0][:, :, :number, 0] if mass else None
            room = min(self.evictor.room(self.seen_by(row), pages.most_held(row)) for row in rows)
            pages.seal(rows, keys, values, number, torch.stack(at), own_mass, room, *queries)
        else:
            pages.seal(rows, keys, values, number, *queries)
        if self.monitor is not None:
            self.monitor.measure(self.index, pages, rows, before, keys[:, :, :number], values[:, :, :number])

    def drop_expired(self) -> None:
        """Give back pages that no coming query of a sliding layer sees."""
        if self.sliding_window is None or isinstance(self.pages, LanePages):
            return
        rows = zip(self.window.sinks, self.pages.counts, self.window.recent, strict=True)
        self.pages.drop_before(min(max(sum(row) - (self.sliding_window - 1), 0) for row in rows))

    # -- what a policy asks --------------------------------------------------------------------------------------------

    def seen_by(self, row: int) -> int:
        """Tokens that a row has taken in, evicted ones included and padding not."""
        return self.window.sinks[row] + self.pages.counts[row] + self.window.recent[row]

    def first_position(self, row: int) -> int:
        """Position of a row's first token."""
        return int(self.positions.of_row(row, 0, 1)[0])

    def exact_keys(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[L, n, D]` float32 and positions `[L, n]` of the rows' sinks and recent window, -1 where none."""
        heads, length = self.heads["key"], self.window.sink_length + max(self.window.recent)
        keys = self.window.keys[list(rows), :, :length].float()
        table = self.exact_positions()[list(rows)].to(self.device)
        keys = keys * (table >= 0)[:, None, :, None]
        return keys.flatten(0, 1), table.repeat_interleave(heads, 0)

    def exact_positions(self) -> torch.Tensor:
        """Positions of the sinks and recent window, `[B, sink_length + longest window]` on the host, -1 where none."""
        window = self.window
        table = torch.full((self.batch, window.sink_length + max(window.recent)), -1)
        for row, (sinks, sealed, recent) in enumerate(zip(window.sinks, self.pages.counts, window.recent, strict=True)):
            at, first = window.sink_length, sinks + sealed
            table[row, :sinks] = self.positions.of_row(row, 0, sinks)
            table[row, at : at + recent] = self.positions.of_row(row, first, first + recent)
        return table

    # -- tokens and rows -----------------------------------------------------------------------------------------------

    def truncate(self, position: int) -> None:
        """Forget all tokens from `position` on; what stays of a cut page returns to the window as it decodes."""
        counts = [self.positions.count_before(row, position) for row in range(self.batch)]
        for row, count in enumerate(counts):
            self._truncate_row(row, count)
        self.positions.truncate(counts)

    def _truncate_row(self, row: int, count: int) -> None:
        sinks, sealed = self.window.sinks[row], self.pages.counts[row]
        if count >= sinks + sealed:
            self.window.recent[row] = count - sinks - sealed
            return
        inside = max(count - sinks, 0)
        whole = inside // self.pages.page_size * self.pages.page_size
        if inside > whole:
            self.window.replace([row], self.pages.read_row(row, whole, inside))
        else:
            self.window.recent[row] = 0
        self.window.sinks[row] = min(sinks, count)
        self.pages.truncate(row, whole)

    def map_rows(self, rows: torch.Tensor) -> None:
        """Make row i what row `rows[i]` was (indices on the host)."""
        self.window.map_rows(rows)
        self.pages.map_rows(rows)
        self.positions.map_rows(rows.tolist())
        self.queries.map_rows(rows.tolist())
        if self.evictor is not None:
            self.evictor.map_rows(rows.tolist())
        for other in (self.tail, self.copies):
            if other is not None:
                other.map_rows(rows)

    def tokens_stored(self) -> list[int]:
        """Tokens of each row that queries to come can see, on average over heads."""
        counts = self.positions.counts
        if isinstance(self.pages, LanePages):
            return [
                sinks + self.pages.mean_held(row) + recent
                for row, (sinks, recent) in enumerate(zip(self.window.sinks, self.window.recent, strict=True))
            ]
        return counts if self.sliding_window is None else [min(count, self.sliding_window - 1) for count in counts]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor held."""
        yield from self.window.parts
        yield from self.pages.tensors()
        for other in (self.tail, self.copies):
            if other is not None:
                yield from other.tensors()
        if self.evictor is not None:
            yield from self.evictor.tensors()
        yield from (t for t in (self.positions.table, self.queries.sums) if t is not None)
