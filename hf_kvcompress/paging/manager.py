"""Pools within a device's memory: nobody gets more than there is."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..config import expect
from .pool import GB, MB, BlockPool

CPU_GB = 1.0  # of which a CPU engine takes `gpu_memory_utilization`, unless it is told


def device_memory(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class MemoryManager:
    """Hands out pools of blocks and keeps account.

    Args:
        total_gpu_memory_gb: memory of the device that may be thought of, in GB of 2^30 bytes; None for all it has.
        reserved_memory_gb: part of it that is left for weights and activations.
        device: where pools are made; None for the first accelerator, or the CPU without one.
    """

    def __init__(
        self,
        total_gpu_memory_gb: float | None = None,
        reserved_memory_gb: float = 0.0,
        device: torch.device | str | None = None,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.total = device_memory(self.device) if total_gpu_memory_gb is None else _bytes(
            "total_gpu_memory_gb", total_gpu_memory_gb
        )  # fmt: skip
        if not isinstance(reserved_memory_gb, int | float) or not 0 <= reserved_memory_gb * GB < self.total:
            raise expect("reserved_memory_gb", f"0 up to below {self.total / GB:g} GB", reserved_memory_gb)
        self.reserved = int(reserved_memory_gb * GB)
        self.pools: dict[str, BlockPool] = {}

    @property
    def available(self) -> int:
        """Bytes that no pool has and that are not reserved."""
        return self.total - self.reserved - sum(pool.nbytes for pool in self.pools.values())

    def allocate_pool(self, name: str, size_gb: float, block_size_mb: float = 2.0) -> BlockPool:
        """A pool of blocks of `block_size_mb` MB, its memory taken now.

        Raises ValueError, with the numbers, if it is more than what is left.
        """
        if name in self.pools:
            raise expect("name", "one that no pool has", name)
        size, block = _bytes("size_gb", size_gb), _bytes("block_size_mb", block_size_mb, MB)
        if size > self.available:
            taken = ", ".join(f"{own} {pool.nbytes / GB:.3g}" for own, pool in self.pools.items()) or "none"
            raise expect(
                "size_gb",
                f"at most {self.available / GB:.3g} GB ({self.total / GB:.3g} in all, {self.reserved / GB:.3g} "
                f"reserved, pools: {taken})",
                size_gb,
            )
        if block > size:
            raise expect("block_size_mb", f"at most the pool's {size / MB:g} MB", block_size_mb)
        self.pools[name] = BlockPool(name, size // block, block, self.device)
        return self.pools[name]

    def free_pool(self, name: str) -> None:
        """Forget a pool; its memory goes once no cache holds blocks of it."""
        if name not in self.pools:
            raise expect("name", f"one of {', '.join(self.pools) or 'no pools'}", name)
        del self.pools[name]

    def defragment(self, pool: BlockPool | str) -> int:
        """Move a pool's blocks in use together; returns how many moved."""
        return (self.pools[pool] if isinstance(pool, str) else pool).defragment()

    def stats(self) -> dict[str, Any]:
        """JSON-ready: bytes in all, reserved, available, and each pool."""
        pools = {
            name: {
                "nbytes": pool.nbytes,
                "block_bytes": pool.block_bytes,
                "utilization": pool.utilization,
                "fragmentation": pool.fragmentation,
            }
            for name, pool in self.pools.items()
        }
        return {"total": self.total, "reserved": self.reserved, "available": self.available, "pools": pools}


def _bytes(argument: str, number: object, unit: int = GB) -> int:
    if isinstance(number, bool) or not isinstance(number, int | float) or int(number * unit) < 1:
        raise expect(argument, "a number above 0", number)
    return int(number * unit)


def pool_within(device: torch.device, part: float, memory_gb: float | None, block: int, windows: int) -> BlockPool:
    """A pool of blocks of `block` bytes in `memory_gb`, or in `part` of what is free, beside `windows` bytes.

    Raises ValueError if that is not more than the windows take.
    """
    if memory_gb is None:
        free = torch.cuda.mem_get_info(device)[0] / GB if device.type == "cuda" else CPU_GB
        memory_gb = free * part
    if memory_gb * GB < windows + block:
        least = f"more than the {windows / GB:.3g} GB of the exact windows of max_batch rows"
        raise expect("memory_gb", least, memory_gb)
    return MemoryManager(device=device).allocate_pool("kv", memory_gb - windows / GB, block / MB)
