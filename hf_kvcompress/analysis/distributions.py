"""Distributions as a report holds them: a few numbers, and for cosines a histogram."""

from __future__ import annotations

from typing import Any

import torch

EDGES = tuple(round(-1 + 0.05 * i, 2) for i in range(41))
QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}


def summary(values: torch.Tensor) -> dict[str, Any]:
    """Number, mean, spread, quantiles and extremes of finite values; only `n` = 0 where there are none."""
    values = values[values.isfinite()].double()
    if not len(values):
        return {"n": 0}
    points = torch.quantile(values[: 1 << 23], torch.tensor(list(QUANTILES.values()), dtype=torch.float64)).tolist()
    return {
        "n": len(values),
        "mean": _short(values.mean().item()),
        "std": _short(values.std(unbiased=False).item()),
        **dict(zip(QUANTILES, map(_short, points), strict=True)),
        "min": _short(values.min().item()),
        "max": _short(values.max().item()),
    }


def histogram(cosines: torch.Tensor) -> torch.Tensor:
    """How many cosines are in each step of 0.05, `[40]`."""
    inside = cosines.double().clamp(-1, 1)
    return torch.histogram(inside, torch.tensor(EDGES, dtype=torch.float64)).hist.long()


def beyond(values: torch.Tensor, baseline: torch.Tensor) -> float | None:
    """Share of values above the 99th percentile of a baseline; None without either."""
    if not len(values) or not len(baseline):
        return None
    return float((values > torch.quantile(baseline.double(), 0.99).float()).float().mean())


def share_at_least(values: torch.Tensor, thresholds: tuple[float, ...], of: int) -> dict[str, float]:
    """Of `of` pages, the share whose value reaches each threshold."""
    return {f"{t:g}": _short(float((values >= t).sum()) / max(of, 1)) for t in thresholds}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
