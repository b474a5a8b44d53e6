"""Products with packed codes: codes become int8 without leaving the cache, scales and offsets go to the small operand.

A reader turns packed planes into an int8 matrix in the order that is cheapest to write; `arrange` brings the small
operand into that order and scales it, `correct` is what the order's offsets add to the product.

bfloat16 operands on CPU go through torch's `_weight_int8pack_mm` where that is faster, others are multiplied as they
are.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from .packing import PLANES

MAX_ROWS = 16  # above it converting the codes once is cheaper than the int8 kernel
MIN_TOKENS = 512  # in a run of keys; below it one batched float32 product beats many calls


class Scratch:
    """Buffers that a loop over blocks uses again and again; a `take` ends the life of what the slot gave before."""

    def __init__(self, device: torch.device):
        self.device = device
        self.slots: dict[str, torch.Tensor] = {}

    def take(self, slot: str, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor."""
        words = -(-math.prod(shape) * dtype.itemsize // 8)
        held = self.slots.get(slot)
        if held is None or held.numel() < words:
            held = self.slots[slot] = torch.empty(words, dtype=torch.int64, device=self.device)
        return held.view(dtype)[: math.prod(shape)].view(shape)


class UniformReader:
    """One plane of two's complement codes; reads code + offset.

    Args:
        bits: bits of the plane: 8, 4 or 2 (signed), 1 (the unsigned low bit of 3-bit codes).
        place: what the plane's unit counts for.
        offset: added to every code.
        page: elements that were packed together.
    """

    def __init__(self, index: int, bits: int, place: float, offset: float, page: int):
        self.index, self.bits, self.page, self.count = index, bits, page, 8 // bits
        steps = range(self.count)
        # byte i of a group holds code * 2^(bits * i) read as int8: only its top field is signed
        self.scale = {
            8: [1.0],
            4: [1 / 16] * 2,
            2: [2.0 ** (-2 * i) for i in steps],
            1: [2.0**-i if i < 7 else -(2.0**-7) for i in steps],
        }[bits]
        shift = [-2.0, -2.0, -2.0, 0.0] if bits == 2 else [0.0] * self.count
        self.scale = [s * place for s in self.scale]
        self.offsets = [(z * place + offset) / s for z, s in zip(shift, self.scale, strict=True)]

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., L]` in natural order -> scaled and in the order of `read`; L is a multiple of `page`."""
        if self.count == 1:
            return x * self.scale[0] if self.scale[0] != 1 else x
        x = x.unflatten(-1, (-1, self.count, self.page // self.count))
        if self.bits == 4:
            return (x * self.scale[0]).movedim(-2, -3).flatten(-3)
        return (x * _vector(tuple(self.scale), x.device).unsqueeze(-1)).transpose(-1, -2).flatten(-3)

    def correct(self, x: torch.Tensor) -> torch.Tensor | None:
        """Sum over the offsets for an arranged (and perhaps rounded) `[..., L]`: `[...]`, or None for nothing."""
        if not any(self.offsets):
            return None
        if self.bits >= 4:
            return x.sum(-1, dtype=torch.float32) * self.offsets[0]
        totals = x.unflatten(-1, (-1, self.count)).sum(-2, dtype=torch.float32)
        return totals @ _vector(tuple(self.offsets), x.device)

    def read(self, planes: list[torch.Tensor], scratch: Scratch) -> torch.Tensor:
        """`[rows, ...]` bytes -> int8 `[rows, K]`, in the scratch or a view."""
        plane = planes[self.index]
        rows = plane.shape[0]
        if self.bits == 8:
            return plane.reshape(rows, -1).view(torch.int8)
        if self.bits == 4:
            out = scratch.take("codes", (rows, 2, *plane.shape[1:]), torch.uint8)
            torch.mul(plane, 16, out=out[:, 0])
            torch.bitwise_and(plane, 0xF0, out=out[:, 1])
            return out.view(torch.int8).view(rows, -1)
        if self.bits == 2:  # the lower three fields to offset binary, then every byte keeps one field in place
            wide = scratch.take("codes", plane.shape, torch.int32).copy_(plane ^ 0x2A)
            wide.mul_(0x01010101).bitwise_and_(_signed(0xC0300C03, 32))
            return wide.view(rows, -1).view(torch.int8)
        wide = scratch.take("codes", plane.shape, torch.int64).copy_(plane)
        wide.mul_(0x0101010101010101).bitwise_and_(_signed(0x8040201008040201, 64))
        return wide.view(rows, -1).view(torch.int8)


class TableReader:
    """Codes that stand for the int8 numbers of a table; two bytes (or 4 codes of 3 bits) are looked up at once.

    Args:
        table: int8 numbers of the codes 0, 1, ..., as they are stored.
        unit: what 1 in the table counts for.
        page: elements that were packed together.
    """

    offsets = (0.0,)

    def __init__(self, nbits: int, table: tuple[int, ...], unit: float, page: int):
        self.nbits, self.table, self.unit, self.page = nbits, table, unit, page
        self.count = 8 // PLANES[nbits][0]

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., L]` in natural order -> scaled and in the order of `read`; L is a multiple of `page`."""
        x = (x * self.unit).unflatten(-1, (-1, self.count, self.page // self.count))
        return x.transpose(-1, -2).flatten(-3)

    def correct(self, x: torch.Tensor) -> torch.Tensor | None:
        """A table has no offset."""
        return None

    def read(self, planes: list[torch.Tensor], scratch: Scratch) -> torch.Tensor:
        """`[rows, ...]` bytes -> int8 `[rows, K]`, in the scratch."""
        rows, device = planes[0].shape[0], planes[0].device
        if self.nbits == 3:
            high, low = (p.unflatten(-1, (-1, n, self.page // 8)) for p, n in zip(planes, (2, 1), strict=True))
            index = scratch.take("index", high.shape, torch.int32).copy_(high).mul_(256)
            index.add_(low & _low_masks(device))
        else:
            # the layer's storage may start at an odd byte: then the pairs need a copy
            plane = planes[0] if planes[0].storage_offset() % 2 == 0 else planes[0].clone()
            index = scratch.take("index", (*plane.shape[:-1], plane.shape[-1] // 2), torch.int32)
            index.copy_(plane.view(torch.uint16))
        table = _lookup_table(self.nbits, self.table, device)
        found = scratch.take("codes", (index.numel(),), table.dtype)
        torch.index_select(table, 0, index.view(-1), out=found)
        return found.view(rows, -1).view(torch.int8)


Reader = UniformReader | TableReader


def uniform_readers(nbits: int, offset: float, page: int) -> list[Reader]:
    """Readers of code + offset, one a plane."""
    low, readers = nbits, list[Reader]()
    for index, bits in enumerate(PLANES[nbits]):
        low -= bits
        readers.append(UniformReader(index, bits, 2.0**low, 0.0 if index else offset, page))
    return readers


def _signed(pattern: int, bits: int) -> int:
    return pattern - (1 << bits) if pattern >> (bits - 1) else pattern


@lru_cache(maxsize=64)
def _vector(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, device=device)


@lru_cache(maxsize=8)
def _low_masks(device: torch.device) -> torch.Tensor:
    """Bits of a low-plane byte that belong to the first and to the second half of the high plane's bytes."""
    return torch.tensor([[0x55], [0xAA]], dtype=torch.uint8, device=device)


