"""Launchers of the kernels that make a segment's statistics: one launch a call."""

from __future__ import annotations

import torch

from . import kernels
from .library import register
from .quantize import DTYPES, source

THREADS = 1024


def serves(x: torch.Tensor) -> bool:
    """Whether the kernels take tokens `[..., T, D]`."""
    return x.shape[-1] <= THREADS and x.shape[-2] > 0 and x.dtype in DTYPES and kernels.serves(x)


def _block(dim: int) -> tuple[int, int]:
    """Threads of a block and bytes of its shared memory."""
    threads = THREADS // dim * dim
    return threads, 16 * threads


@register(
    "Tensor x, Tensor? queries, Tensor? first, Tensor? second, Tensor? weight, Tensor(a!) mean, Tensor(b!) spread, "
    "float memory, float floor"
)
def segment_begin(
    x: torch.Tensor,
    queries: torch.Tensor | None,
    first: torch.Tensor | None,
    second: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    spread: torch.Tensor,
    memory: float,
    floor: float,
) -> None:
    """Mean and spread `[rows, D]` bfloat16 of tokens `[outer, inner, T, D]`.

    Args:
        queries: `[rows, D]` float32 mean squares of queries.
        first, second, weight: the history of `segment_learn`.
        memory: tokens after which history has faded to 1 / e.
        floor: the smallest spread relative to all channels.
    """
    outer, inner, tokens, dim = x.shape
    if outer * inner == 0:
        return
    threads, shared = _block(dim)
    args = [*source(x), queries, first, second, weight, mean, spread, dim, tokens, memory, floor]
    kernels.load("quantize_segment.cu", "segment_begin")((outer * inner,), threads, args, shared=shared, like=x)


@register(
    "Tensor x, Tensor? old_first, Tensor? old_second, Tensor? old_weight, Tensor(a!) first, Tensor(b!) second, "
    "Tensor(c!) weight, float memory"
)
def segment_learn(
    x: torch.Tensor,
    old_first: torch.Tensor | None,
    old_second: torch.Tensor | None,
    old_weight: torch.Tensor | None,
    first: torch.Tensor,
    second: torch.Tensor,
    weight: torch.Tensor,
    memory: float,
) -> None:
    """Fading sums of tokens `[outer, inner, T, D]` and of their squares `[rows, D]`, and of weights `[rows, 1]`.

    All float64; the old ones, of the tokens before, are contiguous or None.
    """
    outer, inner, tokens, dim = x.shape
    if outer * inner == 0:
        return
    threads, shared = _block(dim)
    args = [*source(x), old_first, old_second, old_weight, first, second, weight, dim, tokens, memory]
    kernels.load("quantize_segment.cu", "segment_learn")((outer * inner,), threads, args, shared=shared, like=x)
