"""How alike neighbouring layers are, page by page and as spaces."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.features import pair_sums
from ..ops.numeric import TINY
from .distributions import summary
from .views import View

TOKENS = 1024  # that layers are compared on


class LayerNeighbours:
    """Compares each layer with the one before it; holds a sample of one layer's tokens.

    Args:
        page_size: tokens of a page.
    """

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.rows: list[dict[str, Any]] = []
        self._before: dict[str, tuple[int, torch.Tensor]] = {}

    def add(self, view: View) -> None:
        """Look at a layer; layers come in order."""
        heads, tokens, dim = view.tokens.shape
        pages = view.tokens.unflatten(1, (-1, self.page_size))
        step = -(-pages.shape[1] * self.page_size // TOKENS)
        own = pages[:, ::step].flatten(1, 2)
        own = own - own.mean(1, keepdim=True)
        before = self._before.get(view.kind)
        if before is not None and before[1].shape == own.shape:
            self.rows.append({"layers": [before[0], view.layer], "kind": view.kind, **self._compare(before[1], own)})
        self._before[view.kind] = view.layer, own

    def _compare(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        """cosine: of the same page in both; shuffled: of a page and another one; cka: of the tokens of all heads."""
        count = x.shape[1] // self.page_size
        place = torch.arange(count)
        cosines: dict[str, list[torch.Tensor]] = {"cosine": [], "cosine_shuffled": []}
        for a, b in zip(x, y, strict=True):
            one, other = (t.unflatten(0, (-1, self.page_size)) for t in (a, b))
            for name, shift in (("cosine", 0), ("cosine_shuffled", max(count // 2, 1))):
                pairs = torch.stack([place, (place + shift) % count], dim=1)
                cosines[name].append(pair_sums(one, pairs, other).cosine)
        wide = [t.transpose(0, 1).flatten(1) for t in (x, y)]
        mixed = wide[1].roll(len(wide[1]) // 2, 0)
        return {
            **{name: summary(torch.cat(own)) for name, own in cosines.items()},
            "cka": linear_cka(*wide),
            "cka_shuffled": linear_cka(wide[0], mixed),
        }


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centred kernel alignment of `[N, D]` and `[N, E]` (Kornblith et al. 2019), 0 to 1."""
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    cross, own = (x.mT @ y).square().sum(), (x.mT @ x).norm() * (y.mT @ y).norm()
    return float(cross / own.clamp(min=TINY))
