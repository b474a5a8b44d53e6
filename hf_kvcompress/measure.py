"""Bytes of everything an object holds, counted by storage."""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch

_OPAQUE = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.FunctionType)


def iter_tensors(obj: Any) -> Iterator[Any]:
    """Every plain tensor reachable from `obj`: containers, attributes, slots and the parts of tensor subclasses.

    Each object is visited once. Functions, classes and modules are not entered, nor are objects that say themselves
    what they hold, by `storages_held() -> {key: bytes}`: they stand for their tensors.
    """
    seen: set[int] = set()
    pending: list[Any] = [obj]
    keep: list[Any] = []  # values made on the way stay alive, so that no id is used twice
    while pending:
        item = pending.pop()
        if isinstance(item, _OPAQUE) or id(item) in seen:
            continue
        seen.add(id(item))
        keep.append(item)
        if hasattr(type(item), "storages_held"):
            yield item
            continue
        if isinstance(item, torch.Tensor):
            parts = _inner(item)
            if parts is None:
                yield item
            else:
                pending.extend(parts)
        elif isinstance(item, Mapping):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            pending.extend(item)
        if not isinstance(item, torch.Tensor):
            pending.extend(_attributes(item))


def tensor_bytes(obj: Any) -> int:
    """Bytes of storage of all tensors reachable from `obj`.

    Views of one storage count once, and count all of it: a slice keeps its whole storage alive. Quantized tensor
    subclasses (optimum-quanto's, torchao's) count by their inner tensors. Meta tensors hold nothing.
    """
    storages: dict[Hashable, int] = {}
    for tensor in iter_tensors(obj):
        if not isinstance(tensor, torch.Tensor):
            storages.update(tensor.storages_held())
            continue
        if tensor.device.type == "meta":
            continue
        if tensor.layout is not torch.strided:
            raise ValueError(f"obj: expected strided tensors, got one of layout {tensor.layout}")
        storage = tensor.untyped_storage()
        storages[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def _inner(tensor: torch.Tensor) -> list[Any] | None:
    """The parts of a wrapper subclass, or None for a tensor with a storage of its own."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return None
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    try:
        owns_storage = tensor.numel() == 0 or tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        owns_storage = False  # a wrapper has a shape but no memory
    return None if owns_storage else list(vars(tensor).values())


def _attributes(item: Any) -> Iterator[Any]:
    yield from getattr(item, "__dict__", {}).values()
    for cls in type(item).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(item, name):
                yield getattr(item, name)
