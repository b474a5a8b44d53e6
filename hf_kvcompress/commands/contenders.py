"""The caches that the demo runs: the specs of the harness, under the names of its table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import PRESETS
from ..harness.specs import BASELINE, CacheSpec, Unavailable
from ..harness.specs import Entrant as Contender

__all__ = ["BASELINE", "Contender", "Unavailable", "check_name", "contender", "default_names", "may_be_calibrated"]

STRATEGIES = ("HierarchicalCache", "CPACCache")
CALIBRATED = "TransformCache"


def default_names(config: Any, calibrated: bool = False) -> list[str]:
    """Uncompressed, the presets, strategies, and transformers' quantized cache where it can run."""
    strategies = [*STRATEGIES, *([CALIBRATED] if calibrated else [])]
    hybrid = "sliding_attention" in (getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    return [BASELINE, *PRESETS, *strategies, "quanto4", *(["quanto4-full"] if hybrid else [])]


def check_name(name: str) -> None:
    """Raise ValueError for a name that `contender` does not know."""
    CacheSpec.parse(name)


def may_be_calibrated(name: str) -> bool:
    """Whether the cache called `name` may need a calibration."""
    return CacheSpec.parse(name).may_be_calibrated


def contender(name: str, config: Any, calibration: str | Path | None = None) -> Contender:
    """The cache called `name` for a model with this config; `calibration` is for those that need one and name none.

    Raises:
        ValueError: an unknown name.
        Unavailable: a known one that cannot run here.
    """
    spec = CacheSpec.parse(name)
    if calibration is not None and spec.may_be_calibrated and "calibration" not in spec.settings:
        spec = replace(spec, settings={**spec.settings, "calibration": str(calibration)})
    return replace(spec.entrant(config), name=name)
