"""What one layer stores: exact sinks, sealed pages, exact recent window, ragged by row. It knows no transformers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from .codecs.base import Codec, Role
from .codecs.registry import make_codec
from .config import LayerConfig
from .monitor import Monitor
from .pages import PageStore
from .positions import Positions
from .queries import QueryStatistics
from .window import ExactWindow

SLIDING_SEGMENT = 128  # what has left a sliding window is given back a segment at a time


class LayerStorage:
    """The kept tokens of one layer, in slots sorted by position: sinks, sealed pages, recent window.

    Args:
        config: codecs and lengths.
        keys, values: a first chunk `[B, H, q, D]`, for shapes, dtype and device only.
        sliding_window: tokens that a query sees, itself included; None for full attention.
        index: the layer's number, for the monitor.
        monitor: measures what sealing loses, if given.
    """

    def __init__(
        self,
        config: LayerConfig,
        keys: torch.Tensor,
        values: torch.Tensor,
        sliding_window: int | None,
        index: int,
        monitor: Monitor | None,
    ):
        self.config, self.sliding_window, self.index, self.monitor = config, sliding_window, index, monitor
        batch, heads, _, key_dim = keys.shape
        self.dtype, self.device = keys.dtype, keys.device
        self.heads = {"key": heads, "value": values.shape[1]}
        self.dims = {"key": key_dim, "value": values.shape[-1]}
        sinks = config.sink_length if sliding_window is None else 0
        room = config.residual_length + config.tokens_per_page  # what comes on top is sealed before it is stored
        self.window = ExactWindow(batch, heads, key_dim, values.shape[-1], sinks, room, self.dtype, self.device)
        codecs = self._codec(config.keys, "key"), self._codec(config.values, "value")
        segment = max(SLIDING_SEGMENT, config.tokens_per_page) if sliding_window is not None else None
        self.pages = PageStore(codecs[0], codecs[1], batch, heads, self.device, segment)
        self.positions = Positions(batch)
        self.queries = QueryStatistics(batch, heads, codecs[0].wants_query_moment)

    def _codec(self, name: str, role: Role) -> Codec:
        page_size, group_size = self.config.tokens_per_page, self.config.group_size
        made = make_codec(name, role, self.dims[role], page_size=page_size, group_size=group_size, dtype=self.dtype)
        made.compute_dtype = torch.bfloat16 if self.dtype.itemsize == 2 else torch.float32
        return made

    @property
    def batch(self) -> int:
        return self.positions.batch

    # -- appending -----------------------------------------------------------------------------------------------------

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, start: int, kept: Sequence[torch.Tensor] | None, record: bool
    ) -> None:
        """Append a chunk `[B, H, q, D]` that stands at `start`, of each row only the tokens at `kept[row]`, and seal.

        With `record` a sliding layer gives nothing back, so that the chunk can be cropped again.
        """
        length = keys.shape[2]
        self.positions.append(start, kept, length)
        alike: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)
        for row in range(self.batch):
            new = length if kept is None else len(kept[row])
            if new:
                state = (self.window.sinks[row], self.pages.counts[row], self.window.recent[row], new)
                alike[state].append(row)
        for (*_, new), rows in alike.items():
            if len(rows) == self.batch and new == length:
                self._append_rows(rows, keys, values, record)
                continue
            index = torch.tensor(rows, device=keys.device)[:, None]
            picked = torch.arange(length)[None] if kept is None else torch.stack([kept[row] for row in rows])
            picked = picked.to(keys.device)
            own_keys, own_values = (x.transpose(1, 2)[index, picked].transpose(1, 2) for x in (keys, values))
            self._append_rows(rows, own_keys.contiguous(), own_values.contiguous(), record)
        self.queries.newest = None  # they were of this pass only
        if not record:
            self.drop_expired()

    def _append_rows(self, rows: list[int], keys: torch.Tensor, values: torch.Tensor, record: bool) -> None:
        """Append new tokens to rows that are alike in sinks, sealed and recent tokens."""
        window, page = self.window, self.pages.page_size
        sinks = min(window.sink_length - window.sinks[rows[0]], keys.shape[2])
        if sinks:
            window.add_sinks(rows, keys[:, :, :sinks], values[:, :, :sinks])
            keys, values = keys[:, :, sinks:], values[:, :, sinks:]
        recent = window.recent[rows[0]]
        sealing = (recent + keys.shape[2] - self.config.residual_length) // page * page
        if sealing < page:
            window.append(rows, keys, values)
            return
        if recent:
            old_keys, old_values = window.recent_of(rows)
            keys, values = torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)
        skipped = 0 if record else self._skip_unseen(rows, keys.shape[2], sealing)
        self._seal(rows, keys[:, :, skipped:], values[:, :, skipped:], sealing - skipped)
        window.replace(rows, keys[:, :, sealing:], values[:, :, sealing:])

    def _skip_unseen(self, rows: list[int], new: int, sealing: int) -> int:
        """Tokens of a long prompt that have left a sliding window before they were ever sealed are not packed."""
        if self.sliding_window is None:
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

    def _seal(self, rows: list[int], keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        if tokens == 0:
            return
        before = self.pages.counts[rows[0]]
        self.pages.seal(rows, keys, values, tokens, self.queries.mean_square(rows), self.queries.moment(rows))
        if self.monitor is not None:
            self.monitor.measure(self.index, self.pages, rows, before, keys[:, :, :tokens], values[:, :, :tokens])

    def drop_expired(self) -> None:
        """Give back pages that no coming query of a sliding layer sees."""
        if self.sliding_window is None:
            return
        rows = zip(self.window.sinks, self.pages.counts, self.window.recent, strict=True)
        self.pages.drop_before(min(max(sum(row) - (self.sliding_window - 1), 0) for row in rows))

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
            keys, values = (self.pages.decode_row(role, row, whole, inside) for role in ("key", "value"))
            self.window.replace([row], keys.to(self.dtype), values.to(self.dtype))
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

    def tokens_stored(self) -> list[int]:
        """Tokens of each row that queries to come can see."""
        counts = self.positions.counts
        return counts if self.sliding_window is None else [min(count, self.sliding_window - 1) for count in counts]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor held."""
        yield from (self.window.keys, self.window.values)
        yield from self.pages.tensors()
        yield from (t for t in (self.positions.table, self.queries.sums) if t is not None)
