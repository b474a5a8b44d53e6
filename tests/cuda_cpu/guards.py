"""Copies of tensors beside unmapped pages, so that an access outside of them ends the launch."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from functools import lru_cache

import torch

GUARDS = ("end", "begin", "off")
PAGE = mmap.PAGESIZE


def extent(x: torch.Tensor) -> int:
    """Bytes from the first element of `x` to the end of its last one."""
    if x.numel() == 0:
        return 0
    return (sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


class Guarded:
    """Copies of the storages of tensors, each beside an unmapped page."""

    def __init__(self, side: str, in_place: Sequence[torch.Tensor] = ()):
        self.side = side
        self.in_place = {x.untyped_storage().data_ptr() for x in in_place}
        self.copies: dict[int, tuple[int, int, int, int]] = {}  # address -> mapping, its size, copy, bytes

    def address(self, x: torch.Tensor) -> int:
        """Where the element that `x.data_ptr()` points to was copied to."""
        storage = x.untyped_storage()
        base = storage.data_ptr()
        if self.side == "off" or x.numel() == 0 or base in self.in_place:
            return x.data_ptr()
        if base not in self.copies:
            size = storage.nbytes()
            room = (size + PAGE - 1) // PAGE * PAGE
            mapping = _libc().mmap(None, room + 2 * PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
            _libc().mprotect(mapping, PAGE, 0)
            _libc().mprotect(mapping + PAGE + room, PAGE, 0)
            # Allocations are multiples of 16 on a GPU, so the last bytes before the page may stay unused.
            copy = mapping + PAGE + (0 if self.side == "begin" else room - (size + 15) // 16 * 16)
            ctypes.memmove(copy, base, size)
            self.copies[base] = (mapping, room + 2 * PAGE, copy, size)
        return self.copies[base][2] + x.data_ptr() - base

    def back(self, written: set[int]) -> None:
        """Copy the storages in `written` back, and give everything back to the system."""
        for base, (mapping, room, copy, size) in self.copies.items():
            if base in written:
                ctypes.memmove(base, copy, size)
            _libc().munmap(mapping, room)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
