"""The caches that the demo runs: the specs of the harness, under the names of its table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import PRESETS
from ..harness.specs import BASELINE, CacheSpec, Unavailable
from ..harness.specs import Entrant as Contender

__all__ = ["BASELINE", "Contender", "Unavailable", "check_name", "contender", "default_names"]

STRATEGIES = ("HierarchicalCache", "CPACCache")


def default_names(config: Any) -> list[str]:
    """Uncompressed, the presets, strategies that need no file, and transformers' quantized cache where it can run."""
    hybrid = "sliding_attention" in (getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    return [BASELINE, *PRESETS, *STRATEGIES, "quanto4", *(["quanto4-full"] if hybrid else [])]


def check_name(name: str) -> None:
    """Raise ValueError for a name that `contender` does not know."""
    CacheSpec.parse(name)


def contender(name: str, config: Any) -> Contender:
    """The cache called `name` for a model with this config.

    Raises:
        ValueError: an unknown name.
        Unavailable: a known one that cannot run here.
    """
    return replace(CacheSpec.parse(name).entrant(config), name=name)
