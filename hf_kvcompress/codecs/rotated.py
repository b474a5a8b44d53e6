"""Common ground of the codecs that rotate a vector until every coordinate is close to normal."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property

import torch

from ..ops import quantize
from ..ops.hadamard import inverse_rotate_columns, rotate_columns, rotation_matrix
from ..ops.numeric import TINY, tree_sum
from .base import Field, Packed
from .integer import IntegerCodec


class RotatedCodec(IntegerCodec):
    """Rotated vectors: one code a coordinate and one scale a token, corrected so that the vector keeps its norm."""

    #: of uniform codes
    _step: float = 1.0
    #: the scale is the norm times the code's cosine to this power
    _power: float = 0.0

    @cached_property
    def fields(self) -> dict[str, Field]:  # type: ignore[override]
        """Codes and one scale a token."""
        return {**self.code_fields, "scale": Field((), torch.bfloat16)}

    @abstractmethod
    def _quantize(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns close to unit normal (may be overwritten) -> uint8 codes, and the squares of their numbers."""

    @abstractmethod
    def _error_bound(self, z: torch.Tensor) -> torch.Tensor:
        """Bound on `|z - number of its code|`, elementwise. `z` may be overwritten."""

    @staticmethod
    def _normalise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns `[D, R]` (overwritten) -> rotated columns of norm sqrt(D), and the norms `[R]` they had."""
        size = torch.maximum(x.amax(0), x.amin(0).neg_()).clamp_(min=TINY)
        x.mul_(size.reciprocal())  # squares neither overflow nor vanish
        norm = tree_sum(x * x, 0).sqrt_()
        z = rotate_columns(x).mul_(norm.clamp(min=TINY).reciprocal_().mul_(math.sqrt(x.shape[0])))
        return z, norm.mul_(size)

    def _encode_columns(self, x: torch.Tensor, segment: Packed, rows: int) -> tuple[torch.Tensor, Packed]:
        z, norm = self._normalise(x)
        codes, squares = self._quantize(z)
        scale = norm / tree_sum(squares, 0).sqrt_()
        return codes, {"scale": scale.to(torch.bfloat16).view(rows, -1)}

    def _decode_columns(self, numbers: torch.Tensor, packed: Packed, rows: int) -> torch.Tensor:
        return inverse_rotate_columns(numbers.mul_(packed["scale"].float().reshape(1, -1)))

    @cached_property
    def _stored_numbers(self) -> tuple[float, ...]:
        return tuple(self._table_of_codes.tolist())

    @property
    def _tile_width(self) -> int:
        return quantize.tile_width(self.page_size, self.dim, rotated=True)

    def _bins(self, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """For each bin of a coordinate its code and the square of its number; None: uniform codes."""
        return None, None

    def _encode_by_kernel(self, x: torch.Tensor, segment: Packed, out: Packed) -> None:
        statistics = [segment.get(name) for name in ("mean", "spread")]
        fields = [out.get(name) for name in ("codes", "codes_low", "scale")]
        layout = (self.nbits, self.role == "value", self.page_size)
        quantize.encode_rotated(x, *statistics, *self._bins(x.device), *fields, *layout, self._step, self._power)

    def _decode_by_kernel(self, packed: Packed, out: torch.Tensor) -> None:
        fields = [packed.get(name) for name in ("codes", "codes_low", "scale", "mean", "spread")]
        numbers = quantize.table(self._stored_numbers, out.device)
        quantize.decode_rotated(*fields, numbers, out, self.nbits, self.role == "value", self.page_size)

    def _bound_columns(self, x: torch.Tensor) -> torch.Tensor:
        """Bound for every column `[D, R]` (overwritten): twice the codes' error, since the norm is restored."""
        z, norm = self._normalise(x)
        error = self._error_bound(z).square_().sum(0).sqrt_().mul_(2 / math.sqrt(self.dim)).clamp_(max=2.0)
        return norm * (error * 1.01 + 2**-8)  # bfloat16 scale, float32 rotations

    def tolerance(self, x: torch.Tensor, segment: Packed) -> torch.Tensor:
        """The codes' error in the rotated basis, which keeps lengths."""
        columns = self._columns(x.reshape(-1, x.shape[-2], self.dim))
        return self._bound_columns(columns).add_(TINY * self.dim).view(x.shape[:-1])

    def scores(self, q: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`q @ decode(packed).mT` with the query rotated instead of the keys."""
        if self.role == "value":
            return super().scores(q, packed)
        flat = {k: v.flatten(0, 1) for k, v in packed.items()}
        rotated = q.float().flatten(0, 1) @ rotation_matrix(self.dim, q.device)
        out = self._key_dot(rotated.unsqueeze(1), flat).mul_(flat["scale"].flatten(1).float().unsqueeze(1))
        return out.unflatten(0, q.shape[:2])

    def mix(self, p: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`p @ V` in the rotated basis; `finish` turns it back."""
        if self.role == "key":
            return super().mix(p, packed)
        flat = {k: v.flatten(0, 1) for k, v in packed.items()}
        weighted = p.float().flatten(0, 1) * flat["scale"].flatten(1).float().unsqueeze(1)
        return self._value_dot(weighted.unsqueeze(1), flat).unflatten(0, p.shape[:2])

    def finish(self, acc: torch.Tensor) -> torch.Tensor:
        """Undo the rotation of the values."""
        return acc @ rotation_matrix(self.dim, acc.device).mT if self.role == "value" else acc
