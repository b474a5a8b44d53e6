"""Plots of several experiments side by side, legible in greyscale. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..harness.specs import BASELINE

if TYPE_CHECKING:
    from .summary import Summary

HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
#: file -> column, title, label of the axis, and whether it goes by powers of ten
PLOTS = {
    "memory.png": ("ratio", "Memory", "bytes of the uncompressed cache over bytes held", False),
    "quality.png": ("KL", "Divergence from the uncompressed model", "KL of the next token (nats)", True),
    "speed.png": ("decode tok/s", "Decoding, longest prompt", "tokens a second", False),
}


def bars(summary: Summary, file: str) -> Any:
    """A figure: a group an experiment, a bar a cache. None if no experiment has the column."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    column, title, label, is_log = PLOTS[file]
    means = summary.means()
    caches = [c for c in summary.caches() if not (is_log and c == BASELINE)]  # it diverges by 0 from itself
    heights = {(name, c): own[c][column] for name, own in means.items() for c in caches if column in own.get(c, {})}
    if is_log:  # an exact cache has no place on such an axis
        heights = {place: height for place, height in heights.items() if height > 0}
    names = list(dict.fromkeys(name for name, _ in heights))
    if not names:
        return None
    figure = Figure(figsize=(max(6.0, 1.8 + 0.4 * len(names) * len(caches)), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(caches)
    for index, cache in enumerate(caches):
        grey = 0.35 + 0.6 * index / max(1, len(caches) - 1)
        at = [place + (index - (len(caches) - 1) / 2) * width for place in range(len(names))]
        own = [heights.get((name, cache), float("nan")) for name in names]
        look: dict[str, Any] = {"edgecolor": "black", "linewidth": 0.6, "hatch": HATCHES[index % len(HATCHES)]}
        axes.bar(at, own, width, label=cache, color=str(grey), **look)
    if is_log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=axes.get_ylim()[0] / 2)  # the least bar is to be seen, too
    axes.set_xticks(range(len(names)), names)
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.grid(True, axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=min(4, len(caches)), fontsize=8)
    return figure


def save_plots(summary: Summary, folder: Path) -> dict[str, str]:
    """Titles by file, of the plots that were written."""
    written = {}
    for file, (_, title, _, _) in PLOTS.items():
        figure = bars(summary, file)
        if figure is not None:
            figure.savefig(folder / file, dpi=120)
            written[file] = title
    return written
