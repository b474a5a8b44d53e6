"""Bytes that one layer of a cache holds, from numbers alone: codecs, head sizes, tokens. No model is needed.

The figures are what a layer holds at most, allocated room included, however its tokens came: one prompt, chunks, single
steps. What a pass in flight takes on top is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from .codecs.base import Role
from .codecs.registry import make_codec
from .config import LayerConfig
from .lane_statistics import ENOUGH, GROWTH
from .measure import tensor_bytes
from .pages import SEGMENT_LENGTH, SEGMENT_STARTS, SLAB_LENGTH
from .policies.settings import HOST

SLIDING_SEGMENT = 128  # sliding layers give back what has left their window in segments of so many tokens
LANE_SLACK = 0.06  # of the tokens of a layer with a policy: room for the pages that are being filled
POSITION_BYTES = MASS_BYTES = 4


def evicts(layer: LayerConfig, sliding_window: int | None) -> bool:
    """Whether these settings drop tokens in a layer with this window (None: full attention)."""
    return layer.eviction is not None and (sliding_window is None or layer.sliding == "evict")


def dense_bytes(tokens: int, key_dim: int, value_dim: int, heads: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes of `tokens` tokens a head in the model's dtype."""
    return tokens * (key_dim + value_dim) * heads * batch * dtype.itemsize


