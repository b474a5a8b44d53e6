"""The "kvcompress" attention: reads packed pages where the keys are ours, and is plain sdpa everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from .codecs.base import Codec, Packed
from .handles import LazyTensor, source_of
from .layer import CompressedLayer
from .masks import CausalMask, DenseMask, MaskPlan, Slots
from .pages import SEGMENT_LENGTH
from .reading import exact_run, page_runs

SCORES = 2**24  # scores that are held at once
Mask = MaskPlan | DenseMask | CausalMask
Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Extras:
    """What some models add to attention: logit soft-capping, sink logits `[Hq]`, an additive bias `[1, Hq, q, T]`."""

    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    dropout: float = 0.0

    @property
    def beyond_sdpa(self) -> bool:
        return self.softcap is not None or self.sink_logits is not None


@torch.compiler.disable
def kvcompress_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` `[B, Hq, q, D]` over keys and values `[B, H, T, D]`, in transformers' attention interface.

    Returns `[B, q, Hq, Dv]`. If key and value come from a compressed cache its pages are read as they are and the new
    tokens are committed afterwards, so they are seen exact by this pass's queries.
    """
    extras = Extras(kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.get("position_bias"), dropout)
    layer = source_of(key, "key")
    if not isinstance(layer, CompressedLayer) or source_of(value, "value") is not layer:
        return _dense_attention(module, query, key, value, attention_mask, scaling, extras, kwargs), None
    plan = source_of(attention_mask, "mask")
    if isinstance(plan, MaskPlan):  # an encoder-decoder cache does not tell its parts beforehand
        layer.describe(plan)
    if getattr(module, "is_causal", True):  # in cross attention nothing says which queries are padding
        layer.observe_queries(query)
    chunk = layer.chunk
    if chunk is not None and chunk.start == 0:
        out = _dense_attention(module, query, chunk.keys, chunk.values, attention_mask, scaling, extras, kwargs)
    else:
        mask = _mask(module, attention_mask, query, layer, layer.seen - key.shape[2], kwargs)
        scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
        out = _packed_attention(layer, query, mask, scaling, extras).to(query.dtype).transpose(1, 2).contiguous()
    # Later layers of a model that shares keys and values read the same tensors: there the next pass commits.
    if not any(getattr(module, name, False) for name in ("store_full_length_kv", "is_kv_shared_layer")):
        layer.commit()
    return out, None


def _mask(
    module: torch.nn.Module,
    attention_mask: torch.Tensor | None,
    query: torch.Tensor,
    layer: CompressedLayer,
    offset: int,
    kwargs: dict[str, Any],
) -> Mask:
    plan = source_of(attention_mask, "mask")
    if isinstance(plan, MaskPlan):
        return plan
    if attention_mask is not None:
        return DenseMask(attention_mask, offset)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    start = layer.chunk.start if layer.chunk is not None else layer.seen
    return CausalMask(query.shape[2], start, bool(causal) and layer.chunk is not None, query.device)


# -- keys and values that are plain tensors ------------------------------------------------------------------------


def _dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    extras: Extras,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    plan = source_of(attention_mask, "mask")
    if isinstance(plan, MaskPlan):
        attention_mask = plan.dense()
    key, value = (x.materialise() if isinstance(x, LazyTensor) else x for x in (key, value))
    if not extras.beyond_sdpa:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=extras.dropout, scaling=scaling, **kwargs
        )[0]
    groups = query.shape[1] // key.shape[1]
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = query @ repeat_kv(key, groups).mT * scaling
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    if attention_mask is None and query.shape[2] > 1:
        queries, keys = (torch.arange(x.shape[2], device=query.device) for x in (query, key))
        attention_mask = keys <= queries[:, None]
    if attention_mask is not None:
        scores = _masked(scores, attention_mask)
    weights = _softmax(scores.float(), extras).to(query.dtype)
    out = torch.nn.functional.dropout(weights, extras.dropout) @ repeat_kv(value, groups)
    return out.transpose(1, 2).contiguous()


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def _softmax(scores: torch.Tensor, extras: Extras) -> torch.Tensor:
    """Softmax over the last axis of `[B, Hq, q, T]`; a sink logit of each head, if any, joins the denominator."""
    if extras.sink_logits is None:
        return scores.softmax(-1)
    sink = extras.sink_logits.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


# -- packed pages --------------------------------------------------------------------------------------------------


