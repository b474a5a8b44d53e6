"""Pareto plots of a report. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .specs import BASELINE

if TYPE_CHECKING:
    from .report import Report

#: columns in which more is better
MORE = ("top-1", "same tokens", "diverges at", "ROUGE-L", "tasks", "prefill tok/s", "decode tok/s", "ratio")
#: file -> quality, against
PLOTS = {"quality.png": ("KL", "MB"), "speed.png": ("decode tok/s", "MB"), "tasks.png": ("tasks", "MB")}


def front(points: list[tuple[float, float]], more_y: bool, more_x: bool = False) -> list[int]:
    """Indices of the points that no other one beats in both, in the order of x."""
    signs = (-1 if more_x else 1, -1 if more_y else 1)
    own = [(x * signs[0], y * signs[1]) for x, y in points]
    best = [i for i, (x, y) in enumerate(own) if not any((a <= x and b <= y and (a, b) != (x, y)) for a, b in own)]
    return sorted(best, key=lambda i: points[i])


def pareto_plot(report: Report, quality: str = "KL", against: str = "MB") -> Any:
    """A figure with a point a cache. Raises ValueError for a column that the report has not."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    from .report import COLUMNS

    summary = report.summary()
    for column in (quality, against):
        has = {c for own in summary.values() for c in own}
        if column not in has:
            raise ValueError(f"column: expected one of {', '.join(c for c in COLUMNS if c in has)}, got {column!r}")
    names = [n for n, own in summary.items() if quality in own and against in own]
    log = quality.endswith("KL") or quality.startswith("KL")
    if log:  # the baseline's is 0
        names = [name for name in names if name != BASELINE and summary[name][quality]["mean"] > 0]
    factors = COLUMNS[against][3], COLUMNS[quality][3]
    points = [(summary[n][against]["mean"] * factors[0], summary[n][quality]["mean"] * factors[1]) for n in names]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    best = front(points, quality in MORE, against in MORE)
    axes.plot([points[i][0] for i in best], [points[i][1] for i in best], color="0.7", zorder=1)
    for name, (x, y) in zip(names, points, strict=True):
        spread = summary[name][quality]["std"] * factors[1]
        axes.errorbar(x, y, yerr=min(spread, 0.9 * y) if log else spread, fmt="o", zorder=2)
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(against)
    axes.set_ylabel(quality)
    axes.grid(True, alpha=0.3)
    return figure


def save_plots(report: Report, folder: Path) -> list[Path]:
    """The plots of whose columns the report has two caches or more."""
    summary = report.summary()
    written = []
    for file, (quality, against) in PLOTS.items():
        if sum(quality in own and against in own for own in summary.values()) > 1:
            pareto_plot(report, quality, against).savefig(folder / file, dpi=120)
            written.append(folder / file)
    return written
