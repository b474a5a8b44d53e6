"""Which pages are alike, over all layers and heads: named by prompt, tokens and text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from .capture import Captured
from .distributions import summary
from .metrics import jaccard_tokens
from .neighbours import SCOPES, random_pairs

NAMED = 10
_LETTERS = 90


class SimilarPages:
    """Collects the nearest pairs that stand out from the baseline, head by head."""

    def __init__(self, captured: Captured):
        self.captured = captured
        self.heads: dict[str, int] = defaultdict(int)
        self.cosines: dict[tuple[str, str], dict[tuple[int, int], list[float]]] = defaultdict(dict)

    def add(self, kind: str, similar: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Pairs `[M, 2]` and their cosines of one head, by scope."""
        self.heads[kind] += 1
        for scope, (pairs, cosines) in similar.items():
            own = self.cosines[kind, scope]
            for (a, b), cosine in zip(pairs.tolist(), cosines.tolist(), strict=True):
                found = own.setdefault((a, b), [0, 0.0])
                found[0] += 1
                found[1] += cosine

    def most(self, tokenizer: Any) -> list[dict[str, Any]]:
        """By kind and scope the pairs that most heads find, the highest mean cosine first; JSON-ready."""
        rows = []
        for (kind, scope), own in self.cosines.items():
            ranked = sorted(own.items(), key=lambda item: (-round(item[1][1], 6), item[0]))
            for (a, b), (heads, total) in ranked[:NAMED]:
                rows.append(
                    {
                        "kind": kind,
                        "scope": scope,
                        "page": self._place(a),
                        "other": self._place(b),
                        "share_of_heads": heads / self.heads[kind],
                        "mean_cosine": total / heads,
                        "jaccard_tokens": jaccard_tokens(self._tokens(a), self._tokens(b)),
                        "text": self._text(tokenizer, a),
                    }
                )
        return rows

    def jaccard_of_random_pairs(self, most: int, seed: int) -> dict[str, Any]:
        """Of the token ids of random pairs of pages, by scope."""
        found = {}
        for scope in SCOPES:
            pairs = random_pairs(self.captured.owner, scope, most, torch.Generator().manual_seed(seed)).tolist()
            values = [jaccard_tokens(self._tokens(a), self._tokens(b)) for a, b in pairs]
            found[scope] = summary(torch.tensor(values))
        return found

    def _place(self, page: int) -> dict[str, Any]:
        start = int(self.captured.starts[page])
        reading = self.captured.readings[int(self.captured.owner[page])]
        return {"prompt": reading.name, "start": start, "end": start + self.captured.page_size}

    def _tokens(self, page: int) -> list[int]:
        place, reading = self._place(page), self.captured.readings[int(self.captured.owner[page])]
        return reading.ids[place["start"] : place["end"]].tolist()

    def _text(self, tokenizer: Any, page: int) -> str:
        tokens = self._tokens(page)
        text = " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens)
        return " ".join(text.split())[:_LETTERS]
