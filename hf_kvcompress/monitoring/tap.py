"""Being told what happens to a cache, for a time: its class is exchanged for one that tells, and put back.

Nothing is stored on the cache, so copies and pickles of it are of its own class and nobody watches them.
"""

from __future__ import annotations

import copyreg
from typing import Any, Protocol

import torch


class Tap(Protocol):
    """What a watcher of a cache is told."""

    def before_update(self, layer: int, keys: torch.Tensor) -> None:
        """A layer is about to get new keys `[B, H, q, D]`."""

    def after_update(self, layer: int, keys: torch.Tensor) -> None:
        """A layer has got them and hands out the keys `[B, H, T, D]` of all its tokens."""

    def changed(self, what: str, tokens: int) -> None:
        """Tokens were taken back or rows moved: "crop", "reset" or "rows", and the tokens seen afterwards."""


_taps: dict[int, list[Tap]] = {}  # by the cache's id: it is alive as long as anything is here
_classes: dict[type, type] = {}  # a cache's own class -> the one that tells


class _Telling:
    """Stands before a cache's own class while it is watched."""

    @torch.compiler.disable
    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        taps = tuple(_taps.get(id(self), ()))
        for tap in taps:
            tap.before_update(layer_idx, key_states)
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[misc]
        for tap in taps:
            tap.after_update(layer_idx, out[0])
        return out

    def _tell(self, what: str) -> None:
        for tap in tuple(_taps.get(id(self), ())):
            tap.changed(what, int(self.get_seq_length()))  # type: ignore[attr-defined]

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        out = super().crop(*args, **kwargs)  # type: ignore[misc]
        self._tell("crop")
        return out

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        out = super().reset(*args, **kwargs)  # type: ignore[misc]
        self._tell("reset")
        return out

    def reorder_cache(self, *args: Any, **kwargs: Any) -> Any:
        out = super().reorder_cache(*args, **kwargs)  # type: ignore[misc]
        self._tell("rows")
        return out

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> Any:
        out = super().batch_repeat_interleave(*args, **kwargs)  # type: ignore[misc]
        self._tell("rows")
        return out

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> Any:
        out = super().batch_select_indices(*args, **kwargs)  # type: ignore[misc]
        self._tell("rows")
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return (copyreg._reconstructor, (type(self).__mro__[2], object, None), *rest)  # type: ignore[attr-defined]


def _telling(own: type) -> type:
    if own not in _classes:
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
        _classes[own] = type(own.__name__, (_Telling, own), names)
    return _classes[own]


def listen(cache: Any, tap: Tap) -> None:
    """Tell `tap` from now on what happens to the cache."""
    taps = _taps.setdefault(id(cache), [])
    if not taps:
        cache.__class__ = _telling(type(cache))
    taps.append(tap)


def unlisten(cache: Any, tap: Tap) -> None:
    """Tell it no more; the last one to go leaves the cache as it was. Nothing to do if it was not told."""
    taps = _taps.get(id(cache), [])
    if tap not in taps:
        return
    taps.remove(tap)
    if not taps:
        del _taps[id(cache)]
        cache.__class__ = type(cache).__mro__[2]
