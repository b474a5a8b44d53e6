"""Equalised rotation: uniform codes of rotated vectors, keys with their channels' mean and spread taken out first.

Keys: subtract the segment's channel mean, divide channel c by s_c = sqrt(std_k / std_q), rotate, store one scale
a token (so that the norm is kept) and uniform codes with the step that suits a unit normal. Values: no mean and no s.
`score = scale_t * (rotate(q * s) . code_t) + q . mean`, so keys are used without being read back.
All metadata is bfloat16: it has float32's range, and what its rounding takes from the mean and the spread is coded,
since the encoder uses the rounded ones.
"""

from __future__ import annotations

from functools import cached_property

import torch

from ..ops.hadamard import rotation_matrix
from ..ops.numeric import LIMIT, TINY, block_numel, blocks, clean_, tree_sum
from .base import Field, Packed, Role
from .rotated import RotatedCodec

#: step of the uniform quantizer with the least square error for a unit normal
STEP = {2: 0.995, 3: 0.585, 4: 0.335}
_FLOOR = 1e-4  # of the root mean square over the channels: near-constant channels are not blown up further
_BLOCK = 1 << 17


class EqRotCodec(RotatedCodec):
    """Rotated uniform codes; the keys' channels are equalised per segment."""

    family = "eqrot"
    supported_bits = (4, 3, 2)

    def __init__(self, nbits: int, role: Role, dim: int, page_size: int = 64, group_size: int = 64):
        super().__init__(nbits, role, dim, page_size, group_size)
        self.wants_queries = role == "key"

    @cached_property
    def fields(self) -> dict[str, Field]:  # type: ignore[override]
        """Codes and one scale a token; for keys mean and spread of every channel and segment."""
        fields = {**self.code_fields, "scale": Field((), torch.bfloat16)}
        if self.role == "key":
            fields["mean"] = Field((self.dim,), torch.bfloat16, None)
            fields["spread"] = Field((self.dim,), torch.bfloat16, None)
        return fields

    def begin_segment(self, x: torch.Tensor, query_ms: torch.Tensor | None = None) -> Packed:
        """Mean and equalising spread of every channel (keys only)."""
        if self.role == "value":
            return {}
        lead, tokens = x.shape[:-2], x.shape[-2]
        flat = x.reshape(-1, tokens, self.dim)
        mean = torch.empty(flat.shape[0], self.dim, dtype=torch.bfloat16, device=x.device)
        spread = torch.empty_like(mean)
        queries = None if query_ms is None else query_ms.reshape(-1, self.dim)
        for start, end, _, _ in blocks(flat.shape[0], 1, tokens * self.dim, block_numel(x.device, _BLOCK)):
            y = clean_(flat[start:end].to(torch.float32, copy=True))
            unit = torch.maximum(y.amax((1, 2)), y.amin((1, 2)).neg_()).clamp_(min=TINY)[:, None]
            y.mul_(unit.reciprocal()[:, None])  # squares neither overflow nor vanish
            centre = tree_sum(y, 1).mul_(1 / tokens)
            y.sub_(centre[:, None])
            std = tree_sum(y.mul_(y), 1).mul_(1 / tokens).sqrt_()
            std_rms = _rms(std)
            relative = torch.where(std_rms > 0, std / std_rms.clamp(min=TINY), 1.0).clamp_(min=_FLOOR)
            if queries is not None:
                relative.div_(_relative_std(queries[start:end]))
            # tokens that come later should fit a segment that began with equal or zero tokens
            size = unit * torch.where(std_rms > 0, std_rms.clamp(min=1e-6), 1.0)
            size = torch.where(unit > TINY, size, 1.0)
            mean[start:end] = centre * unit
            spread[start:end] = (relative.sqrt_() * size).clamp_(TINY, LIMIT)
        return {"mean": mean.view(*lead, self.dim), "spread": spread.view(*lead, self.dim)}

    def _equalise(self, x: torch.Tensor, segment: Packed, rows: int) -> torch.Tensor:
        """Columns of keys without mean and spread, in place."""
        if self.role == "key":
            y = x.view(self.dim, rows, -1)
            y.sub_(segment["mean"].float().t().unsqueeze(-1))
            y.mul_(segment["spread"].float().reciprocal().t().unsqueeze(-1)).clamp_(-LIMIT, LIMIT)
        return x

    def _encode_columns(self, x: torch.Tensor, segment: Packed, rows: int) -> tuple[torch.Tensor, Packed]:
        return super()._encode_columns(self._equalise(x, segment, rows), segment, rows)

    def _decode_columns(self, numbers: torch.Tensor, packed: Packed, rows: int) -> torch.Tensor:
        y = super()._decode_columns(numbers, packed, rows)
        if self.role == "key":
            wide = y.view(self.dim, rows, -1)
            wide.mul_(packed["spread"].float().t().unsqueeze(-1)).add_(packed["mean"].float().t().unsqueeze(-1))
        return y

    def _quantize(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = 2 ** (self.nbits - 1)
        codes = z.mul_(1 / STEP[self.nbits]).floor_().clamp_(-half, half - 1)
        centred = codes + 0.5
        return codes.add_(half).to(torch.uint8), centred.mul_(centred)

    def _error_bound(self, z: torch.Tensor) -> torch.Tensor:
        step = STEP[self.nbits]
        return z.abs_().sub_(step * (2 ** (self.nbits - 1) - 0.5)).clamp_(min=step / 2)

    def tolerance(self, x: torch.Tensor, segment: Packed) -> torch.Tensor:
        """The codes' error in the rotated basis times the largest spread."""
        if self.role == "value":
            return super().tolerance(x, segment)
        tokens = x.shape[-2]
        flat = {k: v.reshape(-1, self.dim).float() for k, v in segment.items()}
        columns = self._columns(x.reshape(-1, tokens, self.dim))
        rows = flat["mean"].shape[0]
        length = torch.linalg.vector_norm(columns.double(), dim=0).float().view(rows, tokens)
        length += torch.linalg.vector_norm(flat["mean"].double(), dim=-1, keepdim=True).float()
        equalised = self._equalise(columns, flat, rows)
        clipped = (equalised.abs().amax(0) >= LIMIT).view(rows, tokens)
        bound = self._bound_columns(equalised).view(rows, tokens) * flat["spread"].amax(-1, keepdim=True)
        bound += length * torch.where(clipped, 1.0, 1e-6) + TINY * self.dim
        return bound.view(x.shape[:-1])

    def scores(self, q: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`q @ decode(packed).mT` in the rotated basis: the spread goes to the query, the mean is one number."""
        if self.role == "value":
            return super().scores(q, packed)
        flat = {k: v.flatten(0, 1) for k, v in packed.items()}
        q = q.float().flatten(0, 1)
        equalised = (q.unsqueeze(1) * flat["spread"].float().unsqueeze(2)) @ rotation_matrix(self.dim, q.device)
        out = self._key_dot(equalised, flat)
        wide = out.unflatten(-1, flat["scale"].shape[1:])  # [n, M, S, T]
        wide.mul_(flat["scale"].float().unsqueeze(1)).add_((q @ flat["mean"].float().mT).unsqueeze(-1))
        return out.unflatten(0, packed["codes"].shape[:2])


def _rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square over the last axis of `[n, D]`: `[n, 1]`."""
    return tree_sum(x * x, 1).mul_(1 / x.shape[1]).sqrt_()[:, None]


def _relative_std(query_ms: torch.Tensor) -> torch.Tensor:
    """Mean squares of queries `[n, D]` -> their roots, relative to all channels and not below the floor."""
    y = clean_(query_ms.to(torch.float32, copy=True)).clamp_(min=0)
    y.mul_(y.amax(1, keepdim=True).clamp_(min=TINY).reciprocal_())
    total = (tree_sum(y, 1)[:, None]).mul_(1 / y.shape[1])
    return torch.where(total > 0, y / total.clamp(min=TINY), 1.0).sqrt_().clamp_(min=_FLOOR)
