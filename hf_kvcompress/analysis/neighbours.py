"""Which pages to compare: each page's nearest one, and pairs drawn at random, within a sequence and across prompts."""

from __future__ import annotations

import torch

from ..clustered.tracker import PageSimilarityTracker
from ..ops.features import MOST_NEAREST, nearest, page_features, pair_sums

EXACT_NUMBERS = 1 << 31  # products above which features stand for pages
SKETCH = 128
SCOPES = ("within", "across")


def nearest_earlier(pages: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The earlier pages most like each page `[P, T, D]`: cosines `[P, k]`, best first, and numbers; -inf and -1: none.

    All pages are compared number by number as long as there are few; else random projections name 16 (of more than
    4,096 pages the signs of projections), which are then compared.
    """
    some = min(k, MOST_NEAREST)
    if len(pages) ** 2 * pages[0].numel() <= EXACT_NUMBERS:
        values, found = nearest(pages.flatten(1), some, earlier=True)
        return values, found.long()
    _, found = PageSimilarityTracker(-1.0, MOST_NEAREST).similar(pages)
    return _refine(pages, pages, found.long(), some)


def nearest_other(pages: torch.Tensor, pool: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """As `nearest_earlier`, in a pool `[Q, T, D]` of other pages."""
    some = min(k, MOST_NEAREST)
    if len(pages) * len(pool) * pages[0].numel() <= EXACT_NUMBERS:
        values, found = nearest(pages.flatten(1), some, pool.flatten(1))
        return values, found.long()
    features = [page_features(x, SKETCH).sketch for x in (pages, pool)]
    _, found = nearest(features[0], MOST_NEAREST, features[1])
    return _refine(pages, pool, found.long(), some)


def _refine(pages: torch.Tensor, pool: torch.Tensor, found: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `k` of the candidates `[P, n]`, by the pages themselves."""
    own = torch.arange(len(pages))[:, None].expand_as(found)
    pairs = torch.stack([own, found.clamp(min=0)], dim=2).flatten(0, 1)
    values = pair_sums(pages, pairs, pool).cosine.view_as(found).masked_fill(found < 0, -torch.inf)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], found.gather(1, order)[:, :k]


def nearest_pairs(pages: torch.Tensor, owner: torch.Tensor, scope: str) -> torch.Tensor:
    """Of every page `[P, T, D]` the pair with its nearest one, `[M, 2]`; pages that have nothing to compare with: none.

    "within": the earlier pages of its own reading `owner[p]`; "across": all pages of the other readings.
    """
    pairs = []
    for reading in owner.unique().tolist():
        own = (owner == reading).nonzero()[:, 0]
        others = own if scope == "within" else (owner != reading).nonzero()[:, 0]
        if not len(others):
            continue
        if scope == "within":
            _, found = nearest_earlier(pages[own])
        else:
            _, found = nearest_other(pages[own], pages[others])
        has = found[:, 0] >= 0
        pairs.append(torch.stack([own[has], others[found[has, 0]]], dim=1))
    return torch.cat(pairs) if pairs else torch.empty(0, 2, dtype=torch.long)


def random_pairs(owner: torch.Tensor, scope: str, most: int, generator: torch.Generator) -> torch.Tensor:
    """Pairs of different pages `[M, 2]`, of one reading or of two: all, or `most` of them drawn at random."""
    count = len(owner)
    if count * (count - 1) // 2 <= 4 * most:
        a, b = torch.triu_indices(count, count, 1)
    else:  # each pair is as likely as any other; the few that come twice count twice
        a = torch.randint(count, (16 * most,), generator=generator)
        b = torch.randint(count - 1, (16 * most,), generator=generator)
        b += b >= a
    fits = (owner[a] == owner[b]) == (scope == "within")
    pairs = torch.stack([a[fits], b[fits]], dim=1)
    if len(pairs) > most:
        pairs = pairs[torch.randperm(len(pairs), generator=generator)[:most].sort().values]
    return pairs
