"""Attention mass: what every stored token receives from the queries of a pass, summed over the query group."""

from __future__ import annotations

import torch

from . import kernels
from .library import register


@register(
    "Tensor scores, int groups, int heads, Tensor? lse, Tensor? real, Tensor? lanes, Tensor? starts, Tensor(a!) out"
)
def add_mass(
    scores: torch.Tensor,
    groups: int,
    heads: int,
    lse: torch.Tensor | None,
    real: torch.Tensor | None,
    lanes: torch.Tensor | None,
    starts: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`attention_mass` by the kernel, into `out`."""
    lines, rows, tokens = scores.shape
    if scores.numel() == 0:
        return
    kernel = kernels.load("attention_mass.cu", "attention_mass")
    tensors = [None if x is None else x.contiguous() for x in (scores, lse, real, lanes, starts)]
    args: list[kernels.Argument] = [*tensors, out, groups, rows // groups, tokens, heads, out.shape[2]]
    kernel((-(-tokens // 32), lines, out.shape[1]), (32, 8), args, like=scores)


def attention_mass(
    scores: torch.Tensor,
    groups: int,
    heads: int,
    lse: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    lanes: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mass `[L, S, n]` float32 of the tokens of L lines, added to `out` where given.

    Args:
        scores: `[L, groups * q, n]` float32, attention weights, or logits where `lse` is given; -inf is hidden.
        groups: query heads that share a key-value head.
        heads: key-value heads; lane l is of row `l // heads`.
        lse: `[lanes, groups * q]` float32, the log of the sum of exp of every query's logits; -inf: it sees nothing.
        real: `[B, q]` float32, what each query counts: 0 for padding.
        lanes: `[L]` int64, the lane of each line; the lines' numbers by default.
        starts: `[S + 1]` int32, slot s sums the queries `starts[s] .. starts[s + 1]`; one slot for all by default.
        out: `[L, S, >= n]` float32, contiguous.
    """
    lines, rows, tokens = scores.shape
    queries, slots = rows // groups, 1 if starts is None else len(starts) - 1
    if scores.dtype != torch.float32 or rows % groups:
        raise ValueError(f"scores: expected [L, {groups} * q, n] float32, got {list(scores.shape)} {scores.dtype}")
    if out is None:
        out = scores.new_zeros(lines, slots, tokens)
    elif out.shape[:2] != (lines, slots) or out.shape[2] < tokens or not out.is_contiguous():
        raise ValueError(f"out: expected contiguous [{lines}, {slots}, >= {tokens}], got {list(out.shape)}")
    if kernels.serves(scores):
        add_mass(scores, groups, heads, lse, real, lanes, starts, out)
        return out
    weights = scores
    if lse is not None:
        own = lse if lanes is None else lse[lanes]
        weights = (scores - own[..., None]).exp_().masked_fill_((own == -torch.inf)[..., None], 0.0)
    weights = weights.unflatten(1, (groups, -1))
    if real is not None:
        row = (torch.arange(lines, device=scores.device) if lanes is None else lanes) // heads
        weights = weights.sum(1) * real[row][..., None]
    elif starts is not None:
        weights = weights.sum(1)
    else:
        weights = weights.flatten(1, 2)
    if starts is None:
        out[..., :tokens] += weights.sum(1, keepdim=True)
        return out
    places = torch.arange(queries, device=starts.device)
    slot = (torch.searchsorted(starts, places.to(starts.dtype), right=True) - 1).to(scores.device)
    summed = scores.new_zeros(lines, slots, tokens).index_add_(1, slot, weights)
    out[..., :tokens] += summed
    return out
