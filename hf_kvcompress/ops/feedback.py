"""Rounding with error feedback: each code's error is carried into the channels that are not coded yet.

What counts is the error of scores, `q . (decoded - exact)`, and queries are far from isotropic. Given their second
moment, the channels after a code make up for the error that it leaves, as GPTQ (arXiv 2210.17323) does for weights; the
codes decode as ever.
"""

from __future__ import annotations

import torch

BLOCK = 32  # channels whose updates are made one by one before the rest gets them as one product


def feedback_matrix(moment: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments `[H, D, D]` of queries in the codes' basis -> the damped moment, and rows of feedback weights."""
    moment = moment.double().nan_to_num(0.0, 0.0, 0.0)
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=torch.finfo(torch.float64).tiny)
    damped = moment / size + damping * torch.eye(moment.shape[-1], dtype=torch.float64, device=moment.device)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    return damped.float(), (upper / upper.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).float()


def round_with_feedback(z: torch.Tensor, weights: torch.Tensor, step: float, nbits: int) -> torch.Tensor:
    """Codes `[H, D, T]` (float32 whole numbers + 0.5, centred) of `z` `[H, D, T]`, which is overwritten."""
    heads, dim, tokens = z.shape
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
