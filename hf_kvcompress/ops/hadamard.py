"""Orthonormal rotation with fixed random signs for any head size.

dim = 2^k * m with m odd: a Walsh-Hadamard transform of the 2^k part and a Hartley matrix of size m for the rest. Only
elementwise adds, subtractions and products on slices are used, so a vector's result has the same bits whatever is
rotated beside it. The work is done with the vector along axis 0: every slice is then one contiguous run.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from .numeric import block_numel, blocks

_SEED = 20240731
_BLOCK = 1 << 16  # numbers; two float32 buffers of this size stay in a core's cache


def split(dim: int) -> tuple[int, int]:
    """`dim` as (power of two, odd rest)."""
    if dim < 1:
        raise ValueError(f"dim: expected a positive head size, got {dim!r}")
    power = dim & -dim
    return power, dim // power


@lru_cache(maxsize=64)
def signs(dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The fixed random signs divided by sqrt(2^k), `[dim, 1]`; the same on every device. Do not write to it."""
    power, _ = split(dim)
    draw = torch.randint(0, 2, (dim, 1), generator=torch.Generator().manual_seed(_SEED + dim), device="cpu")
    return ((draw * 2 - 1).to(torch.float64) / math.sqrt(power)).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _hartley(m: int) -> tuple[tuple[float, ...], ...]:
    """Symmetric orthonormal m x m matrix, its own inverse."""
    unit = 2 * math.pi / m
    return tuple(
        tuple((math.cos(unit * (i * j % m)) + math.sin(unit * (i * j % m))) / math.sqrt(m) for j in range(m))
        for i in range(m)
    )


@lru_cache(maxsize=64)
def hartley(m: int, device: torch.device) -> torch.Tensor:
    """The Hartley matrix `[m, m]` of the odd part of a head size, float32. Do not write to it."""
    return torch.tensor(_hartley(m), dtype=torch.float32, device=device)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Hadamard (not normalised) times Hartley on axis 0 of `[dim, R]`; `x` is used as a buffer."""
    dim, columns = x.shape
    power, rest = split(dim)
    other = torch.empty_like(x)
    half = power // 2
    while half:
        source, target = x.view(-1, 2, half, columns), other.view(-1, 2, half, columns)
        torch.add(source[:, 0], source[:, 1], out=target[:, 0])
        torch.sub(source[:, 0], source[:, 1], out=target[:, 1])
        x, other = other, x
        half //= 2
    if rest > 1:
        source, target = x.view(rest, power, columns), other.view(rest, power, columns)
        product = torch.empty_like(source[0])
        for i, row in enumerate(_hartley(rest)):
            torch.mul(source[0], row[0], out=target[i])
            for j in range(1, rest):  # multiply and add apart: a fused one would round vector and tail unlike
                target[i].add_(torch.mul(source[j], row[j], out=product))
        x = other
    return x


def rotate_columns(x: torch.Tensor) -> torch.Tensor:
    """Rotate every column of a contiguous `[dim, R]`. `x` is overwritten."""
    return _mix(x.mul_(signs(x.shape[0], x.device, x.dtype)))


def inverse_rotate_columns(x: torch.Tensor) -> torch.Tensor:
    """Undo `rotate_columns`. `x` is overwritten."""
    return _mix(x).mul_(signs(x.shape[0], x.device, x.dtype))


def _rows(x: torch.Tensor, inverse: bool) -> torch.Tensor:
    dim = x.shape[-1]
    flat = x.reshape(-1, dim)
    if not flat.is_floating_point() or flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    turn = inverse_rotate_columns if inverse else rotate_columns
    for start, end, _, _ in blocks(flat.shape[0], 1, dim, block_numel(flat.device, _BLOCK)):
        columns = torch.empty(dim, end - start, dtype=flat.dtype, device=flat.device)
        out[start:end] = turn(columns.copy_(flat[start:end].t())).t()
    return out.view(x.shape)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate `[..., dim]`; float32 for half precision input. Equals `x @ rotation_matrix(dim)` but for rounding."""
    return _rows(x, inverse=False)


def inverse_rotate(x: torch.Tensor) -> torch.Tensor:
    """Undo `rotate`."""
    return _rows(x, inverse=True)


@lru_cache(maxsize=64)
def rotation_matrix(dim: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The rotation as a matrix `[dim, dim]`: for queries and outputs, where bits may differ. Do not write to it."""
    matrix = rotate(torch.eye(dim, dtype=torch.float64))
    return matrix.to(device=device, dtype=dtype)
