"""What codecs may have to know of the layer that they pack, from the model's config."""

from __future__ import annotations

from typing import Any

import torch

from .calibration import Calibration
from .codecs.base import CodecContext, Role
from .codecs.registry import codec_class, make_codec
from .config import LayerConfig, expect
from .policies.settings import HOST
from .rotary import rotary_of
from .shapes import layer_shapes
from .shards import ranks

KEY: Role = "key"
VALUE: Role = "value"


def names_of(layer: LayerConfig) -> list[tuple[Role, str]]:
    """Role and name of every codec that a layer uses."""
    below = layer.eviction.tiers if layer.eviction is not None else ()
    tiers = [(layer.keys, layer.values), *((tier, tier) for tier in below if tier != HOST)]
    return [(role, name) for pair in tiers for role, name in zip(("key", "value"), pair, strict=True)]  # type: ignore


def context_of(config: Any, index: int, layer: LayerConfig, calibration: Any = None) -> CodecContext:
    """The context of layer `index`, once every codec of it has been tried on it.

    Raises ValueError, naming what a codec lacks: the config, a known rotation, a calibration that fits.
    """
    needy = [(role, name) for role, name in names_of(layer) if codec_class(name, role).wants_context]
    heads = layer_shapes(config)[index].heads if config is not None and ranks() > 1 else None
    if not needy:
        return CodecContext(index, heads=heads)
    if config is None:
        raise expect("config", f"the model's config, which codec {needy[0][1]!r} needs", None)
    if calibration is not None:
        calibration = Calibration.open(calibration)
        calibration.check(config)
    rotary, why_not = None, ""
    try:
        rotary = rotary_of(config, index)
    except ValueError as error:
        why_not = str(error).removeprefix("config: ")
    context = CodecContext(index, rotary, why_not, calibration, heads)
    shape = layer_shapes(config)[index]
    for role, name in needy:
        dim = shape.key_dim if role == "key" else shape.value_dim
        sizes = {"page_size": layer.tokens_per_page, "group_size": layer.group_size}
        make_codec(name, role, dim, **sizes, dtype=torch.float32, context=context)
    return context
