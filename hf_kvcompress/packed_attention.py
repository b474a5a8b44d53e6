"""Attention over packed pages as they are: sinks and window, the pass in flight, and every run of sealed tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from .codecs.base import Codec, Packed
from .entries import EntryRun
from .fused_decode import fused_decode, serves
from .host_tier import Fetched
from .lanes import LanePages
from .layer import CompressedLayer
from .masks import Mask, Slots
from .mass import chunk_slots, mass_of_run, real_queries
from .observation import LONGEST_DRAFT, draft_slots
from .pages import SEGMENT_LENGTH, PageStore
from .reading import entry_slots, exact_run, lane_stores, page_runs
from .softmax import Extras, RunningSoftmax

SCORES = 2**24  # scores that are held at once


def packed_attention(
    layer: CompressedLayer, query: torch.Tensor, mask: Mask, scaling: float, extras: Extras
) -> torch.Tensor:
    """Attention over what the layer stores and the pass in flight; the pages are read as they are. `[B, Hq, q, Dv]`."""
    assert layer.storage is not None
    batch, query_heads, length, _ = query.shape
    heads = layer.storage.heads["key"]
    if serves(layer, query, mask, extras):
        fused, seen = fused_decode(layer, query, mask, scaling, extras)
        if seen is not None:
            _observe(layer, seen.logits, slice(0, length), length, query_heads // heads, query.device, seen.lse)
        return fused
    # As many queries at once as keep the scores of one slab small; of all tokens, where weights are kept for a policy.
    pages = layer.storage.pages
    whole = layer.wants_mass or (isinstance(pages, PageStore) and pages.gathers)
    tokens = max(layer.storage.tokens_stored()) + length if whole else SEGMENT_LENGTH
    at_once = max(SCORES // (batch * query_heads * max(tokens, SEGMENT_LENGTH)), 1)
    tail = layer.storage.tail
    if tail is not None and any(tier.host for tier in tail.chain()) and length <= LONGEST_DRAFT:
        at_once = 1  # which host pages a query reads must not depend on later ones: a draft's may yet be taken back
    out = [
        _attend(layer, query[:, :, start : start + at_once], slice(start, start + at_once), mask, scaling, extras)
        for start in range(0, length, at_once)
    ]
    groups = query_heads // heads
    joined = torch.cat([part.unflatten(2, (groups, -1)) for part in out], dim=3)  # [B, H, G, q, Dv]
    return joined.reshape(batch, query_heads, length, -1)


def _attend(
    layer: CompressedLayer, query: torch.Tensor, which: slice, mask: Mask, scaling: float, extras: Extras
) -> torch.Tensor:
    """One block of queries, `which` of the pass: `[B, H, G * q, Dv]` float32."""
    assert layer.storage is not None
    batch, query_heads, length, _ = query.shape
    storage = layer.storage
    heads = storage.heads["key"]
    groups = query_heads // heads
    q = (query.float() * scaling).reshape(batch, heads, groups * length, -1)
    start = q.new_full((batch, heads, groups * length, 1), float("-inf"))
    if extras.sink_logits is not None:
        logits = extras.sink_logits.float().view(1, heads, groups, 1)
        start = logits.expand(batch, heads, groups, length).reshape(batch, heads, groups * length, 1)
    running = RunningSoftmax(start, layer.wants_mass)
    for name, keys, values, slots in exact_runs(layer):
        scores = _finish_scores(q @ keys.float().mT, which, mask, slots, extras, groups)
        running.add(name, scores, partial(_weigh, values), "exact", extras.dropout)
    entries = None if isinstance(storage.pages, LanePages) else storage.pages.entries()
    for held in entries or ():
        slots = entry_slots(storage, held.entries)
        scores = storage.pages.codecs["key"].scores(q.index_select(0, held.entries.row_index), held.keys)
        scores = _finish_scores(scores, which, mask, slots, extras, groups).flatten(0, 1).unsqueeze(1)
        mix = partial(_mix_entries, storage.pages.codecs["value"], held)
        running.add(None, scores, mix, "packed", extras.dropout, held.entries.lanes(heads))
    for run in page_runs(storage, q) if entries is None else ():
        own = q if run.lanes is None else q.flatten(0, 1)[run.lanes].unsqueeze(1)
        scores = run.codecs["key"].scores(own, run.keys)[..., : run.tokens]
        scores = _finish_scores(scores, which, mask, run.slots, extras, groups)
        if isinstance(run.block, Fetched):
            layer.note_fetched(run.block, which.stop)
        if run.tokens < run.capacity:
            scores = torch.nn.functional.pad(scores, (0, run.capacity - run.tokens), value=float("-inf"))
        mix = partial(_mix, run.codecs["value"], run.values)
        running.add(run.block, scores, mix, run.tier, extras.dropout, run.lanes)
    finish = {"packed": storage.pages.codecs["value"].finish}
    if isinstance(storage.pages, LanePages):
        finish = {name: pages.codecs["value"].finish for name, pages, _ in lane_stores(storage)}
    out = running.result(finish)
    if layer.wants_mass:
        _observe(layer, running.weights(), which, length, groups, q.device)
    return out


def _observe(
    layer: CompressedLayer,
    weights: Iterator[tuple[Any, torch.Tensor]],
    which: slice,
    length: int,
    groups: int,
    device: torch.device,
    lse: torch.Tensor | None = None,
) -> None:
    """Show the policy what tokens received from the queries `which` of a pass of `length`; with `lse` from logits."""
    assert layer.storage is not None
    heads = layer.storage.heads["key"]
    real = real_queries(layer.chunk.kept if layer.chunk else None, which, length, device)
    pass_length = layer.chunk.keys.shape[2] if layer.chunk else length
    drafts = draft_slots(pass_length, which) if layer.may_be_cropped else None
    for name, own in weights:
        layer.observe_mass(name, mass_of_run(name, own, real, heads, groups, drafts, lse))


def _weigh(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return weights @ values.float()


def _mix(codec: Codec, packed: Packed, weights: torch.Tensor) -> torch.Tensor:
    return codec.mix(weights, packed)


def _mix_entries(codec: Codec, run: EntryRun, weights: torch.Tensor) -> torch.Tensor:
    """Weights `[E * H, 1, M, n]` of entries that are packed as `[E, H, 1, ...]`."""
    by_entry = weights.view(len(run.entries.rows), -1, *weights.shape[2:])
    return codec.mix(by_entry, run.values).flatten(0, 1).unsqueeze(1)


def exact_runs(layer: CompressedLayer) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, Slots]]:
    """Sinks and window, then this pass's new tokens: a name, keys, values `[B, H, n, D]` and their slots."""
    assert layer.storage is not None
    stored = exact_run(layer.storage)
    if stored is not None:
        yield "exact", *stored
    chunk = layer.chunk
    if chunk is not None:
        yield "new", chunk.keys, chunk.values, chunk_slots(chunk.start, chunk.keys.shape[2])


