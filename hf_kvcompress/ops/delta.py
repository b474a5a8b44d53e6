"""Pages as quantized differences to other pages: `x = gain * base + scale * code`.

One gain a page, fitted by least squares and rounded before the difference is taken, and one scale a token. Measured on
pages of 32 tokens of Gemma 3 270M against the most similar earlier page (keys before RoPE and values, mean removed), in
bits a number at equal error, metadata included: no gain costs 0.25-0.44 more, one gain a channel 0.34-0.48, one scale a
page 0.5-1.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import kernels
from .library import register
from .numeric import TINY, bfloat16_ceil, clean_, tree_sum
from .packing import pack, padded, unpack
from .quantize import DTYPES

BITS = (4, 8, 12)
LARGEST_GAIN = 8.0
_SHARED = 40_000  # bytes


@dataclass(frozen=True)
class Delta:
    """Members of clusters: two's complement codes packed along the channels, `[M, T, bytes]`.

    `low` holds the low 4 of 12 bits. `scale` is `[M, T]` bfloat16, `gain` `[M]` bfloat16.
    """

    nbits: int
    codes: torch.Tensor
    low: torch.Tensor | None
    scale: torch.Tensor
    gain: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.low, self.scale, self.gain) if t is not None)


@register(
    "Tensor pages, Tensor bases, Tensor members, Tensor base_of, Tensor(a!) codes, Tensor(b!)? low, Tensor(c!) scale, "
    "Tensor(d!) gain, int nbits"
)
def encode_delta_into(
    pages: torch.Tensor,
    bases: torch.Tensor,
    members: torch.Tensor,
    base_of: torch.Tensor,
    codes: torch.Tensor,
    low: torch.Tensor | None,
    scale: torch.Tensor,
    gain: torch.Tensor,
    nbits: int,
) -> None:
    """`encode_delta` by the kernel, into the fields of a `Delta`."""
    tokens, dim = pages.shape[1:]
    if scale.numel() == 0:
        return
    warps = max(min((_SHARED // 16 - tokens) // dim, 8), 1)
    kernel = kernels.load("page_delta.cu", "delta_encode", NBITS=nbits)
    args: list[kernels.Argument] = [
        pages.contiguous(),
        bases.contiguous(),
        members.contiguous(),
        base_of.contiguous(),
        codes,
        low,
        scale,
        gain,
    ]
    args += [tokens, dim, DTYPES[pages.dtype]]
    kernel((len(members),), 32 * warps, args, shared=16 * (warps * dim + tokens), like=pages)


@register(
    "Tensor bases, Tensor base_of, Tensor codes, Tensor? low, Tensor scale, Tensor gain, Tensor(a!) out, int nbits"
)
def decode_delta_into(
    bases: torch.Tensor,
    base_of: torch.Tensor,
    codes: torch.Tensor,
    low: torch.Tensor | None,
    scale: torch.Tensor,
    gain: torch.Tensor,
    out: torch.Tensor,
    nbits: int,
) -> None:
    """`decode_delta` by the kernel, into `out` `[M, T, D]`."""
    members, tokens, dim = out.shape
    if out.numel() == 0:
        return
    kernel = kernels.load("page_delta.cu", "delta_decode", NBITS=nbits)
    args: list[kernels.Argument] = [bases.contiguous(), base_of.contiguous(), codes, low, scale, gain, out, tokens, dim]
    kernel((members,), 256, [*args, DTYPES[bases.dtype], DTYPES[out.dtype]], like=bases)


def encode_delta(
    pages: torch.Tensor, bases: torch.Tensor, members: torch.Tensor, base_of: torch.Tensor, nbits: int
) -> Delta:
    """Code the pages `members` `[M]` int64 of `pages` `[P, T, D]` against the pages `base_of` `[M]` of `bases`.

    bases: `[Q, T, D]`, as they will be when the delta is read. Non-finite numbers count as 0.
    """
    _check(pages, bases, members, base_of, nbits)
    tokens, dim = pages.shape[1:]
    top = 2 ** (nbits - 1) - 1
    if kernels.serves(pages):
        delta = _empty(pages, len(members), nbits)
        encode_delta_into(pages, bases, members, base_of, delta.codes, delta.low, delta.scale, delta.gain, nbits)
        return delta
    x, base = (clean_(pool[which].to(torch.float32, copy=True)) for pool, which in ((pages, members), (bases, base_of)))
    wide = base.double()
    product, square = (tree_sum(tree_sum(y * wide, 2), 1) for y in (x.double(), wide))
    gain = torch.where(square > 0, product / square, 0.0).clamp(-LARGEST_GAIN, LARGEST_GAIN).float().bfloat16()
    difference = x.sub_(base.mul_(gain.float()[:, None, None]))
    scale = bfloat16_ceil(difference.abs().amax(2).mul_(1 / top).clamp_(min=TINY))
    steps = difference.mul_(scale.float().reciprocal_()[..., None]).round_().clamp_(-top, top).to(torch.int32)
    if nbits == 12:
        (codes,), (low,) = pack((steps >> 4).to(torch.int8).view(torch.uint8), 8), pack((steps & 15).byte(), 4)
        return Delta(nbits, codes.contiguous(), low, scale, gain)
    (codes,) = pack((steps & (2**nbits - 1)).byte(), nbits)
    return Delta(nbits, codes, None, scale, gain)


def decode_delta(
    delta: Delta, bases: torch.Tensor, base_of: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Read members back, `[M, T, D]`."""
    (members, tokens), dim = delta.scale.shape, bases.shape[2]
    if kernels.serves(bases):
        out = torch.empty(members, tokens, dim, dtype=dtype, device=bases.device)
        decode_delta_into(bases, base_of, delta.codes, delta.low, delta.scale, delta.gain, out, delta.nbits)
        return out
    if delta.low is not None:
        high = delta.codes[..., :dim].view(torch.int8).float()
        numbers = high.mul_(16).add_(unpack((delta.low,), 4, dim))
    else:
        half = 2 ** (delta.nbits - 1)
        numbers = (unpack((delta.codes,), delta.nbits, dim) ^ half).float().sub_(half)
    base = clean_(bases[base_of].to(torch.float32, copy=True)).mul_(delta.gain.float()[:, None, None])
    return base.add_(numbers.mul_(delta.scale.float()[..., None])).to(dtype)


