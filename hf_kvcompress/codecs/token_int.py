"""Integers per token: groups along the head size with a scale and a centre each; 8 bits symmetric with one scale."""

from __future__ import annotations

import math
from functools import cached_property

import torch

from ..ops import quantize
from ..ops.numeric import TINY, bfloat16_ceil
from .base import Field, Packed, Role
from .integer import IntegerCodec

_SMALLEST_GROUP = 16  # a smaller divisor would spend more on scales than the groups save


def group_of(dim: int, group_size: int) -> int:
    """The largest divisor of `dim` not above `group_size`; `dim` itself where that would be under 16."""
    best = max(size for size in range(1, min(dim, group_size) + 1) if dim % size == 0)
    return best if best >= min(_SMALLEST_GROUP, group_size) else dim


class TokenIntCodec(IntegerCodec):
    """Round to nearest, a token by itself.

    The group is the largest divisor of the head size not above `group_size` (80 with 64: 40); 8 bits take the whole
    head. Scale and centre are bfloat16, which has float32's range; the scale is rounded up and the codes are found with
    the rounded numbers, so nothing is lost but a little of the range.
    """

    family = "int"
    supported_bits = (8, 4, 3, 2)

    def __init__(self, nbits: int, role: Role, dim: int, page_size: int = 64, group_size: int = 64):
        super().__init__(nbits, role, dim, page_size, group_size)
        self.symmetric = nbits == 8
        self.offset = 0.0 if self.symmetric else 0.5
        self.group_size = dim if self.symmetric else group_of(dim, group_size)
        self.groups = dim // self.group_size

    @cached_property
    def fields(self) -> dict[str, Field]:  # type: ignore[override]
        """Codes; a scale and, below 8 bits, a centre for every token and group."""
        fields = {**self.code_fields, "scale": Field((self.groups,), torch.bfloat16, tokens_last=True)}
        if not self.symmetric:
            fields["centre"] = Field((self.groups,), torch.bfloat16, tokens_last=True)
        return fields

    def _encode_columns(self, x: torch.Tensor, segment: Packed, rows: int) -> tuple[torch.Tensor, Packed]:
        grouped = x.view(self.groups, self.group_size, -1)
        high, low = grouped.amax(1), grouped.amin(1)
        top = 2**self.nbits - 1
        if self.symmetric:
            scale = bfloat16_ceil(torch.maximum(high, low.neg_()).mul_(1 / 127).clamp_(min=TINY))
            codes = grouped.mul_(scale.float().reciprocal_().unsqueeze(1)).round_().clamp_(-127, 127).add_(128)
            return codes.to(torch.uint8).view(self.dim, -1), {"scale": self._meta(scale, rows)}
        centre = ((high + low) * 0.5).to(torch.bfloat16)
        exact = centre.float()
        reach = torch.maximum(high - exact, exact - low)
        scale = bfloat16_ceil(reach.mul_(2 / top).clamp_(min=TINY))
        grouped.sub_(exact.unsqueeze(1)).mul_(scale.float().reciprocal_().unsqueeze(1))
        codes = grouped.add_(top / 2).round_().clamp_(0, top).to(torch.uint8).view(self.dim, -1)
        return codes, {"scale": self._meta(scale, rows), "centre": self._meta(centre, rows)}

    def _meta(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        return x.view(self.groups, rows, -1).transpose(0, 1)

    def _decode_columns(self, numbers: torch.Tensor, packed: Packed, rows: int) -> torch.Tensor:
        grouped = numbers.view(self.groups, self.group_size, rows, -1)
        grouped.mul_(packed["scale"].float().transpose(0, 1).unsqueeze(1))
        if not self.symmetric:
            grouped.add_(packed["centre"].float().transpose(0, 1).unsqueeze(1))
        return numbers

    @property
    def _tile_width(self) -> int:
        return quantize.tile_width(self.page_size, self.dim)

    def _encode_by_kernel(self, x: torch.Tensor, segment: Packed, out: Packed) -> None:
        fields = [out.get(name) for name in ("codes", "codes_low", "scale", "centre")]
        quantize.encode_int(x, *fields, self.nbits, self.role == "value", self.page_size, self.group_size, False)

    def _decode_by_kernel(self, packed: Packed, out: torch.Tensor) -> None:
        fields = [packed.get(name) for name in ("codes", "codes_low", "scale", "centre")]
        quantize.decode_int(*fields, out, self.nbits, self.role == "value", self.page_size, self.group_size, False)

    def tolerance(self, x: torch.Tensor, segment: Packed) -> torch.Tensor:
        """Half a step in every number."""
        columns = self._columns(x.reshape(-1, x.shape[-2], self.dim))
        size = columns.abs().amax(0)
        _, meta = self._encode_columns(columns, segment, 1)
        steps = torch.linalg.vector_norm(meta["scale"].double(), dim=(0, 1)).mul_(math.sqrt(self.group_size)).float()
        return (steps * 0.501 + size * (2e-6 * self.dim**0.5)).view(x.shape[:-1])

    def scores(self, q: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`q @ decode(packed).mT`: a query for each group, then one scale a token and group."""
        if self.role == "value":
            return super().scores(q, packed)
        flat = {k: v.flatten(0, 1) for k, v in packed.items()}
        q = q.float().flatten(0, 1)
        n, rows, _ = q.shape
        own = torch.zeros(n, self.groups, rows, self.groups, self.group_size, device=q.device)
        parts = q.unflatten(-1, (self.groups, -1))  # [n, M, G, g]
        own.diagonal(dim1=1, dim2=3).copy_(parts.permute(0, 1, 3, 2))
        dot = self._key_dot(own.view(n, 1, -1, self.dim), flat).unflatten(1, (self.groups, rows))
        out = dot.mul_(_tokens_last(flat["scale"]).unsqueeze(2)).sum(1)  # [n, M, S * T]
        if not self.symmetric:
            out.baddbmm_(parts.sum(-1), _tokens_last(flat["centre"]))
        return out.unflatten(0, packed["codes"].shape[:2])

    def mix(self, p: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`p @ decode(packed)`: the scale of every group goes to the probabilities."""
        if self.role == "key":
            return super().mix(p, packed)
        flat = {k: v.flatten(0, 1) for k, v in packed.items()}
        p = p.float().flatten(0, 1)
        out = self._value_dot(p.unsqueeze(1) * _tokens_last(flat["scale"]).unsqueeze(2), flat)
        if not self.symmetric:
            out.unflatten(-1, (self.groups, -1)).add_((p @ _tokens_last(flat["centre"]).mT).unsqueeze(-1))
        return out.unflatten(0, packed["codes"].shape[:2])


def _tokens_last(field: torch.Tensor) -> torch.Tensor:
    """`[n, S, G, T]` -> float32 `[n, G, S * T]`."""
    return field.transpose(1, 2).flatten(2).float()
