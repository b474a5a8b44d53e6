"""How alike two pages of numbers or tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..codecs.eqrot import STEP
from ..ops.features import PairSums, pair_sums
from ..ops.hadamard import rotation_matrix
from ..ops.numeric import TINY

CODE_BITS = 4
METRICS = ("cosine", "raw_cosine", "relative_l2", "hamming_codes", "hamming_signs", "jaccard_channels")
_NUMBERS = 1 << 24  # that are compared at once


@dataclass(frozen=True)
class Scale:
    """What all pages of a head are measured by: mean and spread of its channels, `[D]` float32."""

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> Scale:
        """Of tokens `[N, D]` float32."""
        return cls(x.mean(0), x.std(0, unbiased=False).clamp(min=TINY))


@dataclass(frozen=True)
class Pages:
    """Pages of one head in every form that they are compared in.

    centred: `[P, T, D]` float32 without the channels' mean; mean: `[D]`; codes: `[P, T * D]` uint8; signs: `[P, T * D]`
    bool; channels: `[P, D]` bool, the largest ones.
    """

    centred: torch.Tensor
    mean: torch.Tensor
    codes: torch.Tensor
    signs: torch.Tensor
    channels: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, scale: Scale) -> Pages:
        """From the numbers `[P, T, D]` float32 as they are."""
        centred = x - scale.mean
        flat = codes(x, scale).flatten(1)
        return cls(centred, scale.mean, flat, centred.flatten(1) >= 0, largest_channels(centred))

    def __len__(self) -> int:
        return len(self.centred)


def codes(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    """4-bit codes of tokens `[..., D]`, in the way of `eqrot4`: channels equalised, rotated, a scale a token."""
    z = ((x - scale.mean) / scale.std) @ rotation_matrix(x.shape[-1], x.device)
    z /= z.square().mean(-1, keepdim=True).sqrt_().clamp_(min=TINY)
    half = 2 ** (CODE_BITS - 1)
    return z.div_(STEP[CODE_BITS]).floor_().clamp_(-half, half - 1).add_(half).to(torch.uint8)


def largest_channels(centred: torch.Tensor) -> torch.Tensor:
    """The eighth of the channels with the largest mean magnitude in each page `[P, T, D]`: `[P, D]` bool."""
    size = centred.abs().mean(1)
    top = size.topk(max(size.shape[1] // 8, 1), dim=1).indices
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, top, True)


def compare(pages: Pages, pairs: torch.Tensor, others: Pages | None = None) -> dict[str, torch.Tensor]:
    """All `METRICS` of pages at `pairs[:, 0]` and of `others` (by default the same pages) at `pairs[:, 1]`, `[M]` each.

    cosine, relative_l2 (distance over the first page's norm) and signs are of pages without the channels' mean;
    raw_cosine with it. Hamming: the share of 4-bit codes or of signs that differ. Jaccard: of the largest channels.
    """
    others = pages if others is None else others
    sums = pair_sums(pages.centred, pairs, others.centred)
    a, b = pairs.unbind(1)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("codes", "signs")}
    for own, other in zip(
        *(x.split(max(_NUMBERS // max(pages.centred[0].numel(), 1), 1)) for x in (a, b)), strict=True
    ):
        for name, found in parts.items():
            found.append(hamming(getattr(pages, name)[own], getattr(others, name)[other]))
    return {
        "cosine": sums.cosine,
        "raw_cosine": _raw_cosine(sums, pages, a, others, b),
        "relative_l2": sums.relative_l2,
        **{f"hamming_{name}": torch.cat(found) if found else torch.empty(0) for name, found in parts.items()},
        "jaccard_channels": jaccard(pages.channels[a], others.channels[b]),
    }


def _raw_cosine(sums: PairSums, pages: Pages, a: torch.Tensor, others: Pages, b: torch.Tensor) -> torch.Tensor:
    """Cosine of the pages with their mean: the mean's part is the same in every token of a page."""
    tokens = pages.centred.shape[1]
    own, other = pages.centred.sum(1)[a], others.centred.sum(1)[b]  # [M, D]
    x = sums.x + 2 * own @ pages.mean + tokens * pages.mean.square().sum()
    y = sums.y + 2 * other @ others.mean + tokens * others.mean.square().sum()
    product = sums.product + own @ others.mean + other @ pages.mean + tokens * (pages.mean * others.mean).sum()
    size = x.clamp(min=0).sqrt() * y.clamp(min=0).sqrt()
    return torch.where(size > 0, product / size, 0.0)


def hamming(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Share of entries of two rows `[M, F]` that differ, `[M]`."""
    return (a != b).sum(1) / a.shape[1]


def jaccard(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of sets as rows of flags `[M, F]`: what both have over what either has, `[M]`; 1 if both are empty."""
    either = (a | b).sum(1)
    return torch.where(either > 0, (a & b).sum(1) / either.clamp(min=1), 1.0)


def jaccard_tokens(a: Sequence[int], b: Sequence[int]) -> float:
    """Of the sets of token ids of two pages."""
    one, other = set(a), set(b)
    return len(one & other) / len(one | other) if one or other else 1.0
