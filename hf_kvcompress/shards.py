"""Which of a model's heads are in this process: under tensor parallelism every rank has a part of them.

Ranks have even parts of the heads in their order, and the ranks of one model stand next to each other, as in the meshes
that transformers makes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def ranks() -> int:
    """Processes that were launched together, 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_part(total: int, here: int) -> bool:
    """Whether `here` heads are what one of several ranks has of `total`."""
    return here < total and total % here == 0 and ranks() % (total // here) == 0


def first_head(total: int, here: int) -> int:
    """Number of the first of the `here` key-value heads of this process among the model's `total`.

    A process that has all heads, or is alone, begins with head 0.
    """
    return dist.get_rank() % (total // here) * here if is_part(total, here) else 0


def part_of(config: Any) -> str | None:
    """Which part of a tensor-parallel model this process has, such as "0 of 2"; None of a model that is here whole."""
    told = getattr(config, "distributed_config", None)
    size = (told.get("tp_size") if isinstance(told, dict) else getattr(told, "tp_size", None)) or 1
    return None if size == 1 or ranks() == 1 else f"{dist.get_rank() % size} of {size}"


def agree(model: Any, number: int) -> bool:
    """Whether all ranks of a tensor-parallel model came to the same number; each of them must ask."""
    if part_of(model.config) is None:
        return True
    both, mesh = torch.tensor([number, -number], device=model.device), model._device_mesh
    tensor_parallel = mesh["tp"] if mesh.mesh_dim_names else mesh  # older transformers name no dimensions
    dist.all_reduce(both, dist.ReduceOp.MAX, group=tensor_parallel.get_group())
    return int(both[0]) == -int(both[1])