def delta_tolerance(delta: Delta, pages: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Bound on the L2 norm of `decode - x` over D in float32, `[M, T]`: half a step in every number, and rounding."""
    x = clean_(pages[members].to(torch.float32, copy=True))
    half_steps = delta.scale.float() * (0.501 * x.shape[2] ** 0.5)
    reach = 2 ** (delta.nbits - 1) * delta.scale.float()  # of the difference; gain * base is at most that and x
    size = torch.linalg.vector_norm(x.double(), dim=2).float() + reach * x.shape[2] ** 0.5
    return half_steps + size * 1e-6


def _empty(pages: torch.Tensor, count: int, nbits: int) -> Delta:
    tokens, dim = pages.shape[1:]

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(count, *shape, dtype=dtype, device=pages.device)

    codes = empty(tokens, padded(dim) * min(nbits, 8) // 8)
    low = empty(tokens, padded(dim) // 2) if nbits == 12 else None
    return Delta(nbits, codes, low, empty(tokens, dtype=torch.bfloat16), empty(dtype=torch.bfloat16))


def _check(pages: torch.Tensor, bases: torch.Tensor, members: torch.Tensor, base_of: torch.Tensor, nbits: int) -> None:
    if nbits not in BITS:
        raise ValueError(f"nbits: expected one of {BITS}, got {nbits!r}")
    if pages.dim() != 3 or pages.dtype not in DTYPES:
        raise ValueError(
            f"pages: expected [P, T, D] float32, float16 or bfloat16, got {tuple(pages.shape)} {pages.dtype}"
        )
    if bases.dim() != 3 or bases.shape[1:] != pages.shape[1:] or bases.dtype != pages.dtype:
        expected = f"[Q, {pages.shape[1]}, {pages.shape[2]}] {pages.dtype}"
        raise ValueError(f"bases: expected {expected}, got {list(bases.shape)} {bases.dtype}")
    for name, index in {"members": members, "base_of": base_of}.items():
        if index.shape != members.shape or index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(f"{name}: expected [M] int64 as members, got {list(index.shape)} {index.dtype}")
