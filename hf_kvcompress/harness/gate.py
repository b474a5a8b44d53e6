"""A regression gate: the figures of a run against recorded ones, each within its tolerance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .report import COLUMNS, Report, markdown_table

TASK = "task "
#: settings that figures depend on; versions are told, but may differ
SETTINGS = ("suite", "bench")


@dataclass(frozen=True)
class Tolerance:
    """How far a figure may move to the worse.

    Args:
        part: of the recorded figure.
        least: at least this much, in the figure's unit.
        sign: 1 where more is worse, -1 where less is.
        why: what moves it when nothing is wrong.
    """

    part: float
    least: float
    sign: int
    why: str

    def of(self, recorded: float) -> float:
        return max(self.part * abs(recorded), self.least)


ROUNDING = (
    "runs are paired, with the same texts and seeds: torch instead of the compiled products moves it by less than a "
    "thousandth of a percent; the rest is room for other processors and versions"
)
TOLERANCES: dict[str, Tolerance] = {
    "ratio": Tolerance(0.005, 0.0, -1, "bytes are counted: the compiled products and torch differ by a thousandth"),
    "KL": Tolerance(0.03, 2e-6, 1, ROUNDING),
    "top-1": Tolerance(0.0, 0.011, -1, "two positions at a near tie"),
    "attention": Tolerance(0.03, 1e-5, 1, ROUNDING),
    "answer KL": Tolerance(0.05, 1e-4, 1, ROUNDING + "; below 1e-4 an answer is certain"),
    TASK.strip(): Tolerance(0.0, 0.07, -1, "one answer in sixteen at a near tie"),
}


@dataclass(frozen=True)
class Moved:
    """A figure outside its tolerance; `verdict` is worse, better, missing or new."""

    cache: str
    figure: str
    recorded: float | None
    measured: float | None
    tolerance: float
    verdict: str

    @property
    def fails(self) -> bool:
        return self.verdict in ("worse", "missing")


def figures(report: Report) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, spread and number of seeds, by cache and figure: what the gate watches of a report."""
    summary, tasks = report.summary(), report.task_summary()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for cache in report.caches:
        own = {column: summary[cache][column] for column in TOLERANCES if column in summary[cache]}
        for task, result in tasks.items():
            if result["admissible"] and cache in result["scores"]:
                own[TASK + task] = result["scores"][cache]
        found[cache] = own
    return found


def record(report: Report, command: str) -> dict[str, Any]:
    """What to keep of a run, JSON-ready: settings, versions, and each figure with its tolerance."""
    kept = {
        cache: {
            figure: {**_rounded(own), "tolerance": _round(_tolerance(figure).of(own["mean"]))}
            for figure, own in found.items()
        }
        for cache, found in figures(report).items()
    }
    why = {name: own.why for name, own in TOLERANCES.items()}
    own = {name: report.run[name] for name in (*SETTINGS, "versions", "devices") if name in report.run}
    return {"command": command, **own, "why": why, "figures": kept}


def differences(recorded: Mapping[str, Any], report: Report) -> list[str]:
    """Settings in which a run is not the recorded one: a text that another Python brings, for example."""
    return [
        f"{part}.{name}"
        for part in SETTINGS
        for name in {**recorded[part], **report.run[part]}
        if recorded[part].get(name) != report.run[part].get(name)
    ]


def compare(recorded: Mapping[str, Any], report: Report, whole: bool = True) -> list[Moved]:
    """Every figure outside its tolerance.

    Args:
        recorded: what `record` gave.
        whole: what is recorded and was not measured is missing; otherwise caches may be left out.
    """
    measured = figures(report)
    moved = []
    for cache, own in recorded["figures"].items():
        if cache not in measured and not whole:
            continue
        for figure, before in own.items():
            now = measured.get(cache, {}).get(figure)
            verdict = "missing" if now is None else _verdict(figure, before, now)
            if verdict:
                mean = None if now is None else now["mean"]
                moved.append(Moved(cache, figure, before["mean"], mean, before["tolerance"], verdict))
    for cache, own in measured.items():
        for figure, now in own.items():
            if figure not in recorded["figures"].get(cache, {}):
                moved.append(Moved(cache, figure, None, now["mean"], 0.0, "new"))
    return moved


def table(moved: Sequence[Moved]) -> str:
    """As Markdown, what fails first."""

    def number(figure: str, value: float | None) -> str:
        form = COLUMNS[figure][2] if figure in COLUMNS else ".3f"
        return "" if value is None else format(value, ".5f" if form == ".4f" else form)

    rows = [
        [m.verdict, m.cache, m.figure, *(number(m.figure, v) for v in (m.recorded, m.measured, m.tolerance))]
        for m in sorted(moved, key=lambda m: (not m.fails, m.verdict, m.cache, m.figure))
    ]
    return markdown_table(["", "cache", "figure", "recorded", "measured", "may move by"], rows)


def _verdict(figure: str, before: Mapping[str, float], now: Mapping[str, float]) -> str:
    worse = (now["mean"] - before["mean"]) * _tolerance(figure).sign
    return "worse" if worse > before["tolerance"] else "better" if worse < -before["tolerance"] else ""


def _tolerance(figure: str) -> Tolerance:
    return TOLERANCES[TASK.strip() if figure.startswith(TASK) else figure]


def _rounded(own: Mapping[str, float]) -> dict[str, float]:
    return {name: _round(value) for name, value in own.items()}


def _round(value: float) -> float:
    return float(f"{value:.6g}") if isinstance(value, float) else value
