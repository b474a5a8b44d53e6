"""Results of a run: means and spreads over seeds, as a table, JSON, pandas and plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..showing import html_table
from .specs import BASELINE

#: a task counts in averages if the uncompressed model gets this part of it right
ADMITTED = 0.9
MB = 2**20
#: column -> measure, value, format, factor. Units of one measure and seed are averaged first: the spread is over seeds.
COLUMNS: dict[str, tuple[str, str, str, float]] = {
    "MB": ("generation", "nbytes", ".2f", 1 / MB),
    "ratio": ("generation", "ratio", ".2f", 1),
    "PPL": ("perplexity:chunk", "perplexity", ".2f", 1),
    "KL": ("perplexity:chunk", "kl", ".4f", 1),
    "top-1": ("perplexity:chunk", "top1", ".3f", 1),
    "PPL, step": ("perplexity:step", "perplexity", ".2f", 1),
    "KL, step": ("perplexity:step", "kl", ".4f", 1),
    "attention": ("attention", "error", ".4f", 1),
    "same tokens": ("generation", "same_tokens", ".3f", 1),
    "diverges at": ("generation", "first_divergence", ".1f", 1),
    "ROUGE-L": ("generation", "rouge_l", ".3f", 1),
    "tasks": ("task", "score", ".3f", 1),
    "answer KL": ("task", "kl", ".4f", 1),
    "prefill tok/s": ("speed", "prefill_rate", ",.0f", 1),
    "decode tok/s": ("speed", "decode_rate", ".1f", 1),
    "step ms p50": ("speed", "step_ms_p50", ".1f", 1),
    "p90": ("speed", "step_ms_p90", ".1f", 1),
    "p99": ("speed", "step_ms_p99", ".1f", 1),
    "peak MB": ("speed", "peak_bytes", ".1f", 1 / MB),
}
CAPTION = (
    "MB: every tensor the cache holds. KL, top-1, attention (relative error of its output, mean over layers), same "
    "tokens, diverges at, ROUGE-L and answer KL: against the uncompressed model. tasks: mean over those that the "
    "uncompressed model gets at least 90 % right. ±: standard deviation over seeds."
)


#: parts of a report's JSON that are not settings
DERIVED = ("seconds", "cpu_seconds", "notes", "summary", "tasks", "rows")


class Report:
    """What a run measured.

    Args:
        run: settings, versions and devices, JSON-ready.
        rows: one a unit and cache.
        notes: by cache.
        seconds, cpu_seconds: of this run, of the clock and of all processes and their threads; of its last part if it
            was taken up again.
    """

    def __init__(
        self,
        run: Mapping[str, Any],
        rows: Sequence[dict[str, Any]],
        notes: Mapping[str, str],
        seconds: float,
        cpu_seconds: float = 0.0,
    ):
        self.run, self.rows, self.notes = dict(run), list(rows), dict(notes)
        self.seconds, self.cpu_seconds = seconds, cpu_seconds
        for row in self.rows:
            said, why = self.notes.get(row["cache"], ""), f"{row['measure']} not run: {row.get('unavailable')}"
            if "unavailable" in row and why not in said:
                self.notes[row["cache"]] = f"{said}; {why}".removeprefix("; ")

    @property
    def caches(self) -> list[str]:
        return list(self.run["caches"])

    # -- numbers ---------------------------------------------------------------------------------------------------

    def tasks(self) -> dict[str, bool]:
        """Tasks by name, and whether each is admissible."""
        scores: dict[str, list[float]] = {}
        for row in self.rows:
            if row["measure"] == "task" and row["cache"] == BASELINE:
                scores.setdefault(row["name"], []).append(row["values"]["score"])
        return {name: statistics.fmean(own) >= ADMITTED for name, own in scores.items()}

    def values(self, cache: str, measure: str, value: str, name: str | None = None) -> list[float]:
        """One number a seed, mean over the units of it: of one name, or of all that count in averages."""
        kind, _, mode = measure.partition(":")
        admitted = self.tasks()
        by_seed: dict[int, list[float]] = {}
        for row in self.rows:
            if row["cache"] != cache or row["measure"] != kind or value not in row["values"]:
                continue
            if mode and row["name"].partition(":")[0] != mode or name is not None and row["name"] != name:
                continue
            if kind == "task" and value == "score" and name is None and not admitted[row["name"]]:
                continue
            by_seed.setdefault(row["seed"], []).append(row["values"][value])
        return [statistics.fmean(own) for _, own in sorted(by_seed.items())]

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean, spread (standard deviation over seeds) and number of seeds, by cache and column."""
        found = {}
        for cache in self.caches:
            columns = {c: self.values(cache, m, v) for c, (m, v, _, _) in COLUMNS.items()}
            found[cache] = {column: _spread(own) for column, own in columns.items() if own}
        return found

    def task_summary(self) -> dict[str, dict[str, Any]]:
        """By task: whether it is admissible, and mean and spread of its score by cache."""
        found: dict[str, dict[str, Any]] = {}
        for task, admissible in self.tasks().items():
            own = {cache: self.values(cache, "task", "score", task) for cache in self.caches}
            found[task] = {"admissible": admissible, "scores": {c: _spread(s) for c, s in own.items() if s}}
        return found

    # -- forms -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.run,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "notes": self.notes,
            "summary": self.summary(),
            "tasks": self.task_summary(),
            "rows": self.rows,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Report:
        own = {k: v for k, v in found.items() if k not in DERIVED}
        return cls(own, found["rows"], found["notes"], found["seconds"], found["cpu_seconds"])

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """From the JSON file that `save` wrote, or its folder."""
        path = Path(path)
        file = path / "report.json" if path.is_dir() else path
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))

    def save(self, folder: str | Path) -> None:
        """`report.json`, `report.md` and, where matplotlib is installed, plots."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.markdown() + "\n", encoding="utf-8")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return
        from .plots import save_plots

        save_plots(self, folder)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, one a cache, as text."""
        summary = self.summary()
        used = [column for column in COLUMNS if any(column in own for own in summary.values())]
        rows = [[cache, *(_cell(summary[cache].get(c), *COLUMNS[c][2:]) for c in used)] for cache in self.caches]
        return ["cache", *used], rows

    def _task_table(self) -> tuple[list[str], list[list[str]]]:
        tasks = self.task_summary()
        header = [name if own["admissible"] else f"({name})" for name, own in tasks.items()]
        rows = [
            [cache, *(_cell(own["scores"].get(cache), ".2f", 1) for own in tasks.values())] for cache in self.caches
        ]
        return ["cache", *header], rows

    def header(self) -> str:
        """What was run, on what, and how long it took."""
        bench, suite = self.run.get("bench", {}), self.run.get("suite", {})
        threads = self.run.get("devices", {}).get("threads", 1)
        what = [
            f"Suite {suite.get('name', 'none')}",
            f"{bench.get('model_type', 'a model')} in {bench.get('dtype', '?')} on {bench.get('device', '?')}",
            f"KL and perplexity in {bench.get('score_dtype', '?')}",
            f"{self.cpu_seconds:,.0f} s of CPU time and {self.seconds:,.0f} s of the clock",
            f"{self.run.get('processes', 1)} process(es) of {threads} thread(s)",
        ]
        return ", ".join(what) + "."

    def markdown(self) -> str:
        """What was run and for how long, the tables, and a line for each cache that needs one."""
        parts = [self.header(), markdown_table(*self.table()), CAPTION]
        if self.tasks():
            parts.append(markdown_table(*self._task_table()))
            if not all(self.tasks().values()):
                parts.append("In brackets: not admissible, the uncompressed model gets less than 90 % right.")
        return "\n\n".join([*parts, *(f"{cache}: {note}" for cache, note in self.notes.items())])

    def __repr__(self) -> str:
        header, rows = self.table()
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in (header, *rows))

    def _repr_html_(self) -> str:
        tables = [self.table(), *([self._task_table()] if self.tasks() else [])]
        return f"<p>{escape(CAPTION)}</p>" + "".join(html_table(*table) for table in tables)

    def to_pandas(self) -> Any:
        """A row a cache, a column a mean; spreads as `... std`. Needs pandas."""
        import pandas

        flat = {}
        for cache, columns in self.summary().items():
            means = {c: own["mean"] * COLUMNS[c][3] for c, own in columns.items()}
            spreads = {f"{c} std": own["std"] * COLUMNS[c][3] for c, own in columns.items()}
            flat[cache] = means | spreads
        return pandas.DataFrame.from_dict(flat, orient="index").rename_axis("cache")

    def plot(self, quality: str = "KL", against: str = "MB") -> Any:
        """A matplotlib figure of one column against another, the Pareto front as a line. Needs matplotlib."""
        from .plots import pareto_plot

        return pareto_plot(self, quality, against)


def _spread(numbers: Sequence[float]) -> dict[str, float]:
    std = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return {"mean": statistics.fmean(numbers), "std": std, "n": len(numbers)}


def _cell(own: Mapping[str, float] | None, form: str, factor: float) -> str:
    if own is None:
        return ""
    mean = format(own["mean"] * factor, form)
    return f"{mean} ± {format(own['std'] * factor, form)}" if own["n"] > 1 and own["std"] else mean


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, as Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