def layer_bytes(
    layer: LayerConfig,
    tokens: int,
    *,
    key_dim: int,
    value_dim: int,
    heads: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    query_heads: int | None = None,
    sliding_window: int | None = None,
) -> int:
    """Bytes that one packed layer holds at most.

    Args:
        layer: its settings.
        tokens: tokens seen; in a layer that evicts, tokens that a head keeps, sinks and recent window included.
        key_dim, value_dim, heads: of the keys and values stored.
        query_heads: of the model, for policies that hold on to queries; None takes `heads`.
        sliding_window: tokens that a query sees, itself included; None for full attention.
    """
    page, lanes = layer.tokens_per_page, batch * heads
    sinks = layer.sink_length if sliding_window is None else 0
    slots = sinks + layer.residual_length + page
    costs = [_cost(layer.keys, "key", key_dim, layer, dtype), _cost(layer.values, "value", value_dim, layer, dtype)]
    per_token, per_segment, per_lane = (sum(cost[i] for cost in costs) for i in range(3))
    total = slots * (key_dim + value_dim) * dtype.itemsize + per_lane
    sealed = max(tokens - sinks - layer.residual_length, 0)
    if evicts(layer, sliding_window):
        extra, once = _policy_bytes(layer, key_dim, value_dim, query_heads or heads, heads, dtype)
        room = math.ceil((sealed * (1 + LANE_SLACK) + page) / page) * page
        total += room * (per_token + extra) + _epochs(page) * per_segment + slots * extra
        return math.ceil(total * lanes + once * batch)
    room, slabs = _room_full(sealed // page * page, page)
    if sliding_window is not None:
        room, slabs = _room_sliding(sealed // page * page, page, sliding_window - 1 - layer.residual_length)
    return math.ceil((total + room * per_token + slabs * per_segment) * lanes)


def tokens_for_bytes(
    layer: LayerConfig,
    key_dim: int,
    value_dim: int,
    heads: int,
    batch: int,
    dtype: torch.dtype,
    nbytes: int,
    query_heads: int | None = None,
    sliding_window: int | None = None,
) -> int:
    """Tokens a head, on average, that keep a layer with a policy within `nbytes`: the inverse of `layer_bytes`.

    Raises ValueError naming budget if `layer.least_budget` tokens take more.
    """

    def takes(tokens: int) -> int:
        return layer_bytes(
            layer,
            tokens,
            key_dim=key_dim,
            value_dim=value_dim,
            heads=heads,
            batch=batch,
            dtype=dtype,
            query_heads=query_heads,
            sliding_window=sliding_window,
        )

    if not evicts(layer, sliding_window):
        raise ValueError("layer: expected settings that evict in this layer, got settings that keep all tokens")
    least = layer.least_budget
    if takes(least) > nbytes:
        raise ValueError(
            f"budget: expected at least {takes(least):,} bytes for this layer ({least} tokens, batch {batch}), "
            f"got {nbytes:,}"
        )
    high = 2 * least
    while takes(high) <= nbytes:
        high *= 2
    return largest(lambda tokens: takes(tokens) <= nbytes, high // 2, high)


def largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from `low`, which holds, to below `high` that holds; what holds must hold for all below."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _cost(name: str, role: Role, dim: int, layer: LayerConfig, dtype: torch.dtype) -> tuple[float, int, int]:
    return _codec_cost(name, role, dim, layer.tokens_per_page, layer.group_size, dtype)


@lru_cache(maxsize=256)
def _codec_cost(name: str, role: Role, dim: int, page: int, group: int, dtype: torch.dtype) -> tuple[float, int, int]:
    """Bytes of a codec for one head: a token, a segment's statistics, and what it holds besides."""
    codec = make_codec(name, role, dim, page_size=page, group_size=group, dtype=dtype)
    token = sum(field.bits_per_token(1) for field in codec.fields.values() if field.tokens is not None) / 8
    segment = sum(field.bits_per_token(1) for field in codec.fields.values() if field.tokens is None) / 8
    history = tensor_bytes(codec.learn({}, torch.zeros(1, 1, 1, page, dim)))
    return token, math.ceil(segment), history + (4 * dim if codec.wants_queries else 0)


def _room_full(sealed: int, page: int) -> tuple[int, int]:
    """Tokens that a full layer has room for at most with `sealed` ones, and the slabs that they are in."""
    grown = -(-sealed // SEGMENT_LENGTH) * SEGMENT_LENGTH
    slabs = segment_end = 0
    for start, end in zip(SEGMENT_STARTS, (*SEGMENT_STARTS[1:], grown), strict=True):
        if sealed > start:
            slabs += -(-(min(sealed, end) - start) // SLAB_LENGTH)
            segment_end = end
    return min(sealed + SLAB_LENGTH - page, segment_end), slabs


def _room_sliding(sealed: int, page: int, visible: int) -> tuple[int, int]:
    """The same for a sliding layer, of whose sealed tokens the newest `visible` can be seen."""
    segment = max(SLIDING_SEGMENT, page)
    most = max((visible + segment - 2) // segment, 0) + 1  # the window may begin anywhere in a segment
    held = min(-(-sealed // segment), most)
    return held * segment, held


def _epochs(page: int) -> int:
    epochs, known = 1, page
    while known < ENOUGH:
        epochs, known = epochs + 1, known * GROWTH
    return epochs


def _policy_bytes(
    layer: LayerConfig, key_dim: int, value_dim: int, query_heads: int, heads: int, dtype: torch.dtype
) -> tuple[int, int]:
    """What a policy holds: bytes a token and head, and bytes a row."""
    assert layer.eviction is not None
    policy = layer.eviction.make_policy()
    per_token = POSITION_BYTES + (MASS_BYTES if policy.capture == "mass" else 0)
    row = 0
    if policy.capture == "window":
        row += policy.window * query_heads * (key_dim * dtype.itemsize + POSITION_BYTES)
    if policy.capture == "statistics":
        row += heads * 4 * key_dim * (key_dim + 1)
    for tier, held in zip(layer.eviction.tiers, layer.eviction.tier_budgets, strict=True):
        if tier == HOST or not isinstance(held, int):  # parts of the text and tiers without a limit grow on
            continue
        codes = _cost(tier, "key", key_dim, layer, dtype)[0] + _cost(tier, "value", value_dim, layer, dtype)[0]
        row += math.ceil(heads * held * (codes + per_token))
    return per_token, row
