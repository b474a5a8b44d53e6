"""Who looks on while attention runs, for a time: monitors, teachers, yardsticks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class AttentionCall:
    """What one layer's attention was called with in one pass; `extras` are soft caps, sink logits and the like."""

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    extras: dict[str, Any]

    @property
    def layer(self) -> int:
        return int(self.module.layer_idx)  # type: ignore[arg-type]


Watcher = Callable[[AttentionCall], None]
_watchers: list[Watcher] = []


@contextmanager
def shown_to(watcher: Watcher) -> Iterator[None]:
    """Show `watcher` every call of the "kvcompress" attention, of any model in any thread, before it is answered."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def show(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    extras: dict[str, Any],
) -> None:
    """Tell who looks on, if anybody does, of a call of a numbered layer's attention."""
    if _watchers and isinstance(getattr(module, "layer_idx", None), int):
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        call = AttentionCall(module, query, key, value, mask, factor, extras)
        for watcher in tuple(_watchers):
            watcher(call)
