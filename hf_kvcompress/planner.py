"""A byte budget -> codecs and kept tokens of every layer. Needs a model's config only; loads nothing.

Quantize first: the mildest codec that holds every token. Where even the smallest does not fit, 4 bits and eviction, in
layers with full attention only, which hold nearly everything in a long context; the first and last of them keep more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .calibration import Calibration
from .config import DEFAULT_POLICY, NO_POLICY, CacheConfig, LayerConfig, expect
from .contexts import context_of
from .footprint import largest
from .plans import Plan
from .policies.registry import make_policy
from .policies.settings import EvictionConfig, parse_bytes
from .shapes import LayerShape, layer_shapes
from .shares import ENDLESS, BudgetError, layer_plan, shapes_of, token_weights

#: codecs that keep every token, mildest first; none below the last is ever planned
LEVELS = ("identity", "int8", "eqrot4", "eqrot3")
#: and with a calibration; fewer bits do badly on texts that are unlike those it was made of
CALIBRATED_LEVELS = (*LEVELS, "pca2/eqrot3", "pca2/eqrot2")
#: codecs beside eviction: of full layers, and of sliding ones, which only quantization makes smaller
EVICTING = (("eqrot4", "eqrot4"), ("eqrot4", "eqrot3"), ("eqrot3", "eqrot3"))
FEW = 0.1  # part of the tokens below which fewer bits are tried before fewer tokens


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
    shapes = shapes_of(config)
    layers = tuple(layer_plan(shape, settings.for_layer(shape.layer), context, batch, dtype) for shape in shapes)
    return Plan(settings, layers, context, batch, dtype, budget_bytes)


# -- sizes -------------------------------------------------------------------------------------------------------------


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
    weights = token_weights(evicting)
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
