"""What the channels of a head are like: outliers, effective rank, entropy of its codes."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.numeric import TINY
from .metrics import CODE_BITS, Scale, codes

SAMPLE = 4096  # tokens
OUTLIER = 3.0  # times the median channel's root mean square
NAMED = 5
HELD = 0.9


def channel_statistics(x: torch.Tensor, scale: Scale) -> dict[str, Any]:
    """Of tokens `[N, D]` float32 (evenly spread ones, of many).

    mean_energy: share of the squares that the channels' mean accounts for. outlier_ratio: root mean square of the
    largest channel over the median one's. outlier_channels: how many exceed three times the median; largest: the first
    five. effective_rank: exp of the entropy of the covariance's eigenvalues (Roy and Vetterli 2007). rank_90:
    directions that hold 90 % of the variance. code_entropy: bits of a 4-bit code, first order.
    """
    x = x[:: -(-len(x) // SAMPLE)]
    rms = x.square().mean(0).sqrt()
    middle = rms.median().clamp(min=TINY)
    order = rms.argsort(descending=True, stable=True)
    energy = x.square().sum().clamp(min=TINY)
    return {
        "channels": x.shape[1],
        "mean_energy": float(x.mean(0).square().sum() * len(x) / energy),
        "outlier_ratio": float(rms.max() / middle),
        "outlier_channels": int((rms > OUTLIER * middle).sum()),
        "largest": order[:NAMED].tolist(),
        **ranks(x),
        "code_entropy": entropy(codes(x, scale)),
    }


def ranks(x: torch.Tensor) -> dict[str, Any]:
    """Effective rank, and directions that hold 90 % of the variance, of tokens `[N, D]`."""
    centred = x.double() - x.double().mean(0)
    variances = torch.linalg.eigvalsh(centred.mT @ centred).clamp(min=0).flip(0)
    total = variances.sum()
    if total <= 0:
        return {"effective_rank": 0.0, "rank_90": 0}
    p = variances / total
    return {
        "effective_rank": float(torch.special.entr(p).sum().exp()),
        "rank_90": int((p.cumsum(0) < HELD).sum()) + 1,
    }


def entropy(numbers: torch.Tensor) -> float:
    """Bits of one code, by how often each of the 16 occurs."""
    p = torch.bincount(numbers.flatten().int(), minlength=2**CODE_BITS).double() / max(numbers.numel(), 1)
    return float(torch.special.entr(p).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64)))
