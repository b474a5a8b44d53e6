"""What the newest query of a pass pays to the tokens of a layer, read beside the attention and without changing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..attention import mask_of
from ..clustered.store import SharedRun
from ..codecs.base import Codec, Packed
from ..handles import LazyTensor, source_of
from ..lanes import LanePages
from ..layer import CompressedLayer
from ..masks import CausalMask, Mask, MaskPlan, Slots
from ..packed_attention import exact_runs
from ..reading import PageRun, page_runs
from ..softmax import Extras
from ..watching import AttentionCall
from .samples import Logits


def sink_logits(call: AttentionCall) -> torch.Tensor | None:
    """Logits `[H, G]` that go to no token, in models that have them."""
    sinks = call.extras.get("s_aux")
    return None if sinks is None else sinks.detach().float().view(call.key.shape[1], -1)


def reads_all(layer: Any) -> bool:
    """Nothing of the layer is in host memory, where only some pages are read."""
    tail = layer.storage.tail if isinstance(layer, CompressedLayer) and layer.storage is not None else None
    return tail is None or not any(tier.host for tier in tail.chain())


def logits_of(call: AttentionCall, row: int, heads: Sequence[int], seen: int) -> list[Logits]:
    """Logits of the newest query of a row, over every run of tokens that is on the device.

    Args:
        call: of the attention, before it is answered: what it stores must be at rest.
        heads: key-value heads.
        seen: positions so far, those of this pass included.
    """
    length = call.query.shape[2]
    query = call.query[:, :, -1].detach().float() * call.scaling
    query = query.unflatten(1, (call.key.shape[1], -1))  # [B, H, G, D]
    extras = Extras(call.extras.get("softcap"), None, call.extras.get("position_bias"))
    layer = source_of(call.key, "key")
    if not isinstance(layer, CompressedLayer):
        return [_dense(call, query[row], row, list(heads), seen, extras)]
    mask = mask_of(call.module, call.mask, call.query, layer, call.extras)
    if layer.storage is not None and layer.storage.evictor is not None and not layer.mask_is_ours:
        mask = CausalMask(length, seen - length, True, query.device)  # a plain attention sees all that is held
    own = _Reader(query, row, list(heads), mask, slice(length - 1, length), extras)
    parts = [own.exact(keys, slots) for _, keys, _, slots in exact_runs(layer)]
    assert layer.storage is not None
    pages = layer.storage.pages
    for run in page_runs(layer.storage, None):
        if run.lanes is None:
            parts.append(own.slab(run))
        else:
            assert isinstance(pages, LanePages)
            parts += own.lines(run, pages.heads)
    return parts


class _Reader:
    """Scores of one row's newest query, run by run."""

    def __init__(self, query: torch.Tensor, row: int, heads: list[int], mask: Mask, which: slice, extras: Extras):
        self.query, self.row, self.heads, self.mask, self.which, self.extras = query, row, heads, mask, which, extras

    def exact(self, keys: torch.Tensor, slots: Slots) -> Logits:
        """Tokens that are there as they came, `[B, H, n, D]`."""
        scores = self.query[self.row, self.heads] @ keys[self.row, self.heads].float().mT
        return self._finish(scores, slots)

    def slab(self, run: PageRun) -> Logits:
        """A slab of all rows and heads, of which only the ones asked for are read."""
        codec = run.codecs["key"]
        if isinstance(codec, SharedRun):
            scores = codec.scores(self.query, run.keys)[self.row, self.heads]
        else:
            keys = own_fields(codec, run.keys, self.row, self.heads)
            scores = codec.scores(self.query[self.row : self.row + 1, self.heads].contiguous(), keys)[0]
        return self._finish(scores[..., : run.tokens], run.slots)

    def lines(self, run: PageRun, heads: int) -> list[Logits]:
        """The lines of a block that belong to the row's heads."""
        assert run.block is not None
        parts = []
        for head in self.heads:
            lines = [i for i, lane in enumerate(run.block.lanes) if lane == self.row * heads + head]
            if lines:
                index = torch.tensor(lines, device=self.query.device)
                keys = {name: t[index] for name, t in run.keys.items()}
                query = self.query[self.row, head].expand(len(lines), 1, -1, -1).contiguous()
                scores = run.codecs["key"].scores(query, keys)[:, 0, :, : run.tokens]
                positions = run.slots.positions(scores.device)[index]
                allowed = self.mask.allowed(run.slots, self.which)
                if allowed is not None:
                    allowed = allowed[index][:, :, 0]
                parts.append(Logits([head], positions, self._hide(scores, allowed, positions, [head])))
        return parts

    def _finish(self, scores: torch.Tensor, slots: Slots) -> Logits:
        """Of all heads, scores `[h, G, n]`."""
        positions = slots.positions(scores.device)
        positions = positions[self.row if positions.shape[0] > 1 else 0]
        allowed = self.mask.allowed(slots, self.which)
        if allowed is not None:
            allowed = _of_heads(allowed[self.row if allowed.shape[0] > 1 else 0][:, 0], self.query.shape[1], self.heads)
        hidden = self._hide(scores, allowed, positions, self.heads)
        return Logits(self.heads, positions.clone(), hidden)

    def _hide(
        self, scores: torch.Tensor, allowed: torch.Tensor | None, positions: torch.Tensor, heads: list[int]
    ) -> torch.Tensor:
        if self.extras.softcap is not None:
            scores = torch.tanh(scores / self.extras.softcap) * self.extras.softcap
        if self.extras.bias is not None:
            bias = self.extras.bias[0 if self.extras.bias.shape[0] == 1 else self.row, :, -1]
            bias = bias.unflatten(0, (self.query.shape[1], -1))[heads]  # [h, G, T]
            at = positions.clamp(min=0).long()
            at = at.unsqueeze(-2).expand(*scores.shape[:-2], -1, -1).expand_as(scores)
            scores = scores + bias.expand(scores.shape[0], -1, -1).gather(2, at)
        if allowed is None:
            return scores
        return scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed


