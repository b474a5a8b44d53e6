"""Multi-scale codes: magnitude, direction, and the direction's Haar components along the tokens, bits by energy.

Vectors are taken to the equalised rotated basis of `eqrot`. Each token keeps its magnitude (the scale); the directions
of 8 tokens in a row are split into their mean and differences at three scales. A segment's own energies decide how many
bits each of the 8 components gets: reverse water-filling over whole bits, with the same sum for every segment, so bytes
are fixed and known.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch

from ..ops.hadamard import inverse_rotate, rotate
from ..ops.numeric import TINY, clean_, tree_sum
from ..ops.packing import pack, padded, plane_sizes, unpack
from .base import Field, Packed, Role
from .equalised import EqualisedCodec

RUN = 8  # tokens that are decomposed together
MOST = 8  # bits of a component
#: step of the uniform quantizer with the least square error for a unit normal, by bits
STEP = {1: 1.596, 2: 0.995, 3: 0.585, 4: 0.335, 5: 0.188, 6: 0.104, 7: 0.0569, 8: 0.0308}


def haar(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal Haar components of `[..., 8, D]` along the last axis but one: mean, coarse to fine differences."""
    parts: list[torch.Tensor] = []
    while x.shape[-2] > 1:
        pairs = x.unflatten(-2, (-1, 2))
        parts.insert(0, (pairs[..., 0, :] - pairs[..., 1, :]) * math.sqrt(0.5))
        x = (pairs[..., 0, :] + pairs[..., 1, :]) * math.sqrt(0.5)
    return torch.cat([x, *parts], dim=-2)


def inverse_haar(w: torch.Tensor) -> torch.Tensor:
    """Undo `haar`."""
    x, first = w[..., :1, :], 1
    while first < w.shape[-2]:
        difference = w[..., first : 2 * first, :]
        x = torch.stack([x + difference, x - difference], dim=-2).flatten(-3, -2) * math.sqrt(0.5)
        first *= 2
    return x


def share_bits(energy: torch.Tensor, total: int) -> torch.Tensor:
    """Whole bits for components with these energies `[n, 8]`, `total` in sum: greedy reverse water-filling."""
    bits = torch.zeros(energy.shape, dtype=torch.uint8, device=energy.device)
    left = energy.double().clamp(min=1e-12)
    for _ in range(total):
        best = left.masked_fill(bits >= MOST, -1.0).argmax(-1, keepdim=True)
        bits.scatter_add_(-1, best, torch.ones_like(best, dtype=torch.uint8))
        left.scatter_(-1, best, left.gather(-1, best) / 4)
    return bits


