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

from ..ops.feedback import feedback_matrix, round_with_feedback
from ..ops.hadamard import rotation_matrix
from ..ops.numeric import LIMIT, TINY, tree_sum
from .base import Field, Packed, Role
from .equalised import EqualisedCodec
from .rotated import RotatedCodec

#: step of the uniform quantizer with the least square error for a unit normal
STEP = {2: 0.995, 3: 0.585, 4: 0.335}
#: values at few bits: a wider step, and a scale of norm * cos^power instead of norm (-1 is unbiased); chosen by KL on
#: novels and news. Keys lose by either.
VALUE_STEP = {2: 0.995 * 1.15, 3: 0.585 * 1.1, 4: 0.335}
VALUE_POWER = {2: -1.0, 3: -0.5, 4: 0.0}
#: keys of few bits, sealed many at once, are rounded with error feedback: step, part of the queries' moment that is
#: shrunk to its diagonal, damping
FEEDBACK_STEP = {2: 0.995 * 1.3, 3: 0.585 * 1.15}
FEEDBACK_TOKENS = 32
FEEDBACK_SHRINK = 0.3
FEEDBACK_DAMPING = 0.01


class EqRotCodec(EqualisedCodec, RotatedCodec):
    """Rotated uniform codes; the keys' channels are equalised per segment."""

    family = "eqrot"
    supported_bits = (4, 3, 2)

    def __init__(self, nbits: int, role: Role, dim: int, page_size: int = 64, group_size: int = 64):
        super().__init__(nbits, role, dim, page_size, group_size)
        self.wants_queries = role == "key"
        self.wants_query_moment = role == "key" and nbits in FEEDBACK_STEP

    @cached_property
    def fields(self) -> dict[str, Field]:  # type: ignore[override]
        """Codes and one scale a token; for keys mean and spread of every channel and segment."""
        return {**self.code_fields, "scale": Field((), torch.bfloat16), **self.equalising_fields}

    def _equalise(self, x: torch.Tensor, segment: Packed, rows: int) -> torch.Tensor:
        """Columns of keys without mean and spread, in place."""
        if self.role == "key":
            y = x.view(self.dim, rows, -1)
            y.sub_(segment["mean"].float().t().unsqueeze(-1))
            y.mul_(segment["spread"].float().reciprocal().t().unsqueeze(-1)).clamp_(-LIMIT, LIMIT)
        return x

    def encode(self, x: torch.Tensor, segment: Packed, queries: torch.Tensor | None = None) -> Packed:
        """Pack `x` `[..., T, D]`; given the queries' second moment, many keys of few bits are rounded with feedback."""
        if queries is None or self.nbits not in FEEDBACK_STEP or x.shape[-2] < FEEDBACK_TOKENS:
            return super().encode(x, segment)
        rows = [
            self._encode_with_feedback(own, {name: t[row] for name, t in segment.items()}, queries[row])
            for row, own in enumerate(x)  # a row by itself: products of other shapes could round otherwise
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _encode_with_feedback(self, x: torch.Tensor, segment: Packed, queries: torch.Tensor) -> Packed:
        """Pack one row's keys `[H, 1, T, D]`; segment fields `[H, 1, D]`, queries `[H, D, D]`."""
        heads = x.shape[0]
        spread, rotation = segment["spread"].float(), rotation_matrix(self.dim, x.device)
        spread = spread / spread.amax(-1, keepdim=True)  # only the channels' proportions matter here
        diagonal = torch.diag_embed(queries.diagonal(dim1=-2, dim2=-1))
        moment = torch.lerp(queries, diagonal, FEEDBACK_SHRINK) * spread * spread.mT
        damped, weights = feedback_matrix(rotation.mT @ moment @ rotation, FEEDBACK_DAMPING)
        columns = self._equalise(self._columns(x.flatten(1, 2)), {k: v[:, 0] for k, v in segment.items()}, heads)
        z, norm = self._normalise(columns)
        z = z.view(self.dim, heads, -1).transpose(0, 1).contiguous()  # [H, D, T]
        step = FEEDBACK_STEP[self.nbits]
        numbers = round_with_feedback(z.clone(), weights, step, self.nbits)
        # The scale keeps the norm that queries see, not the plain one: feedback trades one against the other.
        kept = ((damped @ z) * z).sum(1) / ((damped @ numbers) * numbers).sum(1).clamp(min=TINY)
        scale = norm.view(heads, -1) * kept.sqrt() / self.dim**0.5
        half = 2 ** (self.nbits - 1)
        codes = (numbers - 0.5 + half).to(torch.uint8).transpose(0, 1).reshape(self.dim, -1)
        codes ^= half
        packed = {name: t.unsqueeze(1) for name, t in self._pack_columns(codes, heads).items()}
        return {**packed, "scale": scale.to(torch.bfloat16).unsqueeze(1)}

    def _encode_columns(self, x: torch.Tensor, segment: Packed, rows: int) -> tuple[torch.Tensor, Packed]:
        if self.role == "key":
            return super()._encode_columns(self._equalise(x, segment, rows), segment, rows)
        power = self._power
        if power == 0:
            return super()._encode_columns(x, segment, rows)
        z, norm = self._normalise(x)
        codes, squares = self._quantize(z.clone())
        length = tree_sum(squares, 0).sqrt_()
        numbers = codes.float().sub_(2 ** (self.nbits - 1) - 0.5)
        cosine = tree_sum(numbers.mul_(z), 0).div_(length).mul_(self.dim**-0.5).clamp_(0.5, 1.0)
        scale = norm / length * cosine.pow_(power)
        return codes, {"scale": scale.to(torch.bfloat16).view(rows, -1)}

    def _decode_columns(self, numbers: torch.Tensor, packed: Packed, rows: int) -> torch.Tensor:
        y = super()._decode_columns(numbers, packed, rows)
        if self.role == "key":
            wide = y.view(self.dim, rows, -1)
            wide.mul_(packed["spread"].float().t().unsqueeze(-1)).add_(packed["mean"].float().t().unsqueeze(-1))
        return y

    @property
    def _power(self) -> float:  # type: ignore[override]
        return 0.0 if self.role == "key" else VALUE_POWER[self.nbits]

    @property
    def _step(self) -> float:  # type: ignore[override]
        return (STEP if self.role == "key" else VALUE_STEP)[self.nbits]

    def _quantize(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = 2 ** (self.nbits - 1)
        codes = z.mul_(1 / self._step).floor_().clamp_(-half, half - 1)
        centred = codes + 0.5
        return codes.add_(half).to(torch.uint8), centred.mul_(centred)

    def _error_bound(self, z: torch.Tensor) -> torch.Tensor:
        step = self._step
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
