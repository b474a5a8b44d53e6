"""Launchers of the kernels that quantize and pack, and of those that read back: one launch a call.

Rows are a tensor's leading axes as one. Inputs and packed tensors may have any stride between rows; outputs are written
where they are, so a caller may pass parts of its storage.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from . import kernels
from .hadamard import hartley, signs, split
from .kernels import Argument, Long
from .library import register

THREADS = 256
TILE = 32  # tokens of a tile at most: more blocks, and enough threads a token
SHARED = 48 << 10  # bytes of shared memory that every GPU gives without asking
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# -- tiles -------------------------------------------------------------------------------------------------------------


def _line(dim: int) -> int:
    """Bytes from one token of a tile to the next: a word more than its codes, so that threads use different banks."""
    return -(-dim // 8) * 8 + 4


def codes_shared(dim: int, width: int) -> int:
    """Bytes of shared memory for a tile's codes."""
    return 8 * width * _line(dim)


@lru_cache(maxsize=256)
def tile_width(page: int, dim: int, rotated: bool = False, whole: bool = False) -> int:
    """Tokens of a tile over 8, for pages of `page` tokens; 0 where none fits into shared memory.

    rotated: the tile holds two float32 copies of its numbers; whole: a tile must be a page.
    """
    largest = SHARED // (8 * _line(dim))
    if rotated:
        largest = (SHARED - 4 * THREADS) // (8 * (_line(dim) + 8 * (dim | 1)))
    eighth = page // 8
    if whole:
        return eighth if eighth <= largest else 0
    return max((w for w in range(1, min(largest, TILE // 8) + 1) if eighth % w == 0), default=0)


def serves(x: torch.Tensor, width: int) -> bool:
    """Whether the kernels take these numbers (or codes), given their tiles' width."""
    return width > 0 and (x.dtype in DTYPES or x.dtype == torch.uint8) and kernels.serves(x)


# -- tensors -----------------------------------------------------------------------------------------------------------


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`[..., T, D]` as `[outer, inner, T, D]` with its channels side by side; copied only where strides ask for it."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    axes: list[tuple[int, int]] = []  # sizes and strides of the leading axes, neighbours that make one axis joined
    for size, stride in zip(x.shape[:-2], x.stride()[:-2], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        return x.reshape(1, -1, *x.shape[-2:])
    axes = [(1, 0)] * (2 - len(axes)) + axes
    shape, strides = zip(*axes, strict=True)
    return x.as_strided((*shape, *x.shape[-2:]), (*strides, *x.stride()[-2:]))


def source(x: torch.Tensor) -> list[Argument]:
    """Arguments that describe `[outer, inner, T, D]`."""
    return [x, DTYPES[x.dtype], x.shape[1], Long(x.stride(0)), Long(x.stride(1)), x.stride(2)]


def _planes(high: torch.Tensor, low: torch.Tensor | None) -> list[Argument]:
    """Arguments that describe one or two planes `[rows, lines, bytes]`."""
    lower = (Long(0), 0) if low is None else (Long(low.stride(0)), low.stride(1))
    return [high, Long(high.stride(0)), high.stride(1), low, *lower]


def _meta(scale: torch.Tensor, centre: torch.Tensor | None) -> list[Argument]:
    """Arguments that describe scales and centres `[rows, lines, entries]`."""
    other = scale if centre is None else centre
    return [scale, centre, Long(scale.stride(0)), scale.stride(1), Long(other.stride(0)), other.stride(1)]


def dense(x: torch.Tensor) -> torch.Tensor:
    """The tensor with its last axis side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@lru_cache(maxsize=64)
def table(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers on a device. Do not write to it."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


# -- integer codes -----------------------------------------------------------------------------------------------------


@register(
    "Tensor x, Tensor(a!) high, Tensor(b!)? low, Tensor(c!) scale, Tensor(d!)? centre, int nbits, bool value, "
    "int page, int group, bool by_channel"
)
def encode_int(
    x: torch.Tensor,
    high: torch.Tensor,
    low: torch.Tensor | None,
    scale: torch.Tensor,
    centre: torch.Tensor | None,
    nbits: int,
    value: bool,
    page: int,
    group: int,
    by_channel: bool,
) -> None:
    """Pack `x` `[outer, inner, T, D]` into planes `[rows, lines, bytes]` with scales and centres.

    These are `[rows, D / group, T]`, or by channel `[rows, T / group, D]`; no centre: symmetric codes of 8 bits.
    """
    outer, inner, tokens, dim = x.shape
    width = tile_width(page, dim, whole=by_channel)
    blocks = outer * inner * (tokens // (8 * width))
    if blocks == 0:
        return
    unit = 1 / 127 if centre is None else 2 / (2**nbits - 1)
    kernel = kernels.load("quantize_int.cu", "encode_channel_int" if by_channel else "encode_token_int")
    args = [*source(x), *_planes(high, low), *_meta(scale, centre)]
    args += [dim, tokens // page, page, width, nbits, int(value), group, unit]
    kernel((blocks,), THREADS, args, shared=codes_shared(dim, width), like=x)


@register(
    "Tensor high, Tensor? low, Tensor scale, Tensor? centre, Tensor(a!) out, int nbits, bool value, int page, "
    "int group, bool by_channel"
)
def decode_int(
    high: torch.Tensor,
    low: torch.Tensor | None,
    scale: torch.Tensor,
    centre: torch.Tensor | None,
    out: torch.Tensor,
    nbits: int,
    value: bool,
    page: int,
    group: int,
    by_channel: bool,
) -> None:
    """Read what `encode_int` packed into a contiguous `out` `[rows, T, D]` of any of the three dtypes."""
    rows, tokens, dim = out.shape
    width = tile_width(page, dim)
    blocks = rows * (tokens // (8 * width))
    if blocks == 0:
        return
    kernel = kernels.load("quantize_int.cu", "decode_int")
    args = [*_planes(high, low), *_meta(scale, centre), out, DTYPES[out.dtype]]
    args += [dim, tokens // page, page, width, nbits, int(value), group, int(by_channel)]
    kernel((blocks,), THREADS, args, shared=codes_shared(dim, width), like=out)


# -- rotated codes -----------------------------------------------------------------------------------------------------


def _rotation(dim: int, device: torch.device) -> list[Argument]:
    rest = split(dim)[1]
    return [signs(dim, device), hartley(rest, device) if rest > 1 else None]


def rotated_shared(dim: int, width: int) -> int:
    """Bytes of shared memory for a tile of the kernels that rotate."""
    return 8 * width * (_line(dim) + 8 * (dim | 1)) + 4 * THREADS


@register(
    "Tensor x, Tensor? mean, Tensor? spread, Tensor? bins, Tensor? squares, Tensor(a!) high, Tensor(b!)? low, "
    "Tensor(c!) scale, int nbits, bool value, int page, float step, float power"
)
def encode_rotated(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    spread: torch.Tensor | None,
    bins: torch.Tensor | None,
    squares: torch.Tensor | None,
    high: torch.Tensor,
    low: torch.Tensor | None,
    scale: torch.Tensor,
    nbits: int,
    value: bool,
    page: int,
    step: float,
    power: float,
) -> None:
    """Rotate and pack `x` `[outer, inner, T, D]` into planes `[rows, lines, bytes]` and scales `[rows, T]`.

    Args:
        mean, spread: `[rows, D]` bfloat16, taken out before; None for nothing.
        bins, squares: `[4096]`, codes of coordinates cut into bins and squares of their levels; None: uniform codes.
        step: of the uniform codes.
        power: 0, -0.5 or -1; the scale gets a factor of the code's cosine to this power.
    """
    outer, inner, tokens, dim = x.shape
    width = tile_width(page, dim, rotated=True)
    blocks = outer * inner * (tokens // (8 * width))
    if blocks == 0:
        return
    kernel = kernels.load("quantize_rotated.cu", "encode_rotated")
    row = 0 if mean is None else mean.stride(0)
    args = [*source(x), mean, spread, Long(row), *_rotation(dim, x.device), bins, squares, *_planes(high, low)]
    args += [scale, Long(scale.stride(0)), dim, tokens // page, page, width, nbits, int(value)]
    args += [dim**0.5, dim**-0.5, 1 / step, power]
    kernel((blocks,), THREADS, args, shared=rotated_shared(dim, width), like=x)


@register(
    "Tensor high, Tensor? low, Tensor scale, Tensor? mean, Tensor? spread, Tensor numbers, Tensor(a!) out, "
    "int nbits, bool value, int page"
)
def decode_rotated(
    high: torch.Tensor,
    low: torch.Tensor | None,
    scale: torch.Tensor,
    mean: torch.Tensor | None,
    spread: torch.Tensor | None,
    numbers: torch.Tensor,
    out: torch.Tensor,
    nbits: int,
    value: bool,
    page: int,
) -> None:
    """Read what `encode_rotated` packed into a contiguous `out` `[rows, T, D]`; numbers: of the stored codes."""
    rows, tokens, dim = out.shape
    width = tile_width(page, dim, rotated=True)
    blocks = rows * (tokens // (8 * width))
    if blocks == 0:
        return
    kernel = kernels.load("quantize_rotated.cu", "decode_rotated")
    row = 0 if mean is None else mean.stride(0)
    args = [*_planes(high, low), scale, Long(scale.stride(0)), mean, spread, Long(row)]
    args += [*_rotation(dim, out.device), numbers, out, DTYPES[out.dtype]]
    args += [dim, tokens // page, page, width, nbits, int(value)]
    kernel((blocks,), THREADS, args, shared=rotated_shared(dim, width), like=out)


# -- 8-bit floats ------------------------------------------------------------------------------------------------------


@register("Tensor x, Tensor(a!) codes, Tensor(b!) scale")
def encode_fp8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Pack `x` `[outer, inner, T, D]` into e4m3 bytes `[rows, T, D]` and scales `[rows, T]`."""
    outer, inner, tokens, dim = x.shape
    blocks = -(-outer * inner * tokens // (THREADS // 32))
    if blocks == 0:
        return
    kernel = kernels.load("quantize_fp8.cu", "encode_fp8")
    args = [*source(x), codes, Long(codes.stride(0)), scale, Long(scale.stride(0))]
    args += [dim, outer * inner, tokens, 1 / 448]
    kernel((blocks,), THREADS, args, like=x)


@register("Tensor codes, Tensor scale, Tensor(a!) out")
def decode_fp8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Read what `encode_fp8` packed into a contiguous `out` `[rows, T, D]`."""
    rows, tokens, dim = out.shape
    blocks = -(-rows * tokens // (THREADS // 32))
    if blocks == 0:
        return
    kernel = kernels.load("quantize_fp8.cu", "decode_fp8")
    args: list[Argument] = [
        codes,
        Long(codes.stride(0)),
        scale,
        Long(scale.stride(0)),
        out,
        DTYPES[out.dtype],
        dim,
        rows,
        tokens,
    ]
    kernel((blocks,), THREADS, args, like=out)
