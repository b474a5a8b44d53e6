"""Pareto plots of a report. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .specs import BASELINE

if TYPE_CHECKING:
    from .report import Report

#: columns in which more is better
MORE = ("top-1", "same tokens", "diverges at", "ROUGE-L", "tasks", "prefill tok/s", "decode tok/s", "ratio")
#: column -> label of an axis, where the name alone says too little
LABELS = {
    "MB": "MB held by the cache",
    "KL": "KL of the next token (nats)",
    "decode tok/s": "decoded tokens a second",
    "prefill tok/s": "prompt tokens a second",
}
MARKERS = "osD^v<>pP*Xh"
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
    return side_by_side(report, [(quality, against)])


def side_by_side(report: Report, pairs: Sequence[tuple[str, str]]) -> Any:
    """A figure with a Pareto plot for each (quality, against). Caches differ by marker, so that no colour is needed.

    Names stand at the points of a single plot, and in a legend below several.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    alone = len(pairs) == 1
    figure = Figure(figsize=(7, 4.5) if alone else (4.8 * len(pairs), 4.6), layout="constrained")
    shown: dict[str, Any] = {}
    for axes, (quality, against) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        shown |= _draw(axes, report, quality, against, named=alone)
    if not alone:
        names = [name for name in report.caches if name in shown]
        handles = [shown[name] for name in names]
        figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _draw(axes: Any, report: Report, quality: str, against: str, named: bool) -> dict[str, Any]:
    """Draw the points and the front; the markers by cache."""
    from .report import COLUMNS

    summary = report.summary()
    for column in (quality, against):
        has = {c for own in summary.values() for c in own}
        if column not in has:
            raise ValueError(f"column: expected one of {', '.join(c for c in COLUMNS if c in has)}, got {column!r}")
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(summary)}
    names = [n for n, own in summary.items() if quality in own and against in own]
    log = quality.endswith("KL") or quality.startswith("KL")
    if log:  # the baseline's is 0
        names = [name for name in names if name != BASELINE and summary[name][quality]["mean"] > 0]
    factors = COLUMNS[against][3], COLUMNS[quality][3]
    points = [(summary[n][against]["mean"] * factors[0], summary[n][quality]["mean"] * factors[1]) for n in names]
    best = front(points, quality in MORE, against in MORE)
    axes.plot([points[i][0] for i in best], [points[i][1] for i in best], color="0.7", zorder=1)
    drawn = {}
    middle = (min(x for x, _ in points) + max(x for x, _ in points)) / 2 if points else 0.0
    for index, (name, (x, y)) in enumerate(zip(names, points, strict=True)):
        spread = summary[name][quality]["std"] * factors[1]
        error = min(spread, 0.9 * y) if log else spread
        drawn[name] = axes.errorbar(
            x, y, yerr=error, fmt=markers[name], color="black", ecolor="0.6", markersize=6, zorder=2,
            markerfacecolor="white" if name.split(":")[0] in ("random", "streaming", BASELINE) else "black",
        )  # fmt: skip
        if not named:
            continue
        right = x > middle  # names stay inside
        axes.annotate(
            name, (x, y), xytext=(-7 if right else 7, 4 if index % 2 == 0 else -10), textcoords="offset points",
            ha="right" if right else "left", fontsize=7,
        )  # fmt: skip
    if log and points:
        axes.set_yscale("log")
    axes.margins(x=0.12)  # room for names
    axes.set_title(f"{quality} against {against}")
    axes.set_xlabel(LABELS.get(against, against))
    axes.set_ylabel(LABELS.get(quality, quality))
    axes.grid(True, alpha=0.3)
    return drawn


def save_plots(report: Report, folder: Path) -> list[Path]:
    """The plots of whose columns the report has two caches or more."""
    summary = report.summary()
    written = []
    for file, (quality, against) in PLOTS.items():
        if sum(quality in own and against in own for own in summary.values()) > 1:
            pareto_plot(report, quality, against).savefig(folder / file, dpi=120)
            written.append(folder / file)
    return written
