"""SnapKV (arXiv 2404.14469): what the newest queries attend to, smoothed along the text."""

from __future__ import annotations

import torch

from .base import Candidates, Policy, whole


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
        self.window, self.kernel_size = whole("window_size", window_size), whole("kernel_size", kernel_size, odd=True)

    def score(self, candidates: Candidates) -> torch.Tensor:
        """Attention averaged over queries and query group, then over `kernel_size` tokens."""
        return candidates.smooth(candidates.mean_attention(), self.kernel_size)
