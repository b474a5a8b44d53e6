"""Tight bit packing in planes of 8, 4, 2 or 1 bits.

A plane of b bits keeps element `j + i * n / (8 / b)` in bits `b * i ...` of byte j, so unpacking writes contiguous runs
with one shift and one mask. 3 bits are a 2-bit plane (the high bits) and a 1-bit plane (the low bit); 5 to 7 bits begin
with a plane of 4.
"""

from __future__ import annotations

import torch

#: bits of each plane, the plane of the high bits first
PLANES: dict[int, tuple[int, ...]] = {
    8: (8,),
    7: (4, 2, 1),
    6: (4, 2),
    5: (4, 1),
    4: (4,),
    3: (2, 1),
    2: (2,),
    1: (1,),
}


def _planes(nbits: int) -> tuple[int, ...]:
    if nbits not in PLANES:
        raise ValueError(f"nbits: expected one of {sorted(PLANES)}, got {nbits!r}")
    return PLANES[nbits]


def padded(n: int) -> int:
    """Elements that are stored for `n` of them: the next multiple of 8."""
    return -(-n // 8) * 8


def plane_sizes(n: int, nbits: int) -> tuple[int, ...]:
    """Bytes of each plane for `n` elements, padding included."""
    return tuple(padded(n) * bits // 8 for bits in _planes(nbits))


def pack(codes: torch.Tensor, nbits: int, dim: int = -1) -> tuple[torch.Tensor, ...]:
    """Pack uint8 `codes` below 2^nbits along `dim`, padded there with zeros to a multiple of 8; one tensor a plane."""
    plane_bits = _planes(nbits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes: expected dtype torch.uint8, got {codes.dtype}")
    n = codes.shape[dim]
    missing = padded(n) - n
    if missing:
        shape = list(codes.shape)
        shape[dim] = missing
        codes = torch.cat([codes, codes.new_zeros(shape)], dim)
        n += missing
    if nbits == 8:
        return (codes,)
    planes = []
    low = nbits
    for bits in plane_bits:
        low -= bits
        part = codes if nbits == bits else torch.bitwise_and(codes >> low, 2**bits - 1)
        step = n * bits // 8
        plane = part.narrow(dim, 0, step).clone()
        for i in range(1, 8 // bits):
            plane |= part.narrow(dim, i * step, step) << (i * bits)
        planes.append(plane)
    return tuple(planes)


def unpack(planes: tuple[torch.Tensor, ...], nbits: int, n: int, dim: int = -1) -> torch.Tensor:
    """Read back the `n` uint8 codes along `dim`."""
    plane_bits = _planes(nbits)
    if len(planes) != len(plane_bits):
        raise ValueError(f"planes: expected {len(plane_bits)} for nbits={nbits}, got {len(planes)}")
    if nbits == 8:
        return planes[0].narrow(dim, 0, n)
    shape = list(planes[0].shape)
    total = shape[dim] = padded(n)
    out = torch.empty(shape, dtype=torch.uint8, device=planes[0].device)
    low = nbits
    for index, (plane, bits) in enumerate(zip(planes, plane_bits, strict=True)):
        low -= bits
        step, mask = total * bits // 8, (2**bits - 1) << low
        if plane.shape[dim] != step:
            raise ValueError(f"planes[{index}]: expected {step} bytes along dim {dim}, got {plane.shape[dim]}")
        for i in range(8 // bits):
            run = out.narrow(dim, i * step, step)
            shift = i * bits - low  # to the right, negative to the left
            if index:
                run |= (plane >> shift if shift >= 0 else plane << -shift) & mask
            else:
                torch.bitwise_right_shift(plane, shift, out=run) if shift >= 0 else torch.bitwise_left_shift(
                    plane, -shift, out=run
                )
                run &= mask
    return out.narrow(dim, 0, n)
