"""A quality guard: samples what sealing does to attention, and sends a layer one level back when it is too much."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .sealing_error import SealingMonitor, Store

QUERIES = 8  # newest queries of a pass that are asked
PATIENCE = 2  # samples in a row beyond the threshold


@dataclass(frozen=True)
class GuardEvent:
    """A layer went one level back: relative error of its attention output, and the codecs before and after."""

    layer: int
    tokens_seen: int
    error: float
    threshold: float
    before: tuple[str, str]
    after: tuple[str, str]


class QualityGuard(SealingMonitor):
    """Compares the attention of the newest queries over tokens just sealed, exact and as they are read back.

    The error is the mean over queries of the relative L2 distance of the two outputs. A layer whose error is beyond the
    threshold twice in a row is due to step back; after that it is judged anew.

    Args:
        threshold: relative error that a layer may have.
        sample: tokens that are looked at each time pages are sealed, for each layer.

    Raises:
        ValueError: a threshold that is no number above 0.
    """

    def __init__(self, threshold: float, sample: int = 64):
        super().__init__(sample)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold <= 0:
            raise ValueError(f"quality_guard: expected a number above 0, got {threshold!r}")
        self.threshold = float(threshold)
        self.queries: torch.Tensor | None = None  # of the pass that is being stored, [B, Hq, m, D], scaled
        self.errors: dict[int, float] = {}  # newest error of each layer
        self.beyond: dict[int, int] = defaultdict(int)
        self.events: list[GuardEvent] = []

    wants_queries = True

    def measure(
        self, layer: int, store: Store, rows: Sequence[int], start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """As the monitor does, and the error of the attention output on the first of these rows."""
        super().measure(layer, store, rows, start, keys, values)
        if self.queries is None:
            return
        row, heads = rows[0], keys.shape[1]
        newest = slice(max(keys.shape[2] - self.sample, 0), keys.shape[2])
        held = store.read_row(row, start, start + keys.shape[2])
        exact = [x[0, :, newest].float() for x in (keys, values)]  # [H, n, D]
        decoded = [x[0, :, newest].float() for x in held[:2]]
        queries = self.queries[row].unflatten(0, (heads, -1)).flatten(1, 2).to(keys.device)  # [H, G * m, D]
        out, read = ((queries @ k.mT).softmax(-1) @ v for k, v in (exact, decoded))
        size = out.norm(dim=-1).clamp(min=1e-6)
        self.errors[layer] = float(((read - out).norm(dim=-1) / size).mean())
        self.beyond[layer] = self.beyond[layer] + 1 if self.errors[layer] > self.threshold else 0

    def is_due(self, layer: int) -> bool:
        """The layer has been beyond the threshold often enough."""
        return self.beyond[layer] >= PATIENCE

    def note(self, layer: int, seen: int, before: tuple[str, str], after: tuple[str, str]) -> None:
        """Remember that a layer went back."""
        self.events.append(GuardEvent(layer, seen, self.errors[layer], self.threshold, before, after))

    def judge_anew(self, layer: int) -> None:
        """Forget what was beyond the threshold: the layer has gone back, or cannot."""
        self.beyond[layer] = 0
