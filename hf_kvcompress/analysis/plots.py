"""The three plots of a report. Needs matplotlib. Lines differ in style and marker: they can be told apart in grey."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .tables import mean_of
from .views import NAMES

if TYPE_CHECKING:
    from .report import AnalysisReport

#: what is compared -> label, colour (dark to light), line
LINES = {
    "nearest_{}": ("nearest page", "#08306b", "-"),
    "repeated_{}": ("same text, any offset", "#b2182b", "-."),
    "nearest_{}_shuffled": ("nearest, tokens shuffled", "#7f7f7f", "--"),
    "pairs_{}": ("random pairs", "#a6a6a6", ":"),
}
SCOPES = {"within": "earlier in the same prompt", "across": "in other prompts"}
STYLES = {"key_before_rope": ("#08306b", "o"), "key_after_rope": ("#d6604d", "s"), "value": ("#7fbc41", "^")}
MARKERS = {"near-lossless": "o", "balanced": "D", "small": "^", "tiny": "v"}


def similarity_distribution(found: Mapping[str, Any]) -> Any:
    """How cosines are distributed, all layers and heads together, beside the shuffled baseline."""
    from matplotlib.figure import Figure

    edges, kinds = found["histograms"]["edges"], found["kinds"]
    middles = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    scopes = [s for s in SCOPES if any(f"nearest_{s}" in found["histograms"][kind] for kind in kinds)] or ["within"]
    figure = Figure(figsize=(4 * len(kinds), 3.1 * len(scopes) + 0.4), layout="constrained")
    grid = figure.subplots(len(scopes), len(kinds), squeeze=False, sharex=True, sharey="row")
    for row, scope in enumerate(scopes):
        for column, kind in enumerate(kinds):
            axes = grid[row][column]
            for name, (label, colour, line) in LINES.items():
                counts = found["histograms"][kind].get(name.format(scope))
                if counts and sum(counts):
                    shares = [100 * count / sum(counts) for count in counts]
                    axes.plot(middles, shares, line, color=colour, label=label, linewidth=1.8, drawstyle="steps-mid")
            axes.set_title(f"{NAMES[kind]}, {SCOPES[scope]}", fontsize=10)
            axes.grid(True, alpha=0.3)
            axes.set(xlim=(-0.6, 1.02), xlabel="cosine, channels' mean removed", ylabel="pages or pairs (%)")
            axes.label_outer()
    handles, labels = max(
        (axes.get_legend_handles_labels() for line in grid for axes in line), key=lambda hl: len(hl[1])
    )
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    return figure


def layer_similarity(found: Mapping[str, Any]) -> Any:
    """By layer: nearest pages beside the baseline, repeated text, and neighbouring layers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    (near, other), (repeated, neighbours) = figure.subplots(2, 2)
    layers = [shape["layer"] for shape in found["model"]["layers"]]
    for kind in found["kinds"]:
        colour, marker = STYLES[kind]
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.4}
        by_layer = [[r for r in found["heads"] if r["kind"] == kind and r["layer"] == layer] for layer in layers]
        for axes, scope in ((near, "within"), (other, "across")):
            _line(axes, layers, [mean_of(r, f"nearest_{scope}") for r in by_layer], NAMES[kind], "-", style)
            faint = {**style, "markerfacecolor": "white", "linewidth": 0.9}
            shuffled = [mean_of(r, f"nearest_{scope}_shuffled") for r in by_layer]
            _line(axes, layers, shuffled, f"{NAMES[kind]}, shuffled", "--", faint)
        _line(repeated, layers, [mean_of(r, "repeated_within") for r in by_layer], NAMES[kind], "-", style)
        own = [row for row in found["neighbouring_layers"] if row["kind"] == kind]
        places = [fmean(row["layers"]) for row in own]
        _line(neighbours, places, [row["cka"] for row in own], NAMES[kind], "-", style)
        shuffled = [row["cka_shuffled"] for row in own]
        _line(neighbours, places, shuffled, f"{NAMES[kind]}, shuffled", "--", {**style, "markerfacecolor": "white"})
    near.set_title("Nearest earlier page of the prompt", fontsize=10)
    other.set_title("Nearest page in other prompts", fontsize=10)
    repeated.set_title("Same text twice in a prompt, at any offset", fontsize=10)
    neighbours.set_title("Neighbouring layers", fontsize=10)
    full = [shape["layer"] for shape in found["model"]["layers"] if shape["window"] is None]
    for axes in (near, other, repeated, neighbours):
        axes.set_xlabel("layer" if axes is not neighbours else "between layers")
        axes.set_ylabel("mean cosine, channels' mean removed" if axes is not neighbours else "linear CKA (0 to 1)")
        axes.grid(True, alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(full) < len(layers):
            for layer in full:
                axes.axvline(layer, color="0.85", linewidth=6, zorder=0)
        if not axes.lines or all(not len(line.get_xdata()) for line in axes.lines):
            axes.text(0.5, 0.5, "nothing of this kind in these prompts", ha="center", transform=axes.transAxes)
    if len(full) < len(layers):
        figure.supxlabel("Grey bars: layers with full attention; the others have a sliding window.", fontsize=9)
    handles, labels = near.get_legend_handles_labels()
    if not handles:
        handles, labels = other.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    return figure


def compression_opportunities(found: Mapping[str, Any]) -> Any:
    """What sharing could save by threshold, what was saved, and what caches cost that were measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    scopes = {
        "within": ("each prompt by itself", {"color": "#08306b", "marker": "o", "markersize": 10}),
        "batch": ("prompts in one batch", {"color": "#d6604d", "marker": "s", "markersize": 5}),
    }
    for scope, (label, style) in scopes.items():
        rows = [row for row in found["savings"]["total"] if row["scope"] == scope]
        if rows:
            y = [100 * row["saved_share"] for row in rows]
            left.plot([row["threshold"] for row in rows], y, "-", label=f"{label}, estimate", **style)
        measured = found["measured"]["alone" if scope == "within" else "batch"]
        plain = next((row for row in measured if row["cache"] == "balanced"), None)
        taken = [row for row in measured if row["pages_shared"] is not None]
        if plain and taken:
            x = [row["spec"]["settings"]["similarity_threshold"] for row in taken]
            y = [100 * (1 - row["nbytes"] / plain["nbytes"]) for row in taken]
            left.plot(x, y, "--", label=f"{label}, CPACCache (measured)", **{**style, "markerfacecolor": "white"})
    left.set(xlabel="similarity threshold (cosine)", ylabel="bytes saved on top of 4 bits (%)")
    left.set_title("Sharing similar pages", fontsize=10)
    left.set_ylim(bottom=0)
    left.grid(True, alpha=0.3)
    if left.lines:
        left.legend(fontsize=8)
    else:
        left.text(0.5, 0.5, "no page is stored packed", ha="center", transform=left.transAxes)
    rows = [row for row in found["measured"]["alone"] if row["spec"] is not None]
    for row in rows:
        threshold = row["spec"]["settings"].get("similarity_threshold")
        name = row["cache"] if threshold is None else "CPACCache, all thresholds"
        style = {"marker": "x", "color": "#d6604d"} if threshold else {"marker": MARKERS[name], "color": "#08306b"}
        known = right.get_legend_handles_labels()[1]
        right.plot(row["ratio"], row["kl"], linestyle="", label=None if name in known else name, markersize=7, **style)
    if rows:
        right.axhline(found["settings"]["target_kl"], color="0.5", linestyle=":", linewidth=1, label="KL allowed")
        right.legend(fontsize=8)
        right.set_yscale("log")
        right.margins(x=0.2)
    else:
        right.text(0.5, 0.5, "nothing was measured", ha="center", transform=right.transAxes)
        right.set(xticks=[], yticks=[])
    right.set(xlabel="compression ratio (uncompressed bytes / bytes held)", ylabel="KL divergence (nats a token)")
    right.set_title("Caches measured on the prompts", fontsize=10)
    right.grid(True, alpha=0.3)
    return figure


PLOTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "similarity_distribution": similarity_distribution,
    "layer_similarity": layer_similarity,
    "compression_opportunities": compression_opportunities,
}


def save_plots(report: AnalysisReport, folder: Path) -> list[Path]:
    """All plots as PNG files."""
    written = []
    for name, draw in PLOTS.items():
        written.append(folder / f"{name}.png")
        draw(report.found).savefig(written[-1], dpi=110, metadata={"Software": None})
    return written


def _line(axes: Any, x: list[Any], y: list[float | None], label: str, line: str, style: dict[str, Any]) -> None:
    """Points that there are."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    if points:
        axes.plot([a for a, _ in points], [b for _, b in points], line, label=label, **style)
