"""Codecs by name. A new codec is one file and one line of `FAMILIES`."""

from __future__ import annotations

import difflib
import re

import torch

from .base import Codec, CodecContext, Role
from .channel_int import ChannelIntCodec
from .eqrot import EqRotCodec
from .fp8 import Fp8Codec
from .identity import IdentityCodec
from .multiscale import MultiScaleCodec
from .token_int import TokenIntCodec
from .transform import TransformCodec
from .turbo import TurboCodec

#: family -> classes for keys and for values
FAMILIES: dict[str, tuple[type[Codec], type[Codec]]] = {
    "identity": (IdentityCodec, IdentityCodec),
    "fp": (Fp8Codec, Fp8Codec),
    "int": (TokenIntCodec, TokenIntCodec),
    "channel": (ChannelIntCodec, ChannelIntCodec),
    "kivi": (ChannelIntCodec, TokenIntCodec),
    "turbo": (TurboCodec, TurboCodec),
    "eqrot": (EqRotCodec, EqRotCodec),
    "haar": (MultiScaleCodec, MultiScaleCodec),
    "pca": (TransformCodec, EqRotCodec),
}


def codec_names() -> list[str]:
    """Every codec's name, most bits of a family first."""
    return [
        f"{f}{n or '':{'g' if n else ''}}" for f, (keys, _) in FAMILIES.items() for n in keys.supported_bits or (0,)
    ]


def parse(name: str, argument: str = "codec") -> tuple[str, float]:
    """Split a codec's name into family and bits (0 for a family without); errors call it `argument`."""
    if not isinstance(name, str):
        raise ValueError(f"{argument}: expected a name such as 'eqrot4', got {name!r}")
    if name in codec_names():
        match = re.fullmatch(r"(.*?)([\d.]*)", name)
        assert match is not None
        return match[1], float(match[2]) if "." in match[2] else int(match[2] or 0)
    near = difflib.get_close_matches(name.lower(), codec_names(), n=1, cutoff=0.0)[0]
    match = re.fullmatch(r"([a-z]+)([\d.]*)", name)
    if match and match[1] in FAMILIES:
        lacking = FAMILIES[match[1]][0].supported_bits
        expected = " or ".join(map(str, lacking)) + " bits" if lacking else "no bits"
        got = f"{match[2]} bits" if match[2] else "no bits"
        raise ValueError(
            f"{argument}: expected {expected} for family {match[1]!r}, got {got} in {name!r}; nearest: {near!r}"
        )
    raise ValueError(f"{argument}: expected one of {', '.join(codec_names())}; got {name!r}; nearest: {near!r}")


def codec_class(name: str, role: Role) -> type[Codec]:
    """The class of a codec for one role."""
    return FAMILIES[parse(name)[0]][role == "value"]


def make_codec(
    name: str,
    role: Role,
    dim: int,
    *,
    page_size: int = 64,
    group_size: int = 64,
    dtype: torch.dtype = torch.float32,
    context: CodecContext | None = None,
) -> Codec:
    """The codec `name` for one role and head size.

    Args:
        name: one of `codec_names()`.
        role: "key" or "value".
        dim: head size.
        page_size: tokens packed at once, a multiple of 8.
        group_size: numbers that share a scale. Along the head size the largest divisor of it not above `group_size` is
            taken; along tokens it must divide `page_size`.
        dtype: the model's; only `identity` stores it.
        context: the layer that it is for; without it codecs that need one can only tell their size.
    """
    family, nbits = parse(name)
    if role not in ("key", "value"):
        raise ValueError(f"role: expected 'key' or 'value', got {role!r}")
    _check_count("dim", dim)
    _check_count("page_size", page_size)
    _check_count("group_size", group_size)
    if page_size % 8:
        raise ValueError(f"page_size: expected a multiple of 8, got {page_size!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating point torch.dtype, got {dtype!r}")
    kind = FAMILIES[family][role == "value"]
    if family == "pca" and role == "value":  # whole bits, no fewer than the keys have, as far as there are so many
        nbits = min((own for own in kind.supported_bits if own >= nbits), default=max(kind.supported_bits))
    codec = kind(nbits, role, dim, page_size, group_size)  # type: ignore[arg-type]
    if isinstance(codec, IdentityCodec):
        codec.dtype = dtype
        codec.nbits = dtype.itemsize * 8
    if context is not None:
        codec.bind(context)
    return codec


def _check_count(argument: str, got: object) -> None:
    if isinstance(got, bool) or not isinstance(got, int) or got < 1:
        raise ValueError(f"{argument}: expected a positive whole number, got {got!r}")
