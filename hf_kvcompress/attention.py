"""The "kvcompress" attention: reads packed pages where the keys are ours, and is plain sdpa everywhere else."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from .handles import LazyTensor, source_of
from .layer import CompressedLayer
from .masks import CausalMask, DenseMask, Mask, MaskPlan
from .mass import prompt_mass
from .packed_attention import packed_attention
from .softmax import Extras
from .watching import show


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
        show(module, query, key, value, attention_mask, scaling, kwargs)
        return _dense_attention(module, query, key, value, attention_mask, scaling, extras, kwargs), None
    plan = source_of(attention_mask, "mask")
    if isinstance(plan, MaskPlan):  # an encoder-decoder cache does not tell its parts beforehand
        layer.describe(plan)
    show(module, query, key, value, attention_mask, scaling, kwargs)
    factor = scaling if scaling is not None else query.shape[-1] ** -0.5
    if getattr(module, "is_causal", True):  # in cross attention nothing says which queries are padding
        layer.observe_queries(query, factor)
    elif layer.chunk is not None:
        layer.keep_all()
    chunk = layer.chunk
    if chunk is not None and chunk.start == 0:
        out = _dense_attention(module, query, chunk.keys, chunk.values, attention_mask, scaling, extras, kwargs)
        if layer.wants_mass:
            mask = mask_of(module, attention_mask, query, layer, kwargs)
            mass = prompt_mass(query, chunk.keys, mask, factor, extras, chunk.kept, layer.may_be_cropped)
            layer.observe_mass("new", mass)
    else:
        mask = mask_of(module, attention_mask, query, layer, kwargs)
        out = packed_attention(layer, query, mask, factor, extras).to(query.dtype).transpose(1, 2).contiguous()
    # Later layers of a model that shares keys and values read the same tensors: there the next pass commits.
    if not any(getattr(module, name, False) for name in ("store_full_length_kv", "is_kv_shared_layer")):
        layer.finish()
    return out, None


def mask_of(
    module: torch.nn.Module,
    attention_mask: torch.Tensor | None,
    query: torch.Tensor,
    layer: CompressedLayer,
    kwargs: dict[str, Any],
) -> Mask:
    """What a call's mask says about the tokens of one of our layers."""
    plan = source_of(attention_mask, "mask")
    if isinstance(plan, MaskPlan):
        return plan
    if attention_mask is not None:
        return DenseMask(attention_mask, max(layer.seen - attention_mask.shape[-1], 0))
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
