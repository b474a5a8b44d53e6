"""8-bit floats (e4m3) with one scale a token."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache

import torch

from ..ops import native, quantize
from ..ops.numeric import TINY, bfloat16_ceil, block_numel, blocks, clean_
from .base import Codec, Field, Packed

_LARGEST = 448.0  # of float8_e4m3fn
_BLOCK = 1 << 17
_RUN = 512  # tokens


class Fp8Codec(Codec):
    """A token's largest number becomes 448; the scale is bfloat16, rounded up."""

    family = "fp"
    supported_bits = (8,)

    @cached_property
    def fields(self) -> dict[str, Field]:  # type: ignore[override]
        """Numbers, as bytes since float8 tensors cannot be pickled, and one scale a token."""
        return {"codes": Field((self.dim,), torch.uint8), "scale": Field((), torch.bfloat16)}

    def encode(self, x: torch.Tensor, segment: Packed, queries: torch.Tensor | None = None) -> Packed:
        """Pack `x` `[..., T, D]`."""
        shape = (x.shape[:-2].numel(), *x.shape[-2:])
        codes = torch.empty(shape, dtype=torch.uint8, device=x.device)
        scale = torch.empty(shape[:2], dtype=torch.bfloat16, device=x.device)
        self.encode_into(x, segment, {"codes": codes, "scale": scale})
        return {"codes": codes.view(x.shape), "scale": scale.view(x.shape[:-1])}

    def encode_into(self, x: torch.Tensor, segment: Packed, out: Packed) -> None:
        """Pack `x` `[..., T, D]` into parts of a storage, `[rows, ...]` for all leading axes, the last axis dense."""
        if quantize.serves(x, 1):
            return quantize.encode_fp8(quantize.as_rows(x), out["codes"], out["scale"])
        flat = x.reshape(-1, self.dim)
        codes = torch.empty(flat.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty(flat.shape[0], dtype=torch.bfloat16, device=x.device)
        for start, end, _, _ in blocks(flat.shape[0], 1, self.dim, block_numel(x.device, _BLOCK)):
            y = clean_(flat[start:end].to(torch.float32, copy=True))
            step = bfloat16_ceil(torch.maximum(y.amax(1), y.amin(1).neg_()).mul_(1 / _LARGEST).clamp_(min=TINY))
            codes[start:end] = y.mul_(step.float().reciprocal_().unsqueeze(1)).clamp_(-_LARGEST, _LARGEST)
            scale[start:end] = step
        out["codes"].copy_(codes.view(torch.uint8).view(out["codes"].shape))
        out["scale"].copy_(scale.view(out["scale"].shape))

    def decode(self, packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Read back `[..., T, D]`, rounded to `dtype`."""
        codes = packed["codes"]
        if quantize.serves(codes, 1):
            out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
            rows = out.view(-1, *codes.shape[-2:])
            quantize.decode_fp8(_rows(codes, rows.shape), _rows(packed["scale"], rows.shape[:2]), rows)
            return out
        flat = codes.reshape(-1, self.dim)
        out = torch.empty(flat.shape, device=codes.device)
        for start, end, _, _ in blocks(flat.shape[0], 1, self.dim, block_numel(codes.device, _BLOCK)):
            out[start:end] = widen(flat[start:end])
        out = out.view(codes.shape)
        return out.mul_(packed["scale"].float().mul_(256.0).unsqueeze(-1)).to(dtype)

    def tolerance(self, x: torch.Tensor, segment: Packed) -> torch.Tensor:
        """Half a unit of a 3-bit mantissa, and of the smallest numbers below it; GPUs take subnormal numbers as 0."""
        y = clean_(x.to(torch.float32, copy=True))
        size = y.abs().amax(-1)
        smallest = (size / _LARGEST * (1.01 * 2.0**-10)).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.linalg.vector_norm((y.abs() * (2.0**-4 * 1.001) + smallest.unsqueeze(-1)).double(), dim=-1).float()

    def scores(self, q: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`q @ decode(packed).mT`, the scale applied to the products."""
        codes, scale = _in_runs(packed["codes"]), packed["scale"].flatten(0, 1).flatten(1)
        n, segments, tokens, _ = codes.shape
        q = q.float().flatten(0, 1)
        if native.serves(q, q.shape[1]):
            out = native.key_dot([codes.flatten(1, 2)], native.E4M3, _numbers(), 0.0, q.unsqueeze(1))
            return out.mul_(scale.float().unsqueeze(1)).unflatten(0, packed["codes"].shape[:2])
        out = torch.empty(n, q.shape[1], segments * tokens, device=q.device)
        for start, end, first, last in blocks(n, segments, tokens * self.dim, block_numel(q.device, 2 * _BLOCK)):
            keys = widen(codes[start:end, first:last].flatten(1, 2))
            torch.bmm(q[start:end], keys.mT, out=out[start:end, :, first * tokens : last * tokens])
        return out.mul_(scale.float().mul_(256.0).unsqueeze(1)).unflatten(0, packed["codes"].shape[:2])

    def mix(self, p: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`p @ decode(packed)`, the scale applied to the probabilities."""
        codes, scale = _in_runs(packed["codes"]), packed["scale"].flatten(0, 1).flatten(1)
        n, segments, tokens, _ = codes.shape
        p = p.float().flatten(0, 1) * scale.float().mul_(256.0).unsqueeze(1)
        out = torch.zeros(n, p.shape[1], self.dim, device=p.device)
        for start, end, first, last in blocks(n, segments, tokens * self.dim, block_numel(p.device, _BLOCK)):
            values = widen(codes[start:end, first:last].flatten(1, 2))
            out[start:end].baddbmm_(p[start:end, :, first * tokens : last * tokens], values)
        return out.unflatten(0, packed["codes"].shape[:2])


def _rows(field: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A field with its leading axes as one."""
    field = field.reshape(shape)
    return field if field[0].is_contiguous() else field.contiguous()


def _in_runs(codes: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, T, D]` -> `[B * H, runs, tokens, D]`, runs short enough to be widened one at a time."""
    tokens = codes.flatten(0, 1).flatten(1, 2)
    return tokens.unflatten(1, (-1, math.gcd(tokens.shape[1], _RUN)))


@lru_cache(maxsize=1)
def _numbers() -> torch.Tensor:
    """The number of every code, on the host."""
    return widen(torch.arange(256, dtype=torch.uint8)).mul_(256.0)


def widen(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 numbers / 256 in float32, exactly: torch's own conversion is ten times slower on CPU.

    Sign extended to 16 bits and shifted by 7, a code is the float16 number of the same fields once bit 14 is cleared;
    the exponents' biases differ by 8.
    """
    wide = codes.view(torch.int8).to(torch.int16)
    return wide.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16).float()
