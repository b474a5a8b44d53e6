"""Tensors that stand for cached keys or values (or for a mask) and become real only when an operation touches them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map_only


class LazyTensor(torch.Tensor):
    """Has a shape, dtype and device; its numbers come from `make()` when they are first needed.

    The "kvcompress" attention never needs them: it reads `source` and `role` instead.
    """

    make: Callable[[], torch.Tensor]
    source: object
    role: str
    _real: torch.Tensor | None

    @staticmethod
    def __new__(cls, shape, dtype, device, make, source, role):
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        tensor.make, tensor.source, tensor.role, tensor._real = make, source, role, None
        return tensor

    def materialise(self) -> torch.Tensor:
        if self._real is None:
            self._real = self.make()
        return self._real

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.materialise, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo):
        return self.materialise().clone()

    def __reduce_ex__(self, protocol):
        return self.materialise().__reduce_ex__(protocol)

    def __repr__(self):
        return f"{type(self).__name__}({self.role}, shape={tuple(self.shape)}, dtype={self.dtype})"


def source_of(tensor: object, role: str):
    """What stands behind a lazy tensor of this role, or None for anything else."""
    return tensor.source if isinstance(tensor, LazyTensor) and tensor.role == role else None
