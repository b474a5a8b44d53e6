"""The report of an analysis: JSON, tables, pandas, plots, one HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .sentences import findings, overview, title
from .tables import layer_table, measured_table, savings_table

SCHEMA = "hf_kvcompress.analysis"
SCHEMA_VERSION = 1
FILE = "analysis_report.json"
HTML = "analysis_report.html"


class AnalysisReport:
    """What `analyze` found.

    Args:
        found: as `docs/analysis.md` describes it, JSON-ready.
    """

    def __init__(self, found: Mapping[str, Any]):
        self.found = dict(found)

    def __getitem__(self, name: str) -> Any:
        return self.found[name]

    @property
    def recommendation(self) -> dict[str, Any]:
        """The cache to use: `code`, `ratio`, `measured`, `kl` and why."""
        return dict(self.found["recommendation"])

    # -- files -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return self.found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> AnalysisReport:
        """Raises ValueError for another schema, or one of a newer version."""
        if found.get("schema") != SCHEMA:
            raise ValueError(f"schema: expected {SCHEMA!r}, got {found.get('schema')!r}")
        if found.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema_version: expected {SCHEMA_VERSION}, got {found.get('schema_version')!r}")
        return cls(found)

    @classmethod
    def load(cls, path: str | Path) -> AnalysisReport:
        """From the JSON file that `save` wrote, or its folder."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))

    def save(self, folder: str | Path) -> list[Path]:
        """`analysis_report.json` and, where matplotlib and jinja2 are installed, three plots and one HTML file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.found, indent=1, allow_nan=False) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")
        written = [folder / FILE]
        try:
            import jinja2  # noqa: F401
            import matplotlib  # noqa: F401
        except ImportError:
            return written
        from .html import page
        from .plots import save_plots

        plots = save_plots(self, folder)
        (folder / HTML).write_text(page(self, plots), encoding="utf-8")
        return [*written, *plots, folder / HTML]

    # -- forms -----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return "\n".join([title(self.found), *findings(self.found), "", *overview(self.found)])

    def _repr_html_(self) -> str:
        """Findings and tables, for a notebook."""
        from html import escape

        said = "".join(f"<li>{escape(line)}</li>" for line in [*findings(self.found), *overview(self.found)])
        tables = [table for table in (layer_table(self.found), savings_table(self.found), measured_table(self.found))]
        return f"<h4>{escape(title(self.found))}</h4><ul>{said}</ul>" + "".join(t.html() for t in tables if t.rows)

    def to_pandas(self) -> Any:
        """A row a layer, head and kind: mean cosines beside their baseline, shares and channel statistics."""
        import pandas

        rows = []
        for row in self.found["heads"]:
            flat = {name: row[name] for name in ("layer", "head", "kind", "pages", "duplicates")}
            for name, metrics in row["compared"].items():
                flat |= {f"{name} {metric}": own.get("mean") for metric, own in metrics.items()}
            flat |= {f"beyond baseline, {scope}": share for scope, share in row["beyond_baseline"].items()}
            flat |= {name: value for name, value in row["channels"].items() if name != "largest"}
            rows.append(flat)
        return pandas.DataFrame(rows).set_index(["layer", "head", "kind"])

    def plot(self, name: str = "similarity_distribution") -> Any:
        """A matplotlib figure: similarity_distribution, layer_similarity or compression_opportunities."""
        from .plots import PLOTS

        if name not in PLOTS:
            raise ValueError(f"name: expected one of {', '.join(PLOTS)}, got {name!r}")
        return PLOTS[name](self.found)
