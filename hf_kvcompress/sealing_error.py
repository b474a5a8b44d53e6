"""Opt-in measuring of what compression loses: cosine and relative L2 error of sampled pages, and non-finite numbers."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class ReconstructionError:
    """Mean over the sampled vectors: cosine similarity and `|decoded - exact| / |exact|`."""

    cosine: float
    relative_l2: float
    vectors: int


class Store(Protocol):
    """What holds sealed tokens."""

    def read_row(self, row: int, start: int, end: int) -> tuple[torch.Tensor, ...]: ...


class SealingMonitor:
    """Samples sealed tokens and compares them with what they decode to.

    Args:
        sample: tokens that are looked at each time pages are sealed, for each layer.
    """

    wants_queries = False

    def __init__(self, sample: int = 64):
        self.sample = sample
        # (layer, role) -> [sum of cosines, sum of relative errors, vectors]
        self.sums: dict[tuple[int, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
        self.non_finite: dict[int, int] = {}

    def check_finite(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Warn, once a layer, of NaN or infinity in new keys or values; such tokens are packed as zeros."""
        bad = int((~keys.isfinite()).sum() + (~values.isfinite()).sum())
        if bad and layer not in self.non_finite:
            warnings.warn(f"layer {layer}: {bad} keys or values are NaN or infinite", RuntimeWarning, stacklevel=3)
        if bad:
            self.non_finite[layer] = self.non_finite.get(layer, 0) + bad

    def measure(
        self, layer: int, store: Store, rows: Sequence[int], start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Compare tokens just sealed from token number `start` on, `[len(rows), H, T, D]`, with what is stored."""
        tokens = keys.shape[2]
        picked = torch.arange(0, tokens, max(tokens // self.sample, 1), device=keys.device)
        for number, row in enumerate(rows):
            held = store.read_row(row, start, start + tokens)
            for role, exact, decoded in zip(("key", "value"), (keys, values), held, strict=False):
                self._add(layer, role, exact[number : number + 1, :, picked].float(), decoded[:, :, picked])

    def _add(self, layer: int, role: str, exact: torch.Tensor, decoded: torch.Tensor) -> None:
        fine = exact.isfinite().all(-1) & (exact.norm(dim=-1) > 0)
        exact, decoded = exact[fine], decoded[fine]
        sums = self.sums[(layer, role)]
        sums[0] += float(torch.nn.functional.cosine_similarity(exact, decoded, dim=-1).sum())
        sums[1] += float(((decoded - exact).norm(dim=-1) / exact.norm(dim=-1)).sum())
        sums[2] += exact.shape[0]

    def result(self) -> dict[int, dict[str, ReconstructionError]]:
        """Errors by layer and role ("key", "value"), empty before anything was sealed."""
        result: dict[int, dict[str, ReconstructionError]] = defaultdict(dict)
        for (layer, role), (cosine, error, count) in sorted(self.sums.items()):
            if count:
                result[layer][role] = ReconstructionError(cosine / count, error / count, int(count))
        return dict(result)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sums": dict(self.sums)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.sums = defaultdict(lambda: [0.0, 0.0, 0], state["sums"])
