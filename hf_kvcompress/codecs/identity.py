"""No compression: tokens as they are, in pages."""

from __future__ import annotations

from functools import cached_property

import torch

from ..ops.numeric import block_numel, blocks
from .base import Codec, Field, Packed, Role

_BLOCK = 1 << 18


class IdentityCodec(Codec):
    """Stores numbers in `dtype`; exact when that is the model's."""

    family = "identity"
    supported_bits = ()

    def __init__(self, nbits: int, role: Role, dim: int, page_size: int = 64, group_size: int = 64):
        super().__init__(nbits, role, dim, page_size, group_size)
        self.dtype = torch.float32

    @property
    def name(self) -> str:
        """The family has no bits."""
        return self.family

    @cached_property
    def fields(self) -> dict[str, Field]:  # type: ignore[override]
        """The numbers."""
        return {"codes": Field((self.dim,), self.dtype)}

    def encode(self, x: torch.Tensor, segment: Packed, queries: torch.Tensor | None = None) -> Packed:
        """Copy `x` `[..., T, D]`."""
        return {"codes": x.to(self.dtype, copy=True, memory_format=torch.contiguous_format)}

    def decode(self, packed: Packed) -> torch.Tensor:
        """The numbers in float32."""
        return packed["codes"].float()

    def tolerance(self, x: torch.Tensor, segment: Packed) -> torch.Tensor:
        """Only what `dtype` cannot hold."""
        return (x.float() - x.to(self.dtype).float()).norm(dim=-1)

    def scores(self, q: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`q @ decode(packed).mT`, converted block by block."""
        codes = packed["codes"].flatten(0, 1)
        n, segments, tokens, _ = codes.shape
        q = q.flatten(0, 1).to(self._product_dtype())
        out = torch.empty(n, q.shape[1], segments * tokens, device=q.device)
        for start, end, first, last in blocks(n, segments, tokens * self.dim, block_numel(q.device, _BLOCK)):
            keys = codes[start:end, first:last].flatten(1, 2).to(q.dtype)
            out[start:end, :, first * tokens : last * tokens] = (keys @ q[start:end].mT).mT  # faster in bfloat16
        return out.unflatten(0, packed["codes"].shape[:2])

    def mix(self, p: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`p @ decode(packed)`, converted block by block."""
        codes = packed["codes"].flatten(0, 1)
        n, segments, tokens, _ = codes.shape
        p = p.flatten(0, 1).to(self._product_dtype())
        out = torch.zeros(n, p.shape[1], self.dim, device=p.device)
        for start, end, first, last in blocks(n, segments, tokens * self.dim, block_numel(p.device, _BLOCK)):
            values = codes[start:end, first:last].flatten(1, 2).to(p.dtype)
            out[start:end].add_(p[start:end, :, first * tokens : last * tokens] @ values)
        return out.unflatten(0, packed["codes"].shape[:2])

    def _product_dtype(self) -> torch.dtype:
        return self.dtype if self.dtype == self.compute_dtype == torch.bfloat16 else torch.float32
