"""Merge on evict: an evicted value lives on in the surviving token that is most like it."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from .compaction import Rewrite
from .policies.base import Candidates

BLOCK = 1024  # evicted tokens compared with all survivors at once


def merged_values(candidates: Candidates, keep: torch.Tensor) -> Rewrite | None:
    """What the survivors' values become when every evicted one is folded into its most similar survivor (D2O).

    Similarity is the cosine of the keys, in the same lane. Only those above the lane's average are folded; the others
    would blur what they meet (arXiv 2406.13035). A value counts with the attention mass that its token has received
    where a policy tracks it (as KeepKV, arXiv 2504.09936, weighs votes), else with exp(similarity).
    """
    marked = torch.zeros_like(keep)
    found = []
    for lane in range(len(keep)):
        own, out = keep[lane].nonzero()[:, 0], (~keep[lane] & candidates.present[lane]).nonzero()[:, 0]
        if len(own) and len(out):
            touched, values = _merge_lane(candidates, lane, own, out)
            marked[lane, touched] = True
            found.append(values)
    return Rewrite(marked.cpu(), torch.cat(found)) if found else None


def _merge_lane(
    candidates: Candidates, lane: int, own: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the survivors that change, in order, and their new values `[n, D]`."""
    keys, values = normalize(candidates.keys[lane], dim=-1), candidates.values[lane]
    best = [(keys[part] @ keys[own].mT).max(1) for part in out.split(BLOCK)]
    similarity, target = torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
    chosen = similarity >= similarity.mean()
    similarity, target, out = similarity[chosen], target[chosen], out[chosen]
    if candidates.mass is not None:
        weight, base = candidates.mass[lane, out], candidates.mass[lane, own]
    else:
        weight, base = similarity.exp(), torch.full((len(own),), torch.e, device=keys.device)
    base = base.float().clamp(min=torch.finfo(torch.float32).tiny)
    total = base.clone().index_add_(0, target, weight)
    summed = (values[own] * base[:, None]).index_add_(0, target, values[out] * weight[:, None])
    changed = torch.zeros(len(own), dtype=torch.bool, device=own.device)
    changed[target] = True
    return own[changed], (summed / total[:, None])[changed]
