"""Small numeric helpers whose results for one vector do not depend on what is computed beside it.

Sums over a fixed axis by halving use elementwise adds only: the order of the adds is the same for any batch, any number
of heads and any number of threads, so packed bytes are too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

LIMIT = 1e37  # inputs beyond it are clamped, so that differences and bfloat16 roundings stay finite
TINY = 1e-37  # the smallest scale that is divided by: above float32's subnormals


def clean_(x: torch.Tensor) -> torch.Tensor:
    """Replace non-finite numbers by 0 and clamp to +-LIMIT, in place; -0 becomes +0. `x` is float32."""
    torch.nan_to_num_(x, nan=0.0, posinf=0.0, neginf=0.0)
    return x.clamp_(-LIMIT, LIMIT).add_(0.0)  # minimum and maximum of {-0, +0} would depend on the order


def tree_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over `dim` by halving. `x` is not changed."""
    n = x.shape[dim]
    while n > 1:
        half = n // 2
        y = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        if n % 2:
            y.narrow(dim, 0, 1).add_(x.narrow(dim, n - 1, 1))
        x, n = y, half
    return x.squeeze(dim)


def bfloat16_ceil(x: torch.Tensor) -> torch.Tensor:
    """The smallest bfloat16 number that is not below `x`, for finite float32 `x >= 0`."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def blocks(rows: int, parts: int, part_numel: int, budget: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut `rows x parts` into blocks of at most about `budget` numbers: `(row, row_end, part, part_end)`.

    A block has several whole rows, or several parts of one row.
    """
    if parts * part_numel <= budget:
        step = max(1, budget // max(1, parts * part_numel))
        for row in range(0, rows, step):
            yield row, min(row + step, rows), 0, parts
        return
    step = max(1, budget // part_numel)
    for row in range(rows):
        for part in range(0, parts, step):
            yield row, row + 1, part, min(part + step, parts)


def block_numel(device: torch.device, cpu: int) -> int:
    """Numbers in a block: `cpu` where they should stay in a core's cache, many where launches cost more than memory."""
    return cpu if device.type == "cpu" else max(cpu, 1 << 24)