class RunningSoftmax:
    """Softmax-weighted sums over runs of tokens that come one after the other, in float32.

    Sums are kept for each basis that a run's `mix` works in, so that a codec's basis is left once and not per run.

    Args:
        highest: `[B, H, M, 1]`, the largest score so far: -inf, or the logit of a token without a value.
    """

    def __init__(self, highest: torch.Tensor):
        self.highest = highest
        self.total = (highest > float("-inf")).to(highest.dtype)
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, scores: torch.Tensor, mix: Transform, basis: str, dropout: float) -> None:
        """Add a run with scores `[B, H, M, n]`; `mix(weights)` gives its weighted values `[B, H, M, Dv]`."""
        highest = torch.maximum(self.highest, scores.amax(-1, keepdim=True))
        safe = highest.clamp(min=torch.finfo(highest.dtype).min)  # a query that sees nothing yet: -inf - -inf is NaN
        weights = (scores - safe).exp_()
        shrink = (self.highest - safe).exp_()
        self.total = self.total * shrink + weights.sum(-1, keepdim=True)
        if dropout:
            weights = torch.nn.functional.dropout(weights, dropout)
        for name in self.sums:
            self.sums[name] *= shrink
        mixed = mix(weights)
        self.sums[basis] = self.sums[basis] + mixed if basis in self.sums else mixed
        self.highest = highest

    def result(self, finish: Transform) -> torch.Tensor:
        """The weighted mean `[B, H, M, Dv]`; `finish` takes the packed sum out of its codec's basis."""
        parts = [finish(total) if basis == "packed" else total for basis, total in self.sums.items()]
        return sum(parts[1:], parts[0]) / self.total.clamp(min=torch.finfo(self.total.dtype).tiny)


def _packed_attention(
    layer: CompressedLayer, query: torch.Tensor, mask: Mask, scaling: float, extras: Extras
) -> torch.Tensor:
    """Attention over what the layer stores and the pass in flight; the pages are read as they are. `[B, Hq, q, Dv]`."""
    assert layer.storage is not None
    batch, query_heads, length, _ = query.shape
    heads = layer.storage.heads["key"]
    # As many queries at once as keep the scores of one slab small.
    at_once = max(SCORES // (batch * query_heads * SEGMENT_LENGTH), 1)
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
    storage, codecs = layer.storage, layer.storage.pages.codecs
    heads = storage.heads["key"]
    groups = query_heads // heads
    q = (query.float() * scaling).reshape(batch, heads, groups * length, -1)
    start = q.new_full((batch, heads, groups * length, 1), float("-inf"))
    if extras.sink_logits is not None:
        logits = extras.sink_logits.float().view(1, heads, groups, 1)
        start = logits.expand(batch, heads, groups, length).reshape(batch, heads, groups * length, 1)
    running = RunningSoftmax(start)
    for keys, values, slots in _exact_runs(layer):
        scores = _finish_scores(q @ keys.float().mT, which, mask, slots, extras, groups)
        running.add(scores, partial(_weigh, values), "exact", extras.dropout)
    for slab, tokens, slots in page_runs(storage):
        scores = codecs["key"].scores(q, slab.keys)[..., :tokens]
        scores = _finish_scores(scores, which, mask, slots, extras, groups)
        if tokens < slab.capacity:
            scores = torch.nn.functional.pad(scores, (0, slab.capacity - tokens), value=float("-inf"))
        mix = partial(_mix, codecs["value"], slab.values)
        running.add(scores, mix, "packed", extras.dropout)
    return running.result(codecs["value"].finish)


def _weigh(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return weights @ values.float()


def _mix(codec: Codec, packed: Packed, weights: torch.Tensor) -> torch.Tensor:
    return codec.mix(weights, packed)


def _exact_runs(layer: CompressedLayer) -> Iterator[tuple[torch.Tensor, torch.Tensor, Slots]]:
    """Sinks and window, then this pass's new tokens: keys, values `[B, H, n, D]` and their slots."""
    assert layer.storage is not None
    stored = exact_run(layer.storage)
    if stored is not None:
        yield stored
    chunk = layer.chunk
    if chunk is not None:
        length = chunk.keys.shape[2]
        at = torch.arange(chunk.start, chunk.start + length)[None]
        # A single new token sees itself, so it counts as past.
        yield chunk.keys, chunk.values, Slots(at.to, ("new", chunk.start, length), past=length == 1, full=True)


def _finish_scores(
    scores: torch.Tensor, which: slice, mask: Mask, slots: Slots, extras: Extras, groups: int
) -> torch.Tensor:
    """Soft-cap, bias and mask raw scores `[B, H, G * q, n]` of the tokens in these slots; -inf where hidden."""
    batch, heads, rows, tokens = scores.shape
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    allowed = mask.allowed(slots)
    if allowed is None and extras.bias is None:
        return scores
    scores = scores.view(batch, heads * groups, rows // groups, tokens)
    if extras.bias is not None:
        at = slots.positions(scores.device).clamp(min=0)[:, None, None]
        bias = extras.bias[:, :, which].expand(max(extras.bias.shape[0], at.shape[0]), -1, -1, -1)
        scores = scores + bias.gather(3, at.expand(*bias.shape[:3], tokens))
    if allowed is not None:
        allowed = allowed[:, :, which]
        scores = scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed
    return scores.view(batch, heads, rows, tokens)
