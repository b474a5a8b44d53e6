"""Which pages of a pass matter most: those that its newest queries attend to, or whose values are large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..policies.base import Candidates, Observers

if TYPE_CHECKING:
    from .search import Pass

QUERIES = 32  # newest ones of a pass that are asked
#: pages among the newest of a pass, and the part of all its pages of a head, that are important
NEWEST_PAGES, SHARE = 4, 1 / 8


def newest_queries(
    queries: torch.Tensor, scaling: float, kept: Sequence[torch.Tensor] | None
) -> list[torch.Tensor | None]:
    """Of queries `[B, Hq, q, D]` each row's newest ones, scaled, `[Hq, n, D]` float32; None for a row of padding."""
    found: list[torch.Tensor | None] = []
    for row, own in enumerate(queries.detach()):
        real = own if kept is None else own[:, kept[row].to(own.device)]
        found.append(real[:, -QUERIES:].float() * scaling if real.shape[1] else None)
    return found


def important_pages(run: Pass, page: int) -> torch.Tensor:
    """Booleans `[R, H, P]`: the pages of a pass that must come out better than the codec would have them."""
    scores = _attention(run) if run.queries is not None else run.exact["value"].float().norm(dim=-1)
    scores = scores.unflatten(2, (-1, page)).mean(3)  # [R, H, P]
    pages = scores.shape[2]
    best = scores.topk(math.ceil(pages * SHARE), dim=2).indices
    important = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, True)
    important[:, :, max(pages - NEWEST_PAGES, 0) :] = True
    return important


def _attention(run: Pass) -> torch.Tensor:
    """Attention that tokens `[R, H, T]` of the pass receive from its newest queries, the exact tokens left out."""
    assert run.queries is not None
    return torch.stack([_of_row(*each) for each in zip(run.exact["key"], run.exact["value"], run.queries, strict=True)])


def _of_row(keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """`[H, T]`, of keys and values `[H, T, D]` and queries `[Hq, n, D]`."""
    heads, tokens, _ = keys.shape
    at = torch.arange(tokens, device=keys.device).expand(heads, -1)
    own = queries.unflatten(0, (heads, -1))  # [H, G, n, D]
    behind = at.new_full((heads, own.shape[1] * own.shape[2]), tokens)  # they stand behind all of these tokens
    return Candidates(
        at,
        heads,
        keys=keys.float,
        values=values.float,
        context=lambda: (keys[:, :0].float(), at[:, :0]),
        observers=Observers(own.flatten(1, 2), behind, own.shape[1]),
    ).mean_attention()
