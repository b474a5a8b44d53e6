"""A byte budget -> codecs and kept tokens of every layer. Needs a model's config only; loads nothing.

Quantize first: the mildest codec that holds every token. Where even the smallest does not fit, 4 bits and eviction, in
layers with full attention only, which hold nearly everything in a long context; the first and last of them keep more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .calibration import Calibration
from .config import DEFAULT_POLICY, NO_POLICY, CacheConfig, LayerConfig, expect
from .contexts import context_of
from .footprint import dense_bytes, evicts, largest, layer_bytes, tokens_for_bytes
from .plans import LayerPlan, Plan
from .policies.layer_budgets import layer_weights
from .policies.registry import make_policy
from .policies.settings import EvictionConfig, parse_bytes
from .shapes import LayerShape, layer_shapes

__all__ = [
    "BudgetError",
    "ByteShares",
    "LayerPlan",
    "Plan",
    "describe",
    "layer_bytes",
    "plan",
    "share_bytes",
    "tokens_for_bytes",
]

#: codecs that keep every token, mildest first; none below the last is ever planned
LEVELS = ("identity", "int8", "eqrot4", "eqrot3")
#: and with a calibration; fewer bits do badly on texts that are unlike those it was made of
CALIBRATED_LEVELS = (*LEVELS, "pca2/eqrot3", "pca2/eqrot2")
#: codecs beside eviction: of full layers, and of sliding ones, which only quantization makes smaller
EVICTING = (("eqrot4", "eqrot4"), ("eqrot4", "eqrot3"), ("eqrot3", "eqrot3"))
FEW = 0.1  # part of the tokens below which fewer bits are tried before fewer tokens
BOUNDARY_WEIGHT = 1.5  # share of the first and the last full layer
ENDLESS = 1 << 40  # tokens


class BudgetError(ValueError):
    """No plan holds to the budget; `smallest` is the least number of bytes that one does."""

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest


def plan(
    config: Any,
    *,
    context: int,
    batch: int = 1,
    budget: str | int | float,
    dtype: torch.dtype = torch.bfloat16,
    policy: str | None = None,
    codec: str | None = None,
    calibration: str | Path | Calibration | None = None,
) -> Plan:
    """Codecs and kept tokens with which a cache of `context` tokens holds to `budget`.

    Args:
        config: the model's config.
        context: tokens of a row, prompt and answer together.
        batch: rows.
        budget: bytes ("8GB" or a whole number), or a part of the uncompressed bytes (a number between 0 and 1).
        dtype: of the model's keys and values.
        policy: what chooses the tokens to evict, if any must be; None takes "h2o", "none" refuses to evict.
        codec: use this codec ("eqrot4", or "int8/eqrot4" for keys and values) instead of choosing one.
        calibration: of the model; codecs that need one are then chosen as well.

    Raises BudgetError (a ValueError) with the smallest budget that works, if this one does not.
    """
    for name, value in (("context", context), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise expect(name, "a whole number of at least 1", value)
    shapes, base = layer_shapes(config), replace(CacheConfig.make().default, eviction=None)
    if base.sliding == "evict":  # windows are short: what eviction saves there is little
        base = replace(base, sliding="compress")
    if not any(shape.packed for shape in shapes):
        raise expect("config", "a model with attention layers", getattr(config, "model_type", type(config).__name__))
    if policy not in (None, NO_POLICY):
        make_policy(policy)
    if calibration is not None:
        calibration = Calibration.open(calibration)
    levels = [codec] if codec else LEVELS if calibration is None else CALIBRATED_LEVELS
    tried = [CacheConfig(_with_codec(base, level)) for level in levels]
    for settings, shape in ((settings, shape) for settings in tried for shape in shapes if shape.packed):
        context_of(config, shape.layer, settings.default, calibration)  # a calibration that lacks something is refused
    uncompressed = describe(shapes, CacheConfig(base), context=context, batch=batch, dtype=dtype).uncompressed_bytes
    limit = _budget_bytes(budget, uncompressed)

    def sized(settings: CacheConfig) -> Plan:
        found = describe(shapes, settings, context=context, batch=batch, dtype=dtype, budget_bytes=limit)
        return found if calibration is None else replace(found, calibration=calibration.path)

    whole = [sized(settings) for settings in tried]
    for found in whole:
        if found.fits:
            return replace(found, max_context=_max_context(shapes, found))
    smallest = min(found.nbytes for found in whole)
    full_layers = any(shape.packed and shape.window is None for shape in shapes)
    if policy != NO_POLICY and full_layers and context >= base.least_budget:
        eviction = EvictionConfig(policy=policy or DEFAULT_POLICY)
        evicting = []
        for full, sliding in [(codec, codec)] if codec else EVICTING:
            layers = _evicting_layers(shapes, base, eviction, full, sliding)
            least = sized(_settings(_kept(layers, 0, context, base.least_budget)))
            smallest = min(smallest, least.nbytes)
            if least.fits:
                evicting.append(sized(_fill(layers, base.least_budget, context, sized)))
        if evicting:
            enough = [found for found in evicting if found.kept_fraction >= FEW]
            return enough[0] if enough else max(evicting, key=lambda found: found.kept_fraction)
    rows = f"{context:,} tokens" + (f" in each of {batch} rows" if batch > 1 else "")
    raise BudgetError(f"budget: expected at least {smallest:,} bytes for {rows}, got {limit:,} bytes", smallest)


def describe(
    config: Any,
    settings: CacheConfig,
    *,
    context: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    budget_bytes: int | None = None,
) -> Plan:
    """What a cache with these settings holds after `context` tokens, layer by layer, as a `Plan`."""
    shapes = _shapes(config)
    layers = tuple(_layer_plan(shape, settings.for_layer(shape.layer), context, batch, dtype) for shape in shapes)
    return Plan(settings, layers, context, batch, dtype, budget_bytes)


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
                replace(s, heads=s.heads // parts, query_heads=s.query_heads // parts) for s in _shapes(self.config)
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
    shapes, fixed = _shapes(config), 0
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
        fixed += _layer_plan(shape, layer, ENDLESS, batch, dtype).nbytes
    if not sharing:
        return {}
    weights = _weights([shape for shape, _ in sharing])

    def divided(tokens: int) -> dict[int, int]:
        kept = {shape.layer: max(int(tokens * weights[shape.layer]), layer.least_budget) for shape, layer in sharing}
        return {shape.layer: _bytes(shape, layer, kept[shape.layer], batch, dtype) for shape, layer in sharing}

    def holds(tokens: int) -> bool:
        return fixed + sum(divided(tokens).values()) <= total

    if not holds(0):
        smallest = fixed + sum(divided(0).values())
        raise BudgetError(f"budget: expected at least {smallest:,} bytes for batch {batch}, got {total:,}", smallest)
    high = 1
    while holds(high):
        high *= 2
    return divided(largest(holds, high // 2, high))


# -- sizes -------------------------------------------------------------------------------------------------------------


def _shapes(config: Any) -> Sequence[LayerShape]:
    return config if isinstance(config, tuple) else layer_shapes(config)


def _bytes(shape: LayerShape, layer: LayerConfig, tokens: int, batch: int, dtype: torch.dtype) -> int:
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


def _layer_plan(shape: LayerShape, layer: LayerConfig, context: int, batch: int, dtype: torch.dtype) -> LayerPlan:
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
    own = _bytes(shape, layer, tokens, batch, dtype)
    return LayerPlan(shape.layer, str(shape), layer.keys, layer.values, held, kept, own, uncompressed)


def _max_context(shapes: Sequence[LayerShape], found: Plan) -> int | None:
    """The longest context that the plan's settings hold within its budget, None without end."""

    def holds(context: int) -> bool:
        return describe(shapes, found.settings, context=context, batch=found.batch, dtype=found.dtype).nbytes <= limit

    limit, high = found.budget_bytes or 0, 2 * found.context
    while holds(high):
        if high > ENDLESS:
            return None
        high *= 2
    return largest(holds, high // 2, high)


def _budget_bytes(budget: object, uncompressed: int) -> int:
    if isinstance(budget, str):
        return parse_bytes(budget)
    if isinstance(budget, float) and 0 < budget <= 1:
        return int(budget * uncompressed)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise expect("budget", "bytes ('64MB' or a whole number) or a part of the whole between 0 and 1", budget)
    return budget


# -- eviction ----------------------------------------------------------------------------------------------------------


def _with_codec(base: LayerConfig, codec: str | None) -> LayerConfig:
    keys, _, values = (codec or base.keys).partition("/")
    return replace(base, keys=keys, values=values or keys)


def _weights(shapes: Iterable[LayerShape]) -> dict[int, float]:
    """Share of each layer in the tokens that are kept."""
    shapes = list(shapes)
    full = [shape.layer for shape in shapes if shape.window is None]
    ends = {full[0], full[-1]} if len(full) > 2 else set()
    return {shape.layer: BOUNDARY_WEIGHT if shape.layer in ends else 1.0 for shape in shapes}


def _evicting_layers(
    shapes: Sequence[LayerShape], base: LayerConfig, eviction: EvictionConfig, full: str | None, sliding: str | None
) -> dict[int, LayerConfig]:
    """Settings of every packed layer; full ones evict."""
    return {
        shape.layer: replace(_with_codec(base, full), eviction=eviction)
        if shape.window is None
        else _with_codec(base, sliding)
        for shape in shapes
        if shape.packed
    }


def _kept(layers: Mapping[int, LayerConfig], tokens: int, context: int, least: int) -> dict[int, LayerConfig]:
    """The layers with their budgets, where one of weight 1 keeps `tokens`."""
    evicting = [LayerShape(index, "full") for index, layer in layers.items() if layer.eviction is not None]
    weights = _weights(evicting)
    out = dict(layers)
    for index, weight in weights.items():
        eviction = layers[index].eviction
        assert eviction is not None
        budget = min(max(int(tokens * weight), least), context)
        out[index] = replace(layers[index], eviction=replace(eviction, budget=budget))
    return out


def _fill(
    layers: Mapping[int, LayerConfig], least: int, context: int, sized: Callable[[CacheConfig], Plan]
) -> CacheConfig:
    """The most tokens that fit."""

    def settings(tokens: int) -> CacheConfig:
        return _settings(_kept(layers, tokens, context, least))

    return settings(largest(lambda tokens: sized(settings(tokens)).fits, 0, context + 1))


def _settings(layers: Mapping[int, LayerConfig]) -> CacheConfig:
    """What most evicting layers do as the default, the others one by one; sliding layers never evict by default."""
    evicting = [layer for layer in layers.values() if layer.eviction is not None]
    default = max(evicting, key=evicting.count)
    same = replace(default, eviction=None)
    return CacheConfig(default, {index: own for index, own in layers.items() if own not in (default, same)})
