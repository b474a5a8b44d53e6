"""What is noted of a cache at a pass, and which of its layers and heads are looked at."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..cache import CompressedCache
from ..config import expect
from ..layer import CompressedLayer
from ..measure import tensor_bytes
from ..stats import CacheStats, LayerStats
from .settings import MonitorSettings, spread

NUMBERS = ("nbytes", "uncompressed_bytes", "compression_ratio", "tokens_evicted", "tokens_demoted")


def numbers_of(cache: Any) -> dict[str, Any]:
    """Bytes and tokens of a cache at rest; nothing in flight is stored for this."""
    seen = int(cache.get_seq_length())
    nbytes = tensor_bytes(cache.layers)
    if isinstance(cache, CompressedCache):
        stats = CacheStats([LayerStats.of(index, layer) for index, layer in enumerate(cache.layers)], nbytes)
        held = stats["tokens_stored"] + stats["tokens_demoted"]
        return {"seen": seen, "tokens_held": held, **{name: stats[name] for name in NUMBERS}}
    held = max((keys.shape[2] for keys in (_keys(layer) for layer in cache.layers) if keys is not None), default=0)
    return {"seen": seen, "tokens_held": held, **dict(zip(NUMBERS, (nbytes, nbytes, 1.0, 0, 0), strict=True))}


def sampled_layers(cache: Any, settings: MonitorSettings) -> dict[int, list[int]]:
    """The key-value heads of each layer that is looked at: of a hybrid model as many full layers as sliding ones.

    Raises ValueError for a layer, head or row that the cache does not have.
    """
    shapes = {index: shape for index, layer in enumerate(cache.layers) if (shape := _shape(layer)) is not None}
    if not shapes:
        raise expect("cache", "one with a layer that holds keys", "none")
    batch = min(shape[0] for shape in shapes.values())
    if settings.row >= batch:
        raise expect("row", f"a row of the batch, below {batch}", settings.row)
    chosen = list(shapes)
    sliding = [index for index in shapes if getattr(cache.layers[index], "is_sliding", False)]
    full = [index for index in shapes if index not in sliding]
    if isinstance(settings.layers, int) and sliding and full and settings.layers > 1:
        some = spread(min(math.ceil(settings.layers / 2), len(full)), full, "layers")
        chosen = sorted([*some, *spread(settings.layers - len(some), sliding, "layers")])
    else:
        chosen = spread(settings.layers, chosen, "layers")
    return {index: spread(settings.heads, range(shapes[index][1]), "heads") for index in chosen}


def _shape(layer: Any) -> tuple[int, int] | None:
    """Rows and key-value heads of a layer that holds any."""
    if isinstance(layer, CompressedLayer):
        return None if layer.storage is None else (layer.storage.batch, layer.storage.heads["key"])
    keys = _keys(layer)
    return None if keys is None else (keys.shape[0], keys.shape[1])


def _keys(layer: Any) -> torch.Tensor | None:
    keys = None if isinstance(layer, CompressedLayer) else getattr(layer, "keys", None)
    return keys if isinstance(keys, torch.Tensor) and keys.dim() == 4 else None
