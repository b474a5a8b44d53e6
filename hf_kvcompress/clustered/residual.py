"""What is left of a page once a similar span is taken away: few-bit codes, in a basis where all channels count alike.

0 bits      nothing: the span stands for the page
1, 2, 3     uniform codes with the step that suits a unit normal; scales of a quarter octave, 4 bits a token, below the
            page's largest one, so that 2 bits still take half of what a 4-bit token codec does
4, 8, 12    `ops.delta`: codes by each token's largest number, and a gain
"""

from __future__ import annotations

import torch

from ..codecs.base import Codec, Packed
from ..ops.delta import BITS as DELTA_BITS
from ..ops.delta import Delta, decode_delta, encode_delta
from ..ops.hadamard import inverse_rotate, rotate
from ..ops.numeric import TINY
from ..ops.packing import pack, padded, unpack

BITS = (0, 1, 2, 3, *DELTA_BITS)
MEMBER_BYTES = 12  # of a page: two entries, an offset, a shift, a row of the statistics
_STEP = {1: 1.596, 2: 0.995, 3: 0.585}
_NAMES = ("codes", "codes_low")
_PER_OCTAVE = 4


def residual_bytes(nbits: int, tokens: int, dim: int) -> int:
    """Bytes of one page's residual."""
    if nbits == 0:
        return 0
    scales = 2 * tokens + 2 if nbits in DELTA_BITS else padded(tokens) // 2 + 2
    return tokens * padded(dim) * nbits // 8 + scales


def plain_bytes(codec: Codec, page: int) -> float:
    """Bytes of a page of `page` tokens in its codec, statistics of segments not counted: they are there anyway."""
    return page * sum(f.bits_per_token(1) for f in codec.fields.values() if f.tokens is not None) / 8


def member_bytes(codec: Codec, page: int, nbits: int) -> int:
    """Bytes of a page that is coded by another, all that says how included."""
    return MEMBER_BYTES + residual_bytes(nbits, page, codec.dim)


def encode_residual(y: torch.Tensor, base: torch.Tensor, nbits: int) -> Packed:
    """Code pages `y` against `base`, both `[M, T, D]` float32; each tensor has an entry a page."""
    if nbits == 0:
        return {}
    if nbits in DELTA_BITS:
        own = torch.arange(len(y), device=y.device)
        delta = encode_delta(y, base, own, own, nbits)
        fields = {"codes": delta.codes, "codes_low": delta.low, "scale": delta.scale, "gain": delta.gain}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}
    left = y - base
    size = (left.square().mean(-1)).sqrt()  # [M, T]
    top = size.amax(-1).clamp_(min=TINY).to(torch.bfloat16)
    steps = (top.float()[:, None] / size.clamp(min=TINY)).log2_().mul_(_PER_OCTAVE).round_().clamp_(0, 15)
    half = 2 ** (nbits - 1)
    codes = left.div_((_scale(top, steps) * _STEP[nbits])[..., None]).floor_().clamp_(-half, half - 1).add_(half)
    planes = dict(zip(_NAMES, pack(codes.to(torch.uint8), nbits), strict=False))
    return {**planes, "scale": pack(steps.to(torch.uint8), 4)[0], "top": top}


def decode_residual(packed: Packed, base: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pages `[M, T, D]` float32 again, given the same `base`."""
    if nbits == 0:
        return base
    if nbits in DELTA_BITS:
        delta = Delta(nbits, packed["codes"], packed.get("codes_low"), packed["scale"], packed["gain"])
        return decode_delta(delta, base, torch.arange(len(base), device=base.device))
    tokens, dim = base.shape[1:]
    planes = tuple(packed[name] for name in _NAMES if name in packed)
    numbers = unpack(planes, nbits, dim).float().sub_(2 ** (nbits - 1) - 0.5)
    scale = _scale(packed["top"], unpack((packed["scale"],), 4, tokens).float()) * _STEP[nbits]
    return base + numbers.mul_(scale[..., None])


def _scale(top: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    return top.float()[:, None] * torch.exp2(steps * (-1 / _PER_OCTAVE))


def into_basis(x: torch.Tensor, spread: torch.Tensor | None) -> torch.Tensor:
    """Pages `[m, n, D]` in the basis that residuals are coded in."""
    return rotate(x if spread is None else x / spread)


def encode_page(
    x: torch.Tensor, span: torch.Tensor, spread: torch.Tensor | None, nbits: int
) -> tuple[Packed, torch.Tensor]:
    """Code pages against spans that stand where the pages do, both `[m, n, D]`; also what they will be read as."""
    if nbits == 0:
        return {}, span
    base = into_basis(span, spread)
    packed = encode_residual(into_basis(x, spread), base, nbits)
    return packed, decode_page(packed, base, spread, nbits)


def decode_page(packed: Packed, base: torch.Tensor, spread: torch.Tensor | None, nbits: int) -> torch.Tensor:
    """Pages `[m, n, D]`, from their spans in the basis of the residuals."""
    x = inverse_rotate(decode_residual(packed, base, nbits))
    return x if spread is None else x * spread