@lru_cache(maxsize=32)
def _lookup_table(nbits: int, table: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """All 65536 pairs of bytes -> their codes' numbers, int8 by int8 in one int32 (int64 for 2 bits)."""
    pair = torch.arange(65536)
    if nbits == 3:  # high byte: four 2-bit fields; low byte: the even or the odd bits, whichever are set
        fields = []
        for i in range(4):
            bit = ((pair >> (2 * i)) & 1) | ((pair >> (2 * i + 1)) & 1)
            fields.append(((pair >> (8 + 2 * i)) & 3) * 2 + bit)
    else:
        fields = [(pair >> (nbits * i)) & (2**nbits - 1) for i in range(16 // nbits)]
    numbers = torch.tensor(table, dtype=torch.int8)[torch.stack(fields, -1)].contiguous()
    return numbers.view(torch.int64 if nbits == 2 else torch.int32).view(-1).to(device)


@lru_cache(maxsize=64)
def _ones(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bfloat16)


def _int8_kernel(x: torch.Tensor, width: int) -> bool:
    # the kernel reads past the end of rows that are not whole runs of 16
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[-2] <= MAX_ROWS and width % 16 == 0


def key_product(x: torch.Tensor, codes: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """x `[m, u, M, K]`, codes int8 `[m, u, N, K]` -> float32 `[m, M, u * N]`: each run of N tokens with its own x."""
    m, units, rows, width = x.shape
    tokens = codes.shape[2]
    if _int8_kernel(x, width) and tokens >= MIN_TOKENS:
        product, ones = torch.ops.aten._weight_int8pack_mm, _ones(tokens)
        out = torch.empty(m, rows, units * tokens)
        for row, xs, ws in zip(out.unbind(0), x.unbind(0), codes.unbind(0), strict=True):
            parts = [product(a, b, ones) for a, b in zip(xs.unbind(0), ws.unbind(0), strict=True)]
            row.copy_(parts[0] if units == 1 else torch.cat(parts, 1))
        return out
    dense = scratch.take("dense", (m * units, tokens, width), x.dtype).copy_(codes.flatten(0, 1))
    return (x.flatten(0, 1) @ dense.mT).float().unflatten(0, (m, units)).transpose(1, 2).flatten(2)


def value_product(p: torch.Tensor, codes: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """p `[m, G, M, K]`, codes int8 `[m, G, N, K]` -> float32 `[m, M, G * N]`: a p for each group."""
    if _int8_kernel(p, p.shape[-1]):
        product, ones = torch.ops.aten._weight_int8pack_mm, _ones(codes.shape[2])
        return torch.stack(
            [
                torch.cat([product(a, b, ones) for a, b in zip(xs.unbind(0), ws.unbind(0), strict=True)], 1)
                for xs, ws in zip(p.unbind(0), codes.unbind(0), strict=True)
            ]
        ).float()
    return (p @ scratch.take("dense", codes.shape, p.dtype).copy_(codes).mT).float().transpose(1, 2).flatten(2)
