"""SnapKV (arXiv 2404.14469): what the newest queries attend to, smoothed along the text."""

from __future__ import annotations

import torch

from .base import Candidates, Policy


class SnapKVPolicy(Policy):
    """Mean attention of the newest queries, pooled over neighbouring tokens.

    It knows the question only if that came before the compression: a second one may find its tokens gone.

    Args:
        window_size: queries that are asked.
        kernel_size: neighbours over which attention is averaged, odd.
    """

    name = "snapkv"
    capture = "window"

    def __init__(self, window_size: int = 64, kernel_size: int = 5):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        self.window, self.kernel_size = window_size, kernel_size

    def score(self, candidates: Candidates) -> torch.Tensor:
        """Attention averaged over queries and query group, then over `kernel_size` tokens."""
        return candidates.smooth(candidates.mean_attention(), self.kernel_size)
