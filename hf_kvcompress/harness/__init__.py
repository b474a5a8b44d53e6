"""Measures caches side by side: quality, tasks, bytes and speed, each through the cache and beside its bounds."""

from .evaluate import evaluate
from .report import Report
from .specs import CacheSpec, Entrant, Unavailable
from .suites import SUITES, Suite

__all__ = ["SUITES", "CacheSpec", "Entrant", "Report", "Suite", "Unavailable", "evaluate"]
