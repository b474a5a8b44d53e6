"""Codes of channels that have 0 to 6 bits each: where their bits stand in the bytes of a token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

#: bits of the parts that a code of so many bits is cut into, the high ones first; no part crosses a byte
PARTS: dict[int, tuple[int, ...]] = {6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
MOST_BITS = 6


def bytes_of(dim: int, nbits: float) -> int:
    """Bytes of a token's codes."""
    return max(int(dim * nbits) // 8, 1)


@lru_cache(maxsize=256)
def places_of(bits: tuple[int, ...]) -> list[tuple[int, list[int], list[int], list[int]]]:
    """By bits of a part: the channels that have one, the bit of a token at which it stands, and how far up it goes in
    the code."""
    at, found = 0, []
    for size in (4, 2, 1):
        channels = [c for c, own in enumerate(bits) if size in PARTS[own]]
        up = [sum(p for p in PARTS[bits[c]] if p < size) for c in channels]
        found.append((size, channels, list(range(at, at + size * len(channels), size)), up))
        at += size * len(channels)
    return found


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def part_table(bits: tuple[int, ...]) -> torch.Tensor:
    """Of each channel its two parts' byte, shift, mask and lift, int32 `[R, 2, 4]`; the second one may be empty."""
    found = torch.zeros(len(bits), 2, 4, dtype=torch.int32)
    for size, channels, places, up in places_of(bits):
        for channel, place, lift in zip(channels, places, up, strict=True):
            slot = int(found[channel, 0, 2] > 0)
            found[channel, slot] = torch.tensor([place // 8, place % 8, 2**size - 1, lift])
    return found


def unpack(rows: torch.Tensor, bits: tuple[int, ...]) -> torch.Tensor:
    """Codes `[n, R, T]` int32 of bytes `[n, size, T]`."""
    out = torch.zeros(len(rows), len(bits), rows.shape[-1], dtype=torch.uint8, device=rows.device)
    for size, own, places, up in places_of(bits):
        if own:
            place = on(places, rows.device)
            shift, lift = (place % 8).to(torch.uint8)[:, None], on(up, rows.device).to(torch.uint8)[:, None]
            parts = (rows.index_select(1, place // 8) >> shift) & (2**size - 1)
            out.index_add_(1, on(own, rows.device), parts << lift)
    return out.int()


_INDEX: dict[tuple[tuple[int, ...], torch.device], torch.Tensor] = {}


def on(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Whole numbers on a device, kept there: a decode step does not copy them again."""
    key = (tuple(numbers), device)
    if key not in _INDEX:
        with torch.inference_mode(False):
            _INDEX[key] = torch.tensor(numbers, device=device)
    return _INDEX[key]
