"""Rounding with error feedback: each code's error is carried into the channels that are not coded yet.

What counts is the error of scores, `q . (decoded - exact)`, and queries are far from isotropic. Given their second
moment, the channels after a code make up for the error that it leaves, as GPTQ (arXiv 2210.17323) does for weights; the
codes decode as ever.
"""

from __future__ import annotations

import torch

from . import kernels
from .library import register

THREADS, TILE = 256, 32
SHARED = 48 << 10  # bytes of shared memory that every GPU gives without asking
BLOCK = 32  # channels whose updates are made one by one before the rest gets them as one product


def feedback_matrix(moment: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments `[H, D, D]` of queries in the codes' basis -> the damped moment, and rows of feedback weights."""
    moment = moment.double().nan_to_num(0.0, 0.0, 0.0)
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=torch.finfo(torch.float64).tiny)
    damped = moment / size + damping * torch.eye(moment.shape[-1], dtype=torch.float64, device=moment.device)
    # The `_ex` functions do not wait for the GPU to hear of an error; damping keeps the matrix positive definite.
    upper = torch.linalg.cholesky_ex(torch.linalg.inv_ex(damped).inverse, upper=True).L
    return damped.float(), (upper / upper.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).float()


def round_with_feedback(z: torch.Tensor, weights: torch.Tensor, step: float, nbits: int) -> torch.Tensor:
    """Codes `[H, D, T]` (float32 whole numbers + 0.5, centred) of `z` `[H, D, T]`, which is overwritten."""
    heads, dim, tokens = z.shape
    if kernels.serves(z) and 4 * TILE * dim <= SHARED:
        codes = torch.empty_like(z, memory_format=torch.contiguous_format)
        feedback(z.contiguous(), weights.contiguous(), codes, step, nbits)
        return codes
    half = 2 ** (nbits - 1)
    codes = torch.empty_like(z)
    for start in range(0, dim, BLOCK):
        end = min(start + BLOCK, dim)
        errors = z.new_empty(heads, end - start, tokens)
        for i in range(start, end):
            codes[:, i] = (z[:, i] / step).floor_().clamp_(-half, half - 1).add_(0.5)
            torch.sub(z[:, i], codes[:, i], alpha=step, out=errors[:, i - start])
            if i + 1 < end:
                z[:, i + 1 : end] -= weights[:, i, i + 1 : end, None] * errors[:, i - start, None]
        if end < dim:
            z[:, end:] -= weights[:, start:end, end:].mT @ errors
    return codes


@register("Tensor z, Tensor weights, Tensor(a!) codes, float step, int nbits")
def feedback(z: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, step: float, nbits: int) -> None:
    """`round_with_feedback` in one launch, all contiguous; `z` stays as it is."""
    heads, dim, tokens = z.shape
    if z.numel() == 0:
        return
    kernel = kernels.load("quantize_feedback.cu", "round_with_feedback")
    args: list[kernels.Argument] = [z, weights, codes, dim, tokens, step, float(2 ** (nbits - 1))]
    kernel((-(-tokens // TILE), heads), THREADS, args, shared=4 * TILE * dim, like=z)
