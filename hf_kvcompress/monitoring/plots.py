"""The figure of a monitor's report. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .recording import Lane
from .temporal import APART, Usage

if TYPE_CHECKING:
    from .report import Report

MB = 1024 * 1024
CELLS = 400  # of the heat map along each side at most


def figure_of(report: Report, lane: Lane | None = None) -> Any:
    """Four panels, legible in grey. `lane` is the layer and head of the heat map, by default the last one.

    Raises ValueError for a lane without captured attention.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    if lane is not None and lane not in report.usages:
        raise ValueError(f"lane: expected one of {sorted(report.usages)}, whose attention was captured, got {lane}")
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    memory, heat, rests, alike = figure.subplots(2, 2).flatten()
    _memory(memory, report.recording.steps)
    chosen = lane or max(report.usages, default=None)
    _heat(figure, heat, report.usages.get(chosen) if chosen is not None else None)
    _rests(rests, *report.rests)
    _alike(alike, report)
    figure.suptitle(f"{report.recording.header.get('cache', 'cache')}: what was held and read while generating")
    return figure


def _empty(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="0.35")
    axes.set_xticks([])
    axes.set_yticks([])


def _memory(axes: Any, steps: list[dict[str, Any]]) -> None:
    axes.set(title="Memory over the text", xlabel="tokens seen", ylabel="MB")
    if not steps:
        _empty(axes, "nothing was captured")
        return
    seen = [step["seen"] for step in steps]
    style = {"marker": "."} if len(steps) < 40 else {}
    axes.plot(seen, [step["nbytes"] / MB for step in steps], color="black", label="held", **style)
    plain = [step["uncompressed_bytes"] / MB for step in steps]
    axes.plot(seen, plain, color="0.55", linestyle="--", label="the same tokens uncompressed")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(True, alpha=0.3)


def _heat(figure: Any, axes: Any, usage: Usage | None) -> None:
    axes.set(title="Attention by page", xlabel="tokens seen (captured queries)", ylabel="page")
    if usage is None:
        _empty(axes, "attention was not visible")
        return
    from matplotlib.colors import LogNorm

    mass = usage.mass[_thin(usage.mass.shape[0])][:, _thin(usage.pages)]
    shown = mass.clamp(min=1e-4).T.numpy()
    image = axes.imshow(shown, aspect="auto", origin="lower", cmap="Greys", norm=LogNorm(1e-4, 1), interpolation="none")
    axes.set_facecolor("white")
    ticks = sorted({round(i * (len(mass) - 1) / 4) for i in range(5)})
    seen = [usage.seen[i] for i in _thin(len(usage.seen)).tolist()]
    axes.set_xticks(ticks, [f"{seen[i]:,}" for i in ticks])
    places = sorted({round(i * (mass.shape[1] - 1) / 5) for i in range(6)})
    axes.set_yticks(places, [str(_thin(usage.pages).tolist()[i]) for i in places])
    axes.set_title(f"Attention by page, layer {usage.lane[0]}, head {usage.lane[1]}")
    figure.colorbar(image, ax=axes, label="part of a query's attention")


def _thin(length: int) -> torch.Tensor:
    """Numbers of at most `CELLS` of so many, evenly spread."""
    return torch.arange(0, length, -(-length // CELLS))


def _rests(axes: Any, ended: list[int], lasting: list[int]) -> None:
    axes.set(title="How long pages rest", xlabel="tokens without a use", ylabel="rests")
    if not ended and not lasting:
        _empty(axes, "no page was seen to rest")
        return
    longest = max([*ended, *lasting, 1])
    edges = torch.logspace(0, torch.tensor(float(longest + 1)).log2().item(), 16, base=2).tolist()
    axes.hist(
        [ended, lasting], bins=edges, label=["ended by a use", "lasting to the end"], color=["black", "0.75"],
        edgecolor="black",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend()


def _alike(axes: Any, report: Report) -> None:
    axes.set(title="Alike pages: used together or apart", xlabel="queries that used both / either", ylabel="cosine")
    pairs = [pair for pair in report.alike if pair.overlap is not None]
    if not pairs:
        _empty(axes, "no alike pages whose use was seen" if report.alike else "no two pages are alike")
        return
    for role, marker, color in (("key", "o", "black"), ("value", "s", "0.6")):
        own = [pair for pair in pairs if pair.role == role]
        if own:
            points = [pair.overlap for pair in own], [pair.cosine for pair in own]
            axes.scatter(*points, marker=marker, color=color, edgecolor="black", label=f"{role}s", s=22)
    axes.axvspan(-0.03, APART, color="0.92", zorder=0, label="used at different times")
    axes.set_xlim(-0.03, 1.03)
    axes.legend()
