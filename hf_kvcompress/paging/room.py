"""Blocks that a row takes in a pool, from its tokens alone."""

from __future__ import annotations

import torch

from ..codecs.registry import make_codec
from ..config import LayerConfig
from ..pages import SEGMENT_LENGTH, SEGMENT_STARTS
from ..storage import SLIDING_SEGMENT
from .cache import PagedCache
from .joining import holding
from .pages import ENTRY_LENGTH, layout

Shapes = dict[int, tuple[int, int, int]]


class Room:
    """Blocks that one row of a model's caches takes.

    Args:
        cache: an empty one, for the settings.
        shapes: heads, key and value size of each layer.
        dtype: the model's.
        block_bytes: of the pool.
    """

    def __init__(
        self, cache: PagedCache, shapes: dict[int, tuple[int, int, int]], dtype: torch.dtype, block_bytes: int
    ):
        self.layers = []
        self.token_bytes = 0  # of one token of all layers in the model's dtype
        self.window_bytes = 0  # of what a row holds outside of the pool
        for index, layer in holding(cache):
            heads, *dims = shapes[index]
            self.layers.append(_Layer(layer.config, layer.sliding_window, heads, dims, dtype, block_bytes))
            token = heads * sum(dims) * dtype.itemsize
            self.token_bytes += token
            self.window_bytes += token * (self.layers[-1].exact + layer.config.tokens_per_page)

    def blocks(self, tokens: int) -> int:
        """Blocks of a row that has read so many tokens."""
        return sum(layer.blocks(tokens) for layer in self.layers)

    def whole(self, tokens: int) -> int:
        """Blocks of the entries that a prefix of so many tokens fills: rows that share it never write to them."""
        return sum(layer.blocks(tokens, whole=True) for layer in self.layers)

    @property
    def empties(self) -> int:
        """Blocks of the empty entries that stand where rows of a batch have nothing, one of each size."""
        return sum({layer.entry(ENTRY_LENGTH) for layer in self.layers})

    def seals(self, tokens: int) -> bool:
        """Whether a layer seals pages as a row comes to so many tokens."""
        return any(layer.sealed(tokens) > layer.sealed(tokens - 1) for layer in self.layers)


class _Layer:
    def __init__(
        self, config: LayerConfig, window: int | None, heads: int, dims: list[int], dtype: torch.dtype, block_bytes: int
    ):
        self.config, self.window, self.block_bytes, self.heads = config, window, block_bytes, heads
        page, group = config.tokens_per_page, config.group_size
        names = (("key", config.keys, dims[0]), ("value", config.values, dims[1]))
        self.codecs = {
            role: make_codec(name, role, dim, page_size=page, group_size=group, dtype=dtype)  # type: ignore[arg-type]
            for role, name, dim in names
        }
        self._sizes: dict[int, int] = {}

    def blocks(self, tokens: int, whole: bool = False) -> int:
        """Blocks of all entries of a row of so many tokens, or of those that are full."""
        sealed, first = self.sealed(tokens), 0
        if self.window is not None:
            segment = max(SLIDING_SEGMENT, self.config.tokens_per_page)
            first = max(tokens - self.window + 1, 0) // segment * segment
        total, at = 0, 0
        while at < sealed:
            end = at + min(ENTRY_LENGTH, self._segment_end(at) - at)
            total += self.entry(end - at) if end > first and (end <= sealed or not whole) else 0
            at = end
        return total

    @property
    def exact(self) -> int:
        """Tokens that are never sealed: sinks and the shortest recent window."""
        return self.config.residual_length + (self.config.sink_length if self.window is None else 0)

    def sealed(self, tokens: int) -> int:
        """Sealed tokens of a row that has read so many."""
        return max(tokens - self.exact, 0) // self.config.tokens_per_page * self.config.tokens_per_page

    def _segment_end(self, token: int) -> int:
        if self.window is not None:
            segment = max(SLIDING_SEGMENT, self.config.tokens_per_page)
            return (token // segment + 1) * segment
        grown = (token // SEGMENT_LENGTH + 1) * SEGMENT_LENGTH
        return next((start for start in SEGMENT_STARTS if token < start), grown)

    def entry(self, capacity: int) -> int:
        if capacity not in self._sizes:
            self._sizes[capacity] = -(-layout(self.codecs, self.heads, capacity)[1] // self.block_bytes)
        return self._sizes[capacity]


def block_bytes(cache: PagedCache, shapes: Shapes, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of a block of `tokens` tokens in the layer that takes most."""
    room = Room(cache, shapes, dtype, 1)
    return max(layout(layer.codecs, layer.heads, tokens)[1] for layer in room.layers)
