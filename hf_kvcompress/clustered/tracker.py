"""Which pages are alike: features of pages, their cosines, and clusters around bases."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.features import MOST_NEAREST, nearest, nearest_signs, page_features, sign_bits

EXACT = 4096  # pages up to which all are compared
_SKETCH = 128


@dataclass(frozen=True)
class Cluster:
    """A base page and the pages that are like it, by number."""

    base: int
    members: tuple[int, ...]


class PageSimilarityTracker:
    """Finds similar pages by the cosine of their features. Override `compute_page_features` for other features.

    Args:
        similarity_threshold: least cosine.
        top_k_similar: pages that are named for one, 16 at most.
        max_cluster_size: pages of a cluster, its base included.
    """

    def __init__(self, similarity_threshold: float = 0.85, top_k_similar: int = 4, max_cluster_size: int = 8):
        self.similarity_threshold, self.top_k_similar = similarity_threshold, top_k_similar
        self.max_cluster_size = max_cluster_size

    def compute_page_features(self, pages: torch.Tensor) -> torch.Tensor:
        """Features `[P, F]` of pages `[P, T, D]` whose mean is removed: random projections, which keep cosines."""
        return page_features(pages, sketch=_SKETCH).sketch

    def similar(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For every page `[P, T, D]` the earlier ones most like it: cosines and numbers `[P, k]`, -inf and -1 if none.

        Up to 4,096 pages are compared with all others; of more, the 16 whose features have the most signs in common.
        """
        features = self.compute_page_features(pages).float()
        if len(features) <= EXACT:
            values, found = nearest(features, self.top_k_similar, earlier=True)
        else:
            values, found = self._by_signs(features)
        fits = values >= self.similarity_threshold
        return values.masked_fill(~fits, -torch.inf), found.masked_fill(~fits, -1)

    def _by_signs(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, near = nearest_signs(sign_bits(features), MOST_NEAREST, earlier=True)
        rows = torch.nn.functional.normalize(features, dim=1)
        values = torch.stack([(rows[near[:, i].clamp(min=0).long()] * rows).sum(1) for i in range(near.shape[1])], 1)
        values, order = values.masked_fill(near < 0, -torch.inf).sort(dim=1, descending=True, stable=True)
        return values[:, : self.top_k_similar], near.gather(1, order)[:, : self.top_k_similar]

    def clusters(self, pages: torch.Tensor) -> list[Cluster]:
        """Clusters of at most `max_cluster_size` pages, each member nearer to its base than the threshold."""
        _, found = self.similar(pages)
        base_of: dict[int, int] = {}
        members: dict[int, list[int]] = {}
        for page, candidates in enumerate(found.tolist()):
            for candidate in candidates:
                own = members.get(candidate, [])
                if candidate >= 0 and candidate not in base_of and len(own) + 2 <= self.max_cluster_size:
                    base_of[page] = candidate
                    members.setdefault(candidate, []).append(page)
                    break
        return [Cluster(base, tuple(own)) for base, own in sorted(members.items())]
