"""Integers per channel: every channel of `group_size` tokens has a scale and a centre (the keys of KIVI)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch

from ..ops import native, quantize
from ..ops.int8mm import Scratch
from ..ops.numeric import TINY, bfloat16_ceil, block_numel, blocks
from .base import Field, Packed, Role
from .integer import IntegerCodec

_BLOCK = 1 << 18


class ChannelIntCodec(IntegerCodec):
    """Round to nearest with groups along the tokens of a page, so tokens are packed together."""

    family = "channel"
    supported_bits = (8, 4, 3, 2)
    token_wise = False

    def __init__(self, nbits: int, role: Role, dim: int, page_size: int = 64, group_size: int = 64):
        super().__init__(nbits, role, dim, page_size, group_size)
        if page_size % group_size:
            raise ValueError(
                f"group_size: expected a divisor of page_size={page_size} for {self.name}, got {group_size!r}"
            )

    @cached_property
    def fields(self) -> dict[str, Field]:  # type: ignore[override]
        """Codes; a scale and a centre for every channel of a group of tokens."""
        meta = Field((self.dim,), torch.bfloat16, self.group_size)
        return {**self.code_fields, "scale": meta, "centre": meta}

    def _encode_columns(self, x: torch.Tensor, segment: Packed, rows: int) -> tuple[torch.Tensor, Packed]:
        grouped = x.view(self.dim, -1, self.group_size)
        high, low = grouped.amax(-1), grouped.amin(-1)
        top = 2**self.nbits - 1
        centre = ((high + low) * 0.5).to(torch.bfloat16)
        exact = centre.float()
        reach = torch.maximum(high - exact, exact - low)
        scale = bfloat16_ceil(reach.mul_(2 / top).clamp_(min=TINY))
        grouped.sub_(exact.unsqueeze(-1)).mul_(scale.float().reciprocal_().unsqueeze(-1))
        codes = grouped.add_(top / 2).round_().clamp_(0, top).to(torch.uint8).view(self.dim, -1)
        return codes, {
            "scale": scale.view(self.dim, rows, -1).permute(1, 2, 0),
            "centre": centre.view(self.dim, rows, -1).permute(1, 2, 0),
        }

    def _decode_columns(self, numbers: torch.Tensor, packed: Packed, rows: int) -> torch.Tensor:
        grouped = numbers.view(self.dim, rows, -1, self.group_size)
        grouped.mul_(packed["scale"].float().permute(2, 0, 1).unsqueeze(-1))
        grouped.add_(packed["centre"].float().permute(2, 0, 1).unsqueeze(-1))
        return numbers

    @property
    def _tile_width(self) -> int:
        return quantize.tile_width(self.page_size, self.dim, whole=True)

    def _encode_by_kernel(self, x: torch.Tensor, segment: Packed, out: Packed) -> None:
        fields = [out.get(name) for name in ("codes", "codes_low", "scale", "centre")]
        quantize.encode_int(x, *fields, self.nbits, self.role == "value", self.page_size, self.group_size, True)

    def _decode_by_kernel(self, packed: Packed, out: torch.Tensor) -> None:
        fields = [packed.get(name) for name in ("codes", "codes_low", "scale", "centre")]
        quantize.decode_int(*fields, out, self.nbits, self.role == "value", self.page_size, self.group_size, True)

    def tolerance(self, x: torch.Tensor, segment: Packed) -> torch.Tensor:
        """Half a step in every number."""
        rows = x.shape[:-2].numel()
        columns = self._columns(x.reshape(rows, -1, self.dim))
        size = columns.abs().view(self.dim, rows, -1, self.group_size).amax((0, 3))
        _, meta = self._encode_columns(columns, segment, rows)
        steps = torch.linalg.vector_norm(meta["scale"].double(), dim=-1).float()  # [rows, T / g]
        bound = steps * 0.501 + size * (2e-6 * self.dim**0.5)
        return bound.repeat_interleave(self.group_size, -1).view(x.shape[:-1])

    def scores(self, q: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`q @ decode(packed).mT`: scale and centre of a group go to the query."""
        if self.role == "value":
            return super().scores(q, packed)
        flat = {k: v.flatten(0, 1) for k, v in packed.items()}
        q = q.float().flatten(0, 1)
        scale, centre = flat["scale"].flatten(1, 2).float(), flat["centre"].flatten(1, 2).float()  # [n, U, D]
        out = self._key_dot(q.unsqueeze(1) * scale.unsqueeze(2), flat)
        out.unflatten(-1, (scale.shape[1], -1)).add_((q @ centre.mT).unsqueeze(-1))
        return out.unflatten(0, packed["codes"].shape[:2])

    def mix(self, p: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`p @ decode(packed)`: the products of every page, then its scale and centre."""
        if self.role == "key" or self.group_size != self.page_size:
            return super().mix(p, packed)
        flat = {k: v.flatten(0, 1) for k, v in packed.items()}
        pages = p.float().flatten(0, 1).unflatten(-1, (-1, self.page_size)).transpose(1, 2)  # [n, U, M, page]
        scale, centre = flat["scale"].flatten(1, 2).float(), flat["centre"].flatten(1, 2).float()  # [n, U, D]
        out = pages.sum(-1).transpose(1, 2) @ centre
        if flat["codes"].shape[1] == 1 and native.serves(pages, pages.shape[2]):
            planes = [flat[name].flatten(1, 2) for name in self._names]
            out += native.paged_value_dot(planes, self.nbits, self._table_of_codes, self.offset, pages, scale)
            return out.unflatten(0, packed["codes"].shape[:2])
        operands = [reader.arrange(pages) for reader in self.readers]
        for start, end, first, last, products in self._page_products(operands, flat):
            products.mul_(scale[start:end, first:last].unsqueeze(2))
            out[start:end].add_(products.sum(1))
        return out.unflatten(0, packed["codes"].shape[:2])

    def _page_products(
        self, operands: list[torch.Tensor], flat: Packed
    ) -> Iterator[tuple[int, int, int, int, torch.Tensor]]:
        """Blocks `(row, end, page, end)` and their pages' sums of p * (code + offset), `[rows, pages, M, D]`."""
        planes = [flat[k] for k in self._names]
        n, segments = planes[0].shape[:2]
        in_segment = operands[0].shape[1] // segments
        device = planes[0].device
        scratch = Scratch(device)
        numel = in_segment * self.page_size * self.dim
        for start, end, first, last in blocks(n, segments, numel, block_numel(device, _BLOCK)):
            low, high = first * in_segment, last * in_segment
            total = torch.zeros(end - start, high - low, operands[0].shape[2], self.dim, device=device)
            for index, reader in enumerate(self.readers):
                small = operands[index][start:end, low:high]
                part = [
                    plane[start:end, first:last].transpose(1, 2).reshape((end - start) * self.dim * (high - low), -1)
                    for plane in planes
                ]
                codes = reader.read(part, scratch).view(end - start, self.dim, high - low, self.page_size)
                dense = scratch.take("dense", codes.shape, torch.float32).copy_(codes).permute(0, 2, 3, 1)
                for row in range(end - start):
                    total[row].baddbmm_(small[row], dense[row])
                correction = reader.correct(small)  # [rows, U, M]
                if correction is not None:
                    total.add_(correction.unsqueeze(-1))
            yield start, end, low, high, total
