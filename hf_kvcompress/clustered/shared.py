"""What the layers of one clustered cache share: settings, the level at work, and the index of repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..codecs.base import Rotation
from .repeats import RepeatIndex
from .settings import LEVELS, ClusterSettings
from .tracker import PageSimilarityTracker

#: memory pressure, from 0 to 1, at which the level rises by one and by two
PRESSURES = (0.75, 0.9)
_HYSTERESIS = 0.05
Pressure = Callable[[], float]


class Clusters:
    """Shared state.

    Args:
        settings: how pages are compared and stored.
        tracker: finds similar pages.
    """

    def __init__(self, settings: ClusterSettings, tracker: PageSimilarityTracker | None = None):
        self.settings = settings
        self.tracker = tracker or PageSimilarityTracker(
            settings.similarity_threshold, settings.top_k_similar, settings.max_cluster_size
        )
        self.level = settings.level
        self.index: RepeatIndex | None = None
        self.refused: Counter[str] = Counter()  # pages for which a span was proposed, by what stood against it

    def index_for(self, layer: int, batch: int) -> RepeatIndex:
        """The index of repeats: the first layer that stores anything feeds it, and renews it when it starts anew."""
        if self.index is None or layer <= self.index.feeder:
            self.index = RepeatIndex(batch, layer)
            self.refused.clear()
        return self.index

    def feel(self, pressure: float) -> None:
        """Set the level that this memory pressure asks for; it falls once the pressure is 0.05 below what raised it."""
        if not self.settings.adaptive:
            return
        top = LEVELS[-1]
        raised = self.level - self.settings.level
        for steps, limit in enumerate(PRESSURES, 1):
            if pressure >= limit:
                raised = max(raised, steps)
            elif pressure < limit - _HYSTERESIS:
                raised = min(raised, steps - 1)
        self.level = min(self.settings.level + raised, top)


def cuda_pressure(device: torch.device) -> float:
    """Part of a CUDA device's memory that is in use, what torch holds free for itself not counted; else 0."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 1 - free / total


@dataclass(frozen=True)
class Sharing:
    """How one layer takes part: what is shared, and the rotation of its keys (None: they are compared as they are)."""

    clusters: Clusters
    rotary: Rotation | None = None
