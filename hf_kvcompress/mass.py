"""Attention mass: what every stored token receives from the queries of a pass, summed in blocks of queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .blocks import Block
from .masks import Mask, Slots
from .observation import LONGEST_DRAFT, draft_slots
from .ops.mass import attention_mass
from .ops.numeric import block_numel
from .softmax import Extras

SCORES = 2**22  # that are held at once on CPU while a prompt's mass is summed: they stay in a processor's cache


def chunk_slots(start: int, length: int) -> Slots:
    """Slots of a pass's own tokens."""
    at = torch.arange(start, start + length)[None]
    # A single new token sees itself, so it counts as past.
    return Slots(at.to, ("new", start, length), past=length == 1, full=True)


def real_queries(
    kept: Sequence[torch.Tensor] | None, which: slice, length: int, device: torch.device
) -> torch.Tensor | None:
    """`[B, length]` numbers, 1 for the queries of the block `which` that are no padding; None if all are."""
    if kept is None:
        return None
    real = torch.zeros(len(kept), max(which.start + length, *(int(own.max()) + 1 if len(own) else 0 for own in kept)))
    for row, own in enumerate(kept):
        real[row, own] = 1.0
    return real[:, which].to(device)


def mass_of_run(
    run: Any,
    weights: torch.Tensor,
    real: torch.Tensor | None,
    heads: int,
    groups: int,
    slots: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights `[B, H, G * q, n]` (or of a block `[lines, 1, G * q, n]`) -> mass `[B, H, n]` (or `[lines, n]`).

    With `lse` `[B * H, G * q]`, the log of the sum of exp of every query's logits, logits in place of weights. With
    `slots`, the `draft_slots` of these queries, there is an axis of them before the last one.
    """
    lanes = run.index("lanes") if isinstance(run, Block) else None
    starts = None
    if slots is not None:
        firsts = torch.searchsorted(slots, torch.arange(LONGEST_DRAFT + 2))
        starts = firsts.to(weights.device, torch.int32)
    mass = attention_mass(weights.flatten(0, 1), groups, heads, lse, real, lanes=lanes, starts=starts)
    mass = mass[:, 0] if slots is None else mass
    return mass if isinstance(run, Block) else mass.unflatten(0, weights.shape[:2])


def prompt_mass(
    query: torch.Tensor,
    keys: torch.Tensor,
    mask: Mask,
    scaling: float,
    extras: Extras,
    kept: Sequence[torch.Tensor] | None,
    draft: bool = False,
) -> torch.Tensor:
    """Mass `[B, H, q]` float32 that a first pass's tokens receive from its own queries, with `draft` by their slots.

    query: `[B, Hq, q, D]`, keys: `[B, H, q, D]`. The attention itself runs in one fused call that keeps no weights, so
    scores are computed a second time, a block of queries against the keys before them.
    """
    batch, query_heads, length, dim = query.shape
    heads = keys.shape[1]
    groups = query_heads // heads
    slots = (LONGEST_DRAFT + 1,) if draft else ()
    mass = torch.zeros(batch, heads, *slots, length, device=query.device)
    start = 0
    while start < length:
        rows = max(block_numel(query.device, SCORES) // (batch * query_heads * length), 1)
        which = slice(start, min(start + rows, length))
        seen = which.stop if mask.causal else length
        own = (query[:, :, which] * scaling).reshape(batch, heads, -1, dim)
        scores = (own @ keys[:, :, :seen].mT).float()
        if extras.softcap is not None:
            scores = torch.tanh(scores / extras.softcap) * extras.softcap
        scores = _hide(scores.view(batch, query_heads, -1, seen), mask, which, seen)
        if extras.bias is not None:
            scores = scores + extras.bias[:, :, which, :seen]
        weights = _softmax(scores, extras)
        real = real_queries(kept, which, which.stop - which.start, query.device)
        own_slots = draft_slots(length, which) if draft else None
        mass[..., :seen] += mass_of_run(None, weights.view(batch, heads, -1, seen), real, heads, groups, own_slots)
        start = which.stop
    return mass


def _hide(scores: torch.Tensor, mask: Mask, which: slice, seen: int) -> torch.Tensor:
    """Scores `[B, Hq, q, n]`, -inf where a query may not look."""
    if mask.causal and mask.no_padding:  # all queries see all that comes before the block
        own = scores[..., which.start :]
        hidden = torch.ones(own.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        own.masked_fill_(hidden, float("-inf"))
        return scores
    allowed = mask.allowed(chunk_slots(0, seen), which)
    if allowed is None:
        return scores
    return scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed


def _softmax(scores: torch.Tensor, extras: Extras) -> torch.Tensor:
    """Softmax over the last axis; a sink logit of each head joins the denominator, and a query without keys gives 0."""
    highest = scores.amax(-1, keepdim=True)
    if extras.sink_logits is not None:
        sink = extras.sink_logits.float().view(1, -1, 1, 1)
        highest = torch.maximum(highest, sink)
    highest = highest.clamp(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    if extras.sink_logits is not None:
        total = total + (sink - highest).exp()
    return weights.div_(total.clamp(min=torch.finfo(total.dtype).tiny))
