"""One layer's numbers as they are compared: keys before and after their rotation, and values, beside shuffled ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .capture import Captured, LayerStore

KINDS = ("key_before_rope", "key_after_rope", "value")
NAMES = {"key_before_rope": "keys before RoPE", "key_after_rope": "keys after RoPE", "value": "values"}


@dataclass(frozen=True)
class View:
    """Tokens `[H, N, D]` float32 of one kind, and the same tokens in random places.

    Keys after the rotation are shuffled before it and then turned to where they come to stand, so that the baseline
    differs from the pages in what they say, not in where they are.
    """

    layer: int
    kind: str
    tokens: torch.Tensor
    shuffled: torch.Tensor


def views(captured: Captured, layer: int, seed: int) -> Iterator[View]:
    """All kinds of one layer, one after the other; before the rotation only where it is known."""
    store = captured.layers[layer]
    at, count = captured.positions, len(captured.positions)
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    keys, values = (_heads(parts) for parts in (store.keys, store.values))
    if store.rotary is None:
        yield View(layer, "key_after_rope", keys, keys[:, mixed])
    else:
        before = store.rotary.undo(keys, at)
        yield View(layer, "key_before_rope", before, before[:, mixed])
        yield View(layer, "key_after_rope", keys, store.rotary.apply(before[:, mixed], at))
        del before
    yield View(layer, "value", values, values[:, mixed])


def role_kind(store: LayerStore, role: str) -> str:
    """The kind in which pages of "key" or "value" can be shared: keys before their rotation, where it is known."""
    return "value" if role == "value" else "key_after_rope" if store.rotary is None else "key_before_rope"


def _heads(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts).transpose(0, 1).float().contiguous()