def _finish_scores(
    scores: torch.Tensor, which: slice, mask: Mask, slots: Slots, extras: Extras, groups: int
) -> torch.Tensor:
    """Soft-cap, bias and mask raw scores `[B, H, G * q, n]` of the tokens in these slots; -inf where hidden."""
    batch, heads, rows, tokens = scores.shape
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    allowed = mask.allowed(slots, which)
    if allowed is None and extras.bias is None:
        return scores
    scores = scores.view(batch, heads * groups, rows // groups, tokens)
    if extras.bias is not None:
        scores = scores + _bias_of(extras.bias[:, :, which], slots, scores.device, tokens)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed
    return scores.view(batch, heads, rows, tokens)


def _bias_of(bias: torch.Tensor, slots: Slots, device: torch.device, tokens: int) -> torch.Tensor:
    """An additive bias `[1 or B, Hq, q, T]` at the tokens in these slots."""
    at = slots.positions(device).clamp(min=0)[:, None, None]
    if slots.lines is not None:
        rows = slots.lines.rows if bias.shape[0] > 1 else torch.zeros_like(slots.lines.rows)
        bias = bias.unflatten(1, (slots.lines.of, -1))[rows, slots.lines.heads]
    elif slots.rows is not None and bias.shape[0] > 1:
        bias = bias[slots.rows]
    bias = bias.expand(max(bias.shape[0], at.shape[0]), -1, -1, -1)
    return bias.gather(3, at.expand(*bias.shape[:3], tokens))