class MultiScaleCodec(EqualisedCodec):
    """Haar components of the directions of 8 tokens, over the equalised rotation."""

    family = "haar"
    supported_bits = (4, 3, 2)
    token_wise = False

    def __init__(self, nbits: int, role: Role, dim: int, page_size: int = 64, group_size: int = 64):
        super().__init__(nbits, role, dim, page_size, group_size)
        self._width = padded(dim) * nbits  # bytes of 8 tokens, however their bits are shared
        self.wants_queries = role == "key"

    @cached_property
    def fields(self) -> dict[str, Field]:  # type: ignore[override]
        """Codes of 8 tokens and a magnitude a token; bits and spread of the components, mean and spread of channels."""
        fields = {"codes": Field((self._width,), torch.uint8, RUN), "scale": Field((), torch.bfloat16)}
        fields |= {"bits": Field((RUN,), torch.uint8, None), "energy": Field((RUN,), torch.bfloat16, None)}
        return fields | self.equalising_fields

    def begin_segment(
        self, x: torch.Tensor, query_ms: torch.Tensor | None = None, history: Packed | None = None
    ) -> Packed:
        """Mean and spread of the channels, then energies and bits of the components of what is there."""
        segment = super().begin_segment(x, query_ms, history)
        whole = x.shape[-2] // RUN * RUN
        if whole == 0:
            energy = torch.ones(*x.shape[:-2], RUN, device=x.device)
        else:
            directions, _ = self._directions(x[..., :whole, :], segment)
            squares = haar(directions.unflatten(-2, (-1, RUN))).square()
            energy = tree_sum(tree_sum(squares, -1), -2) / (squares.shape[-1] * squares.shape[-3])
        # Zeros have no direction and no energy: any bits will do.
        energy = torch.where(energy.sum(-1, keepdim=True) > 0, energy, 1.0).clamp(min=1e-6)
        bits = share_bits(energy.reshape(-1, RUN), RUN * self.nbits).view(energy.shape)
        return {**segment, "bits": bits, "energy": energy.sqrt().to(torch.bfloat16)}

    def _directions(self, x: torch.Tensor, segment: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated, equalised vectors of norm sqrt(D), and the norms they had."""
        y = clean_(x.to(torch.float32, copy=True))
        if self.role == "key":
            y = (y - segment["mean"].float().unsqueeze(-2)) / segment["spread"].float().unsqueeze(-2)
        size = y.abs().amax(-1, keepdim=True).clamp_(min=TINY)
        y = y / size
        norm = tree_sum(y * y, -1).sqrt_().unsqueeze(-1)
        return rotate(y) * (math.sqrt(self.dim) / norm.clamp(min=TINY)), (norm * size)[..., 0]

    def encode(self, x: torch.Tensor, segment: Packed, queries: torch.Tensor | None = None) -> Packed:
        """Pack `x` `[..., T, D]`."""
        lead, tokens = x.shape[:-2], x.shape[-2]
        if x.shape[-1] != self.dim or tokens % self.page_size or not tokens:
            raise ValueError(
                f"x: expected shape [..., T, {self.dim}] with T a multiple of page_size={self.page_size}, "
                f"got {tuple(x.shape)}"
            )
        directions, norm = self._directions(x, segment)
        components = haar(directions.unflatten(-2, (-1, RUN))).reshape(-1, tokens // RUN, RUN, self.dim)
        components = components / segment["energy"].float().view(-1, 1, RUN, 1)
        codes = torch.empty(*components.shape[:2], self._width, dtype=torch.uint8, device=x.device)
        for bits, rows in self._alike(segment):
            planes: list[torch.Tensor] = []
            for k, b in enumerate(bits):
                if b:
                    half = 2 ** (b - 1)
                    own = components[rows, :, k].div(STEP[b]).floor_().clamp_(-half, half - 1).add_(half)
                    planes += pack(own.to(torch.uint8), b)
            codes[rows] = torch.cat(planes, dim=-1)
        packed = {"codes": codes.view(*lead, *codes.shape[1:]), "scale": norm.new_ones(norm.shape)}
        read = self._rotated({**packed, "bits": segment["bits"], "energy": segment["energy"]})
        length = tree_sum(read * read, -1).sqrt_()
        packed["scale"] = torch.where(length > TINY, norm / length.clamp(min=TINY), 0.0).to(torch.bfloat16)
        return packed

    def _alike(self, segment: Packed) -> list[tuple[list[int], torch.Tensor]]:
        """Every share of bits, with the rows that have it."""
        shares, which = segment["bits"].reshape(-1, RUN).unique(dim=0, return_inverse=True)
        return [(share.tolist(), (which == i).nonzero()[:, 0]) for i, share in enumerate(shares)]

    def _rotated(self, packed: Packed) -> torch.Tensor:
        """Directions as they are read, in the rotated basis, times their scale: `[..., T, D]` float32."""
        codes = packed["codes"]
        flat = codes.reshape(-1, *codes.shape[-2:])
        components = torch.zeros(*flat.shape[:2], RUN, self.dim, device=codes.device)
        for bits, rows in self._alike(packed):
            own, first = flat[rows], 0
            for k, b in enumerate(bits):
                if b:
                    sizes = plane_sizes(self.dim, b)
                    planes = own[..., first : first + sum(sizes)].split(sizes, dim=-1)
                    number = unpack(planes, b, self.dim).float().sub_(2 ** (b - 1) - 0.5)
                    components[rows, :, k] = number.mul_(STEP[b])
                    first += sum(sizes)
        components *= packed["energy"].float().reshape(-1, 1, RUN, 1)
        y = inverse_haar(components).flatten(1, 2).view(*codes.shape[:-2], -1, self.dim)
        return y * packed["scale"].float().unsqueeze(-1)

    def decode(self, packed: Packed) -> torch.Tensor:
        """Read back `[..., T, D]`."""
        y = inverse_rotate(self._rotated(packed))
        if self.role == "key":
            y = y * packed["spread"].float().unsqueeze(-2) + packed["mean"].float().unsqueeze(-2)
        return y

    def tolerance(self, x: torch.Tensor, segment: Packed) -> torch.Tensor:
        """The components' errors as far as each reaches into a token, twice, since the norm is restored."""
        tokens = x.shape[-2]
        directions, norm = self._directions(x, segment)
        components = haar(directions.unflatten(-2, (-1, RUN))) / segment["energy"].float()[..., None, :, None]
        bits = segment["bits"].long()[..., None, :, None]
        step = torch.tensor([0.0, *STEP.values()], device=x.device)[bits]
        reach = step * (2.0 ** (bits - 1) - 0.5).clamp(min=0)
        error = (components.abs() - reach).clamp(min=step / 2) * segment["energy"].float()[..., None, :, None]
        lengths = torch.linalg.vector_norm(error.double(), dim=-1)  # [..., T / 8, 8]
        into = inverse_haar(torch.eye(RUN, dtype=torch.float64, device=x.device).unsqueeze(-1))[..., 0].abs()
        relative = ((lengths @ into).flatten(-2) * (2 / math.sqrt(self.dim))).clamp(max=2.0).float()
        bound = norm.view(*x.shape[:-2], tokens) * (relative * 1.01 + 2**-7)
        if self.role == "value":
            return bound + TINY * self.dim
        mean, spread = segment["mean"].float(), segment["spread"].float()
        size = torch.linalg.vector_norm(clean_(x.to(torch.float32, copy=True)).double(), dim=-1).float()
        size += torch.linalg.vector_norm(mean.double(), dim=-1, keepdim=True).float()
        return bound * spread.amax(-1, keepdim=True) + size * 1e-6 + TINY * self.dim
