"""Tensors that stand for cached keys or values (or for a mask) and become real only when an operation touches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[], torch.Tensor],
        source: object,
        role: str,
    ) -> LazyTensor:
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        tensor.make, tensor.source, tensor.role, tensor._real = make, source, role, None
        return tensor

    @torch.compiler.disable
    def materialise(self) -> torch.Tensor:
        if self._real is None:
            self._real = self.make()
        return self._real

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.materialise, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.materialise().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialise().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.role}, shape={tuple(self.shape)}, dtype={self.dtype})"


def source_of(tensor: object, role: str) -> object:
    """What stands behind a lazy tensor of this role, or None for anything else."""
    return tensor.source if isinstance(tensor, LazyTensor) and tensor.role == role else None
