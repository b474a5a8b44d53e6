"""What a byte budget leaves to each layer: sizes, weights, and the shares of the layers that evict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .config import CacheConfig, LayerConfig, expect
from .footprint import dense_bytes, evicts, largest, layer_bytes
from .plans import LayerPlan
from .policies.layer_budgets import layer_weights
from .shapes import LayerShape, layer_shapes

BOUNDARY_WEIGHT = 1.5  # share of the first and the last full layer
ENDLESS = 1 << 40  # tokens


class BudgetError(ValueError):
    """No plan holds to the budget; `smallest` is the least number of bytes that one does."""

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest


class ByteShares:
    """Bytes of every layer that evicts, by batch size and dtype: `share_bytes`, worked out once for each.

    Under tensor parallelism they are bytes of a rank, which has one part in `parts` of every layer's heads.

    Args:
        config: the model's config.
        settings: with `budget_bytes` set.
    """

    def __init__(self, config: Any, settings: CacheConfig):
        self.config, self.settings = config, settings
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        self.query_heads: int | None = getattr(text, "num_attention_heads", None)
        self._known: dict[tuple[int, torch.dtype, int], dict[int, int]] = {}

    def __call__(self, batch: int, dtype: torch.dtype, parts: int = 1) -> dict[int, int]:
        if (batch, dtype, parts) not in self._known:
            shapes = tuple(
                replace(s, heads=s.heads // parts, query_heads=s.query_heads // parts) for s in shapes_of(self.config)
            )
            shares = share_bytes(shapes, self.settings, batch, dtype)
            if self.settings.layer_budget != "uniform":
                even = sum(shares.values()) / max(len(shares), 1)
                weights = layer_weights(self.settings.layer_budget, len(shares))
                shares = {index: int(even * weight) for index, weight in zip(sorted(shares), weights, strict=True)}
            self._known[batch, dtype, parts] = shares
        return self._known[batch, dtype, parts]


def share_bytes(config: Any, settings: CacheConfig, batch: int, dtype: torch.dtype) -> dict[int, int]:
    """Bytes of each layer that evicts, of a whole cache that may hold `settings.budget_bytes`.

    Layers that keep all their tokens first get what their window takes, and layers with a budget in tokens what that
    takes. The rest goes to the others, with more tokens for the first and the last layer of full attention.

    Raises ValueError naming budget if it cannot hold, or if a layer that keeps everything would grow without end.
    """
    total = settings.budget_bytes
    if total is None:
        raise expect("settings", "a budget in bytes", None)
    shapes, fixed = shapes_of(config), 0
    sharing: list[tuple[LayerShape, LayerConfig]] = []
    for shape in shapes:
        layer = settings.for_layer(shape.layer)
        if shape.packed and evicts(layer, shape.window):
            assert layer.eviction is not None
            if layer.eviction.budget is None:
                sharing.append((shape, layer))
                continue
            if isinstance(layer.eviction.budget, float):
                ratio = layer.eviction.budget
                raise expect(f"layers[{shape.layer}]", "tokens as budget beside a budget in bytes", ratio)
        elif shape.kind == "full":
            name = f"layers[{shape.layer}]"
            raise ValueError(f"budget: expected a policy in every layer with full attention, got none in {name}")
        fixed += layer_plan(shape, layer, ENDLESS, batch, dtype).nbytes
    if not sharing:
        return {}
    weights = token_weights([shape for shape, _ in sharing])

    def divided(tokens: int) -> dict[int, int]:
        kept = {shape.layer: max(int(tokens * weights[shape.layer]), layer.least_budget) for shape, layer in sharing}
        return {shape.layer: bytes_of(shape, layer, kept[shape.layer], batch, dtype) for shape, layer in sharing}

    def holds(tokens: int) -> bool:
        return fixed + sum(divided(tokens).values()) <= total

    if not holds(0):
        smallest = fixed + sum(divided(0).values())
        raise BudgetError(f"budget: expected at least {smallest:,} bytes for batch {batch}, got {total:,}", smallest)
    high = 1
    while holds(high):
        high *= 2
    return divided(largest(holds, high // 2, high))


def shapes_of(config: Any) -> Sequence[LayerShape]:
    return config if isinstance(config, tuple) else layer_shapes(config)


def bytes_of(shape: LayerShape, layer: LayerConfig, tokens: int, batch: int, dtype: torch.dtype) -> int:
    return layer_bytes(
        layer,
        tokens,
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
        heads=shape.heads,
        batch=batch,
        dtype=dtype,
        query_heads=shape.query_heads,
        sliding_window=shape.window,
    )


def layer_plan(shape: LayerShape, layer: LayerConfig, context: int, batch: int, dtype: torch.dtype) -> LayerPlan:
    held = shape.tokens_at(context)
    uncompressed = dense_bytes(held, shape.key_dim, shape.value_dim, shape.heads, batch, dtype)
    if not shape.packed or (shape.window is not None and layer.sliding == "exact"):
        # transformers' sliding layer keeps the last step's whole tensor alive, one token more than it needs
        kept = held if shape.window is None or context < shape.window else shape.window
        own = dense_bytes(kept, shape.key_dim, shape.value_dim, shape.heads, batch, dtype)
        return LayerPlan(shape.layer, str(shape), "-", "-", held, held, own, uncompressed)
    kept, tokens = held, context
    if evicts(layer, shape.window):
        assert layer.eviction is not None
        budget = layer.eviction.budget
        if isinstance(budget, float):
            budget = max(int(budget * context), layer.least_budget)
        kept = tokens = held if budget is None else min(budget, held)
    own = bytes_of(shape, layer, tokens, batch, dtype)
    return LayerPlan(shape.layer, str(shape), layer.keys, layer.values, held, kept, own, uncompressed)


def token_weights(shapes: Iterable[LayerShape]) -> dict[int, float]:
    """Share of each layer in the tokens that are kept."""
    shapes = list(shapes)
    full = [shape.layer for shape in shapes if shape.window is None]
    ends = {full[0], full[-1]} if len(full) > 2 else set()
    return {shape.layer: BOUNDARY_WEIGHT if shape.layer in ends else 1.0 for shape in shapes}
