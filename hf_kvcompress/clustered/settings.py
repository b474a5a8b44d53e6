"""What a clustered cache looks for, and how hard, by level."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import choose, expect
from ..ops.delta import BITS as DELTA_BITS

FRAMES = ("unrotated", "rotated")
LEVELS = (1, 2, 3)
#: power of `min_compression_ratio` that a level asks for: 2.8, 2 and 1.26 times for the default of 2
_RATIO_POWER = {1: 1.5, 2: 1.0, 3: 1 / 3}
#: what a level adds to the similarity threshold
_THRESHOLD_SHIFT = {1: 0.05, 2: 0.0, 3: -0.05}
#: errors that count as equal: what the summation order of a batched product leaves between two copies of a row
NO_MORE = 1.01
#: importance weighting: important pages must come out with at most this part of the plain error
IMPORTANT = 0.75


@dataclass(frozen=True)
class ClusterSettings:
    """How pages are compared and stored.

    Args:
        similarity_threshold: least cosine, means removed, of a page and the span that it is coded against.
        max_cluster_size: pages that may hang on one base page, itself included.
        min_compression_ratio: how many times smaller than in the plain codec a page must become.
        top_k_similar: spans that are tried for a page.
        adaptive: let the level rise with memory pressure.
        level: 1 light, 2 moderate, 3 aggressive.
        importance: ask more of the pages that matter most, and of the newest of a pass.
        delta_bits: the most bits a difference may take: 4, 8 or 12. It takes as few as keep the error.
        frame: "unrotated" compares keys before their rotary embedding, "rotated" as they are cached.
    """

    similarity_threshold: float = 0.85
    max_cluster_size: int = 8
    min_compression_ratio: float = 2.0
    top_k_similar: int = 4
    adaptive: bool = True
    level: int = 2
    importance: bool = True
    delta_bits: int = 8
    frame: str = "unrotated"

    def __post_init__(self) -> None:
        if not _number(self.similarity_threshold) or not 0 < self.similarity_threshold <= 1:
            raise expect("similarity_threshold", "a number above 0 and at most 1", self.similarity_threshold)
        if not _number(self.min_compression_ratio) or not self.min_compression_ratio >= 1:
            raise expect("min_compression_ratio", "a number of at least 1", self.min_compression_ratio)
        for name, least, most in (("max_cluster_size", 2, 1 << 15), ("top_k_similar", 1, 16)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise expect(name, f"a whole number from {least} to {most}", value)
        for name, value in (("adaptive_compression", self.adaptive), ("use_importance_weighting", self.importance)):
            if not isinstance(value, bool):
                raise expect(name, "True or False", value)
        for name, value, known in (
            ("compression_level", self.level, LEVELS),
            ("delta_bits", self.delta_bits, DELTA_BITS),
        ):
            if isinstance(value, bool) or value not in known:
                raise expect(name, "one of " + ", ".join(map(str, known)), value)
        choose("frame", self.frame, FRAMES)

    def least_ratio(self, level: int) -> float:
        """Times that a page must become smaller at this level."""
        return self.min_compression_ratio ** _RATIO_POWER[level]

    def threshold(self, level: int) -> float:
        """Least cosine at this level."""
        return min(max(self.similarity_threshold + _THRESHOLD_SHIFT[level], 0.0), 1.0)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
