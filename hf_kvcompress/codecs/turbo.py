"""Rotated Lloyd-Max codes: a random-sign Hadamard rotation, then the best levels for a unit normal, one scale a token.

The levels are rounded to 1/127 of the largest one (their error grows by less than 0.5 %), so packed codes multiply as
int8 after one table look-up.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch

from ..ops.int8mm import Reader, TableReader
from .rotated import RotatedCodec

#: positive Lloyd-Max levels for a unit normal
LEVELS: dict[int, tuple[float, ...]] = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}


_BINS, _BINS_PER_UNIT = 4096, 512  # coordinates are cut into bins: one look-up finds the level, 0.001 off at most


class TurboCodec(RotatedCodec):
    """Rotated vectors with Lloyd-Max levels, keys and values alike."""

    family = "turbo"
    supported_bits = (4, 3, 2)

    @cached_property
    def _unit(self) -> float:
        return LEVELS[self.nbits][-1] / 127

    @cached_property
    def _positive(self) -> list[int]:
        return [round(level / self._unit) for level in LEVELS[self.nbits]]

    @cached_property
    def _table(self) -> tuple[int, ...]:
        """Numbers of the codes as they are stored (two's complement): first the positive ones, rising."""
        return (*self._positive, *(-level for level in reversed(self._positive)))

    @cached_property
    def readers(self) -> list[Reader]:  # type: ignore[override]
        """One look-up for all planes."""
        return [TableReader(self.nbits, self._table, self._unit, self._packed_together)]

    def _quantize(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, squares = _nearest(self._table, self._unit, z.device)
        index = z.mul_(_BINS_PER_UNIT).add_(_BINS / 2).clamp_(0, _BINS - 1).to(torch.int32).flatten()
        found = torch.index_select(squares, 0, index, out=torch.empty(index.shape, device=z.device))
        return torch.index_select(codes, 0, index).view(z.shape), found.view(z.shape)

    def _bins(self, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return _nearest(self._table, self._unit, device)

    def _numbers(self, codes: torch.Tensor) -> torch.Tensor:
        table = torch.tensor(self._table, dtype=torch.float32, device=codes.device).mul_(self._unit)
        return torch.index_select(table, 0, codes.to(torch.int32).flatten()).view(codes.shape)

    def _error_bound(self, z: torch.Tensor) -> torch.Tensor:
        levels = [level * self._unit for level in self._positive]
        gaps = [levels[0], *((high - low) / 2 for low, high in zip(levels, levels[1:], strict=False))]
        return z.abs_().sub_(levels[-1]).clamp_(min=max(gaps)).add_(1 / _BINS_PER_UNIT)


@lru_cache(maxsize=32)
def _nearest(stored: tuple[int, ...], unit: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each bin of a coordinate: the code of the level nearest to its middle (0, 1, ... rising), and its square."""
    levels = torch.tensor(sorted(stored), dtype=torch.float64) * unit
    middles = (torch.arange(_BINS, dtype=torch.float64) + 0.5 - _BINS / 2) / _BINS_PER_UNIT
    codes = (middles[:, None] - levels).abs().argmin(1)
    return codes.to(device=device, dtype=torch.uint8), levels[codes].square().to(device=device, dtype=torch.float32)