def own_fields(codec: Codec, packed: Packed, row: int, heads: list[int]) -> Packed:
    """The fields of a slab, `[B, H, 1, ...]`, of one row and some heads; what is not stored stays as it is."""
    return {name: t[row : row + 1, heads].contiguous() if name in codec.fields else t for name, t in packed.items()}


def _of_heads(allowed: torch.Tensor, heads: int, chosen: list[int]) -> torch.Tensor:
    """`[1, H or Hq, n]` -> what some heads may see, `[1 or h, 1 or G, n]`."""
    return allowed[:, None] if allowed.shape[0] == 1 else allowed.unflatten(0, (heads, -1))[chosen]


def _dense(call: AttentionCall, query: torch.Tensor, row: int, heads: list[int], seen: int, extras: Extras) -> Logits:
    """Keys that are plain tensors `[B, H, T, D]`, the newest at position `seen - 1`; query `[H, G, D]`."""
    key = call.key.materialise() if isinstance(call.key, LazyTensor) else call.key
    keys = key[row, heads].detach().float()
    tokens = keys.shape[1]
    positions = torch.arange(seen - tokens, seen, device=keys.device)
    scores = query[heads] @ keys.mT
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    if extras.bias is not None:
        bias = extras.bias[0, :, -1, :tokens].unflatten(0, (call.key.shape[1], -1))
        scores = scores + bias[heads]
    plan = source_of(call.mask, "mask")
    if isinstance(plan, MaskPlan):
        answer = plan.allowed(
            Slots(lambda device: positions[None].to(device), None, past=False, full=True),
            slice(plan.q_length - 1, plan.q_length),
        )
    else:
        answer = None if call.mask is None else call.mask[:, :, -1:, :tokens]
    if answer is not None:
        allowed = _of_heads(answer[row if answer.shape[0] > 1 else 0][:, 0], call.key.shape[1], heads)
        hidden = scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed
        return Logits(heads, positions, hidden)
    return Logits(heads, positions, scores)
