"""Whole pages out of tokens that were copied from a cache: their features, and now and then themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ops.features import page_features
from ..rotary import Rotary, rotary_of
from .samples import SKETCH, Pages, PageSample, Tokens


class PageBook:
    """Which pages of every head have been seen, so that each is looked at once.

    Args:
        rotaries: how the layers' keys were turned, of those where that is known: they are compared as they were before.
        contents: pages of a head whose keys and values are kept themselves.
    """

    def __init__(self, rotaries: Mapping[int, Rotary], contents: int):
        self.rotaries, self.contents = rotaries, contents
        self._known: dict[tuple[int, int], set[int]] = {}
        self._kept: dict[tuple[int, int], int] = {}

    def forget(self, first: int = 0) -> None:
        """Pages from number `first` on may be others now."""
        for known in self._known.values():
            known.difference_update([number for number in known if number >= first])

    def take_in(self, sample: PageSample) -> list[Pages]:
        """The pages of which a sample has all tokens and that were not seen before, by head."""
        if sample.copied is not None:
            sample.copied.synchronize()
        found = []
        for head in sorted({head for part in sample.parts for head in part.heads}):
            tokens = [_of_head(part, head) for part in sample.parts if head in part.heads]
            at, keys, values = (torch.cat(own) for own in zip(*tokens, strict=True))
            pages = self._whole(sample, head, at.long(), keys, values)
            if pages is not None:
                found.append(pages)
        return found

    def _whole(
        self, sample: PageSample, head: int, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> Pages | None:
        size, known = sample.page_size, self._known.setdefault((sample.layer, head), set())
        kept, at = at >= 0, at[at >= 0]
        numbers, counts = (at // size).unique(return_counts=True)
        numbers = torch.tensor([n for n in numbers[counts == size].tolist() if n not in known], dtype=torch.long)
        if not len(numbers):
            return None
        known.update(numbers.tolist())
        places = torch.full((int(at.max()) + 1,), -1).scatter_(0, at, kept.nonzero()[:, 0])
        chosen = places[numbers[:, None] * size + torch.arange(size)]  # [P, page]
        parts: dict[str, torch.Tensor] = {}
        for name, x in (("key", keys[chosen]), ("value", values[chosen])):
            compared = x.float()
            if name == "key" and sample.layer in self.rotaries:
                compared = self.rotaries[sample.layer].undo(compared, numbers[:, None] * size + torch.arange(size))
            features = page_features(compared, sketch=SKETCH)
            parts[f"{name}_sketch"], parts[f"{name}_norm"] = features.sketch, features.norm
            if self._has_room((sample.layer, head), len(numbers)):
                parts[f"{name}s"] = x[: self.contents].to(torch.float16)
        if "values" in parts:
            self._kept[sample.layer, head] = self._kept.get((sample.layer, head), 0) + len(parts["values"])
        return Pages(sample.layer, head, sample.step, numbers, parts)

    def _has_room(self, lane: tuple[int, int], number: int) -> bool:
        return number > 0 and self._kept.get(lane, 0) < self.contents


def _of_head(part: Tokens, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions `[n]`, keys and values `[n, D]`."""
    own = slice(None) if part.positions.dim() == 2 else part.heads.index(head)
    keys, values = (x[own].reshape(-1, x.shape[-1]) for x in (part.keys, part.values))
    return part.positions.flatten(), keys, values


def known_rotaries(model: Any, cache: Any) -> dict[int, Rotary]:
    """How each layer's keys were turned, if that is known of all of them."""
    if model is None:
        return {}
    found = {}
    for index in range(len(cache.layers) or model.config.get_text_config(decoder=True).num_hidden_layers):
        try:
            found[index] = rotary_of(model.config, index)
        except ValueError as error:
            if str(error).startswith("layer_index"):
                continue
            return {}
    return found
