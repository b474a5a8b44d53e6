"""What to use, from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..config import PRESETS, CacheConfig
from ..harness.specs import BASELINE, CacheSpec
from ..planner import describe
from .measured import LEAST

#: ratios that differ by less count as equal: then the simpler or milder cache, which stands first
TIE = 1.02
#: gain in a batch from which sharing pages is worth its time
WORTH = 1.05
LONG = 32_768
PREFIX = 64  # tokens


def recommend(
    config: Any, dtype: torch.dtype, alone: Sequence[dict[str, Any]], batch: Sequence[dict[str, Any]],
    prefixes: Sequence[int], lengths: Sequence[int], target_kl: float,
) -> dict[str, Any]:  # fmt: skip
    """The smallest measured cache whose KL is at most `target_kl`, its ratio, and what else would help; JSON-ready.

    Without measurements it is the default preset with the planner's ratio, and says so.
    """
    fits = [row for row in alone if row["cache"] != BASELINE and row["kl"] <= target_kl]
    if fits:
        best = max(row["ratio"] for row in fits)
        row = next(row for row in fits if row["ratio"] * TIE >= best)
        found = _said(
            row, config, dtype, f"the smallest of {len(alone) - 1} measured with a KL of at most {target_kl:g}"
        )
    else:
        found = _unmeasured(config, dtype, max(lengths), alone, target_kl)
    return {**found, "target_kl": target_kl, "also": [*_sharing(batch, target_kl), *_prefix(prefixes)]}


def code_of(spec: CacheSpec) -> str:
    """How a cache is made."""
    settings = {"preset": spec.head, **spec.settings} if spec.head in PRESETS else dict(spec.settings)
    kind = "CompressedCache" if spec.head in PRESETS else spec.head
    return f"kvc.{kind}(" + ", ".join(["model.config", *(f"{k}={v!r}" for k, v in settings.items())]) + ")"


def _said(row: dict[str, Any], config: Any, dtype: torch.dtype, why: str) -> dict[str, Any]:
    spec = CacheSpec.from_dict(row["spec"])
    names = ("cache", "ratio", "kl", "perplexity_change", "prompts", "tokens", "scored")
    return {
        **{name: row[name] for name in names},
        "code": code_of(spec),
        "measured": True,
        "why": why,
        "ratio_at_long": _planned(config, dtype, spec.head, LONG),
        "long": LONG,
    }


def _unmeasured(
    config: Any, dtype: torch.dtype, length: int, alone: Sequence[dict[str, Any]], target_kl: float
) -> dict[str, Any]:
    why = f"not measured: that takes prompts of {LEAST} tokens or more; the ratio is the planner's"
    preset = "balanced"
    if alone:
        why = f"nothing measured stays within a KL of {target_kl:g}: this is the mildest"
        preset = "near-lossless"
        row = next((row for row in alone if row["cache"] == preset), None)
        if row is not None:
            return _said(row, config, dtype, why)
    return {
        "cache": preset,
        "code": code_of(CacheSpec(preset)),
        "ratio": _planned(config, dtype, preset, max(length, LEAST)),
        "measured": False,
        "why": why,
        "ratio_at_long": _planned(config, dtype, preset, LONG),
        "long": LONG,
    }


def _planned(config: Any, dtype: torch.dtype, preset: str, context: int) -> float | None:
    """Ratio by the planner, which allows for room at its fullest; None for what it does not plan."""
    if preset not in PRESETS:
        return None
    return describe(config, CacheConfig.make(preset=preset), context=context, dtype=dtype).compression_ratio


def _sharing(batch: Sequence[dict[str, Any]], target_kl: float) -> list[str]:
    rows = {row["cache"]: row for row in batch}
    sharing = [row for row in batch if row["pages_shared"] is not None and row["kl"] <= target_kl]
    if "balanced" not in rows or not sharing:
        return []
    best = min(sharing, key=lambda row: row["nbytes"])
    gain = rows["balanced"]["nbytes"] / best["nbytes"]
    if gain < WORTH:
        return []
    return [
        f"Prompts in one batch share pages: {code_of(CacheSpec.from_dict(best['spec']))} holds {best['prompts']} of "
        f"them in {gain:.2f} times fewer bytes than balanced (ratio {best['ratio']:.2f} instead of "
        f"{rows['balanced']['ratio']:.2f}, measured; KL {best['kl']:.4f} instead of {rows['balanced']['kl']:.4f})."
    ]


def _prefix(prefixes: Sequence[int]) -> list[str]:
    long = [tokens for tokens in prefixes if tokens >= PREFIX]
    if not long:
        return []
    return [
        f"{len(long)} of {len(prefixes)} prompts begin like another one, with up to {max(long):,} equal tokens: a "
        "PrefixCache reads and stores such a beginning once, without loss."
    ]
