"""How codecs pack numbers, as the attention kernels are told: `cuda/attention_formats.cuh` has the same families."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

IDENTITY, FP8, TOKENS, CHANNELS, TURBO, EQROT = range(6)  # families
ROWS = 8  # query rows of a block
TILE = 32  # tokens that the plain kernel holds at once
MOST_SHARED = 48 * 1024  # bytes of a block


@dataclass(frozen=True)
class Format:
    """How a role's numbers are packed.

    Args:
        dim: head size.
        family: IDENTITY, FP8, TOKENS, CHANNELS, TURBO or EQROT.
        bits: of a code; 0 for IDENTITY.
        group: numbers that share a scale, in TOKENS and CHANNELS.
    """

    dim: int
    family: int
    bits: int
    group: int = 1

    @property
    def rotated(self) -> bool:
        """Numbers are those of the rotated vector."""
        return self.family >= TURBO

    def macros(self, role: str) -> dict[str, int]:
        """The macros of `role`, "KEY" or "VALUE"."""
        return {
            f"HEAD_{role}": self.dim,
            f"{role}_CODEC": 10 * self.family + self.bits,
            f"{role}_GROUP": self.group if self.family in (TOKENS, CHANNELS) else 1,
        }


@dataclass(frozen=True)
class Variant:
    """One launch: a pair of formats and the page size they are packed in."""

    key: Format
    value: Format
    page: int

    @property
    def fits(self) -> bool:
        """Whether the plain kernel's shared memory is enough: up to 240 channels, or 256."""
        odd = 2 if self.key.dim & (self.key.dim - 1) else 1
        floats = TILE * (max(self.key.dim, self.value.dim) | 1) + ROWS * (odd * (self.key.dim | 1) + TILE + 2)
        return 4 * floats <= MOST_SHARED

    def has_tensor_cores(self) -> bool:
        """Whether `attention_mma` serves these formats."""
        return _by_tensor_cores(self.key, self.page, True) and _by_tensor_cores(self.value, self.page, False)

    def text(self, device: torch.device) -> str:
        """As the op takes it: the kernel's name, then its macros."""
        name = "attention_mma" if self.has_tensor_cores() and _mma_on(device) else "attention_plain"
        macros = {**self.key.macros("KEY"), **self.value.macros("VALUE"), "PAGE": self.page, "ROWS": ROWS}
        return " ".join([name, *(f"{name}={number}" for name, number in macros.items())])


def _by_tensor_cores(form: Format, page: int, key: bool) -> bool:
    """What attention_mma.cu asks of one role: whole words for a lane, and one scale for all that is summed at once."""
    if form.dim % 64 or form.family == IDENTITY:
        return False
    if form.family == CHANNELS:  # a tile of 64 tokens inside one group
        if form.group != page or page < 64:
            return False
    if key:
        words = form.dim * (2 if form.bits == 3 else form.bits) // 128
        span = 16 * next(size for size in (4, 2, 1) if words % size == 0)
        return form.family != TOKENS or form.group % span == 0
    if form.family == TOKENS and form.group % 8:
        return False
    return form.family == FP8 or page >= (32 if form.bits == 3 else 16)


@cache
def _mma_on(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
