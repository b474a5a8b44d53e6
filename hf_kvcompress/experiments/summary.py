"""What several experiments found, side by side: JSON, Markdown and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..environment import devices, versions
from ..harness.report import COLUMNS, markdown_table
from .report import SCHEMA, ExperimentReport, write

#: of the harness's columns
SHOWN = ("MB", "ratio", "PPL", "KL", "same tokens", "prefill tok/s", "decode tok/s", "peak MB")

REDUNDANCY = (
    "Text repeated: pages that repeat a passage of their own prompt. Cosine of a page with the nearest earlier one, in "
    "brackets that of shuffled pages. Saved: estimated part of the packed bytes that sharing pages of at least that "
    "cosine would save within a prompt."
)


class Summary:
    """All experiments of a run, in their order."""

    def __init__(self, reports: Sequence[ExperimentReport]):
        self.reports = list(reports)

    @property
    def failed(self) -> list[ExperimentReport]:
        return [report for report in self.reports if report.status == "failed"]

    def caches(self) -> list[str]:
        """Every cache of any experiment, in the order of their first."""
        return list(dict.fromkeys(c for r in self.reports if r.measured for c in r.measured.caches))

    def means(self) -> dict[str, dict[str, dict[str, float]]]:
        """By experiment, cache and column: the mean over prompts, in the column's unit."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for report in self.reports:
            if report.measured is not None:
                found[report.name] = {
                    cache: {column: own["mean"] * COLUMNS[column][3] for column, own in columns.items()}
                    for cache, columns in report.measured.summary().items()
                }
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the version of its form."""
        means = self.means()
        experiments = [
            {
                "name": report.name,
                "status": report.status,
                "reason": report.reason,
                "model": report.settings["experiment"]["model"],
                "prompt_tokens": list(report.prompt_tokens),
                "seconds": report.seconds,
                "caches": means.get(report.name, {}),
                "redundancy": report.redundancy,
            }
            for report in self.reports
        ]
        return {"schema": SCHEMA, "versions": versions(), "devices": devices(), "experiments": experiments}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, one an experiment and cache, as text."""
        means = self.means()
        used = [c for c in SHOWN if any(c in own for caches in means.values() for own in caches.values())]
        rows = [
            [name if number == 0 else "", cache, *(format(own[c], COLUMNS[c][2]) if c in own else "" for c in used)]
            for name, caches in means.items()
            for number, (cache, own) in enumerate(caches.items())
        ]
        return ["experiment", "cache", *used], rows

    def redundancy_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, one an experiment, as text."""
        found = [(report.name, report.redundancy) for report in self.reports if report.redundancy]
        kinds = list(dict.fromkeys(kind for _, own in found for kind in own["cosine"]))
        marks = list(dict.fromkeys(mark for _, own in found for mark in own["saved_within"]))
        rows = []
        for name, own in found:
            cosines = [(own["cosine"].get(kind), own["cosine_shuffled"].get(kind)) for kind in kinds]
            cells = ["" if a is None or b is None else f"{a:.2f} ({b:.2f})" for a, b in cosines]
            shares = [f"{own['saved_within'][mark]:.1%}" if mark in own["saved_within"] else "" for mark in marks]
            rows.append([name, f"{own['repeated_within']:.0%}", *cells, *shares])
        header = ["experiment", "text repeated", *(kind.replace("_", " ") for kind in kinds)]
        return [*header, *(f"saved at {mark}" for mark in marks)], rows

    def markdown(self) -> str:
        """The table, what failed and why, and where to read on."""
        done = len(self.reports) - len(self.failed)
        parts = ["# Experiments", f"{done} of {len(self.reports)} finished."]
        if done:
            parts += [markdown_table(*self.table()), "Means over prompts; spreads and answers are in each report."]
        if any(report.redundancy for report in self.reports):
            parts += ["## Redundancy of the pages", markdown_table(*self.redundancy_table()), REDUNDANCY]
        parts += [f"{report.name} failed: {report.reason}" for report in self.failed]
        parts.append("\n".join(f"- [{r.name}](<{r.name}/report.md>)" for r in self.reports))
        return "\n\n".join(parts)

    def save(self, folder: Path, with_plots: bool = True) -> None:
        """`summary.json`, `summary.md` and, where matplotlib is installed, plots."""
        text = self.markdown()
        if with_plots and find_spec("matplotlib") is not None:
            from .plots import save_plots

            text += "".join(f"\n\n![{title}]({file})" for file, title in save_plots(self, folder).items())
        write(folder / "summary.md", text + "\n")
        write(folder / "summary.json", json.dumps(self.to_dict(), indent=1) + "\n")
