"""Statistics that equalise keys: mean and spread of every channel of a segment, from its tokens and those before it."""

from __future__ import annotations

import math

import torch

from ..ops import quantize, segments
from ..ops.numeric import LIMIT, TINY, block_numel, blocks, clean_, tree_sum
from .base import Codec, Field, Packed

_FLOOR = 1e-4  # of the root mean square over the channels: near-constant channels are not blown up further
_BLOCK = 1 << 17
MEMORY = 1024  # tokens after which the statistics of earlier ones have faded to 1 / e


class EqualisedCodec(Codec):
    """Base of codecs that take out the keys' mean and spread: fields "mean" and "spread" of a segment, keys only."""

    @property
    def equalising_fields(self) -> dict[str, Field]:
        if self.role == "value":
            return {}
        return {name: Field((self.dim,), torch.bfloat16, None) for name in ("mean", "spread")}

    def learn(self, history: Packed, x: torch.Tensor) -> Packed:
        """Sums of all keys and of their squares, forgotten with a time constant of `MEMORY` tokens (keys only)."""
        if self.role == "value":
            return {}
        tokens = x.shape[-2]
        if segments.serves(x):
            shape = (*x.shape[:-2], self.dim)
            first, second = (torch.empty(shape, dtype=torch.float64, device=x.device) for _ in range(2))
            weight = torch.empty(*x.shape[:-2], 1, dtype=torch.float64, device=x.device)
            old = [history[name].contiguous() if history else None for name in ("first", "second", "weight")]
            segments.segment_learn(quantize.as_rows(x), *old, first, second, weight, float(MEMORY))
            return {"first": first, "second": second, "weight": weight}
        age = torch.arange(tokens - 1, -1, -1, dtype=torch.float64, device=x.device)
        weight = torch.exp(-age / MEMORY)[:, None]
        y = clean_(x.to(torch.float32, copy=True)).double()  # squares of any float32 fit
        sums = {"first": tree_sum(y * weight, -2), "second": tree_sum(y.square_().mul_(weight), -2)}
        sums["weight"] = weight.sum().expand(*x.shape[:-2], 1).clone()
        fade = math.exp(-tokens / MEMORY)
        return {name: total + history[name] * fade for name, total in sums.items()} if history else sums

    def begin_segment(
        self, x: torch.Tensor, query_ms: torch.Tensor | None = None, history: Packed | None = None
    ) -> Packed:
        """Mean and equalising spread of every channel (keys only), from the tokens at hand and those before."""
        if self.role == "value":
            return {}
        lead, tokens = x.shape[:-2], x.shape[-2]
        if segments.serves(x):
            shape, kind = (*lead, self.dim), torch.bfloat16
            stored = {name: torch.empty(shape, dtype=kind, device=x.device) for name in self.equalising_fields}
            own = None if query_ms is None else query_ms.float().contiguous()
            old = [history[name].contiguous() if history else None for name in ("first", "second", "weight")]
            made = stored["mean"], stored["spread"]
            segments.segment_begin(quantize.as_rows(x), own, *old, *made, float(MEMORY), _FLOOR)
            return stored
        flat = x.reshape(-1, tokens, self.dim)
        mean = torch.empty(flat.shape[0], self.dim, dtype=torch.float64, device=x.device)
        variance = torch.empty_like(mean)
        for start, end, _, _ in blocks(flat.shape[0], 1, tokens * self.dim, block_numel(x.device, _BLOCK)):
            y = clean_(flat[start:end].to(torch.float32, copy=True))
            unit = torch.maximum(y.amax((1, 2)), y.amin((1, 2)).neg_()).clamp_(min=TINY)[:, None]
            y.mul_(unit.reciprocal()[:, None])  # squares neither overflow nor vanish
            centre = tree_sum(y, 1).mul_(1 / tokens)
            y.sub_(centre[:, None])
            mean[start:end] = centre.double() * unit
            variance[start:end] = tree_sum(y.mul_(y), 1).mul_(1 / tokens).double() * unit.double().square()
        if history:
            mean, variance = _join(mean, variance, tokens, {k: v.reshape(-1, v.shape[-1]) for k, v in history.items()})
        queries = None if query_ms is None else query_ms.reshape(-1, self.dim)
        spread = _spread(variance.sqrt(), mean, queries)
        shape = (*lead, self.dim)
        return {"mean": mean.to(torch.bfloat16).view(shape), "spread": spread.to(torch.bfloat16).view(shape)}


def _join(
    mean: torch.Tensor, variance: torch.Tensor, tokens: int, history: Packed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance `[n, D]` of `tokens` tokens joined with those of a history, which counts for less the more
    tokens are known."""
    weight = history["weight"].clamp(min=TINY)  # 0: a row that has learned nothing yet, beside one that has
    mean_before = history["first"] / weight
    variance_before = (history["second"] / weight - mean_before.square()).clamp_(min=0)
    part = weight * math.exp(-tokens / MEMORY)
    part = part / (part + tokens)
    between = (mean_before - mean).square() * part * (1 - part)
    return mean + (mean_before - mean) * part, variance + (variance_before - variance) * part + between


def _spread(std: torch.Tensor, mean: torch.Tensor, queries: torch.Tensor | None) -> torch.Tensor:
    """The equalising spread `[n, D]`: sqrt(std_k / std_q) of the channels, with the size of the keys."""
    size = tree_sum(std.square(), 1).mul_(1 / std.shape[1]).sqrt_()[:, None]
    relative = torch.where(size > 0, std / size.clamp(min=TINY), 1.0).clamp_(min=_FLOOR)
    if queries is not None:
        relative.div_(_relative_std(queries))
    # Tokens that come later should fit a segment that began with equal or zero tokens.
    reach = mean.abs().amax(1, keepdim=True)
    size = torch.maximum(size, reach * 1e-6)
    size = torch.where(size > TINY, size, torch.where(reach > TINY, reach, 1.0))
    return (relative.sqrt_() * size).clamp_(TINY, LIMIT)


def _relative_std(query_ms: torch.Tensor) -> torch.Tensor:
    """Mean squares of queries `[n, D]` -> their roots, relative to all channels and not below the floor."""
    y = clean_(query_ms.to(torch.float32, copy=True)).clamp_(min=0)
    y.mul_(y.amax(1, keepdim=True).clamp_(min=TINY).reciprocal_())
    total = (tree_sum(y, 1)[:, None]).mul_(1 / y.shape[1])
    return torch.where(total > 0, y / total.clamp(min=TINY), 1.0).sqrt_().clamp_(min=_FLOOR)
