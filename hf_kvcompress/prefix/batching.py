"""Several prompts behind one prefix: padding stands between the prefix and the suffixes, hidden by the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def prompts_of(prompt: Any) -> tuple[list[Any], bool]:
    """The prompts of an argument that is one (a text, a row of ids) or several; and whether it is several."""
    if isinstance(prompt, str):
        return [prompt], False
    if isinstance(prompt, torch.Tensor):
        return (list(prompt), True) if prompt.dim() == 2 and prompt.shape[0] > 1 else ([prompt], False)
    rows = list(prompt)
    return (rows, True) if rows and not isinstance(rows[0], int) else ([rows], False)


def pad_between(
    prefix: Sequence[int], suffixes: Sequence[Sequence[int]], pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask `[rows, T]` of one prefix with each suffix, the shorter ones padded in front.

    Left padding before the prefix would move its positions away from where the cache has them.
    """
    longest = max(map(len, suffixes))
    ids, mask = [], []
    for suffix in suffixes:
        gap = longest - len(suffix)
        ids.append([*prefix, *[pad] * gap, *suffix])
        mask.append([1] * len(prefix) + [0] * gap + [1] * len(suffix))
    return torch.tensor(ids), torch.tensor(mask)


def rows_of(out: Any) -> torch.Tensor:
    """The sequences that `generate` gave, `[rows, T]`, whatever it returned them in."""
    return out if isinstance(out, torch.Tensor) else out.sequences
