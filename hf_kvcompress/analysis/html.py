"""The report as one HTML file that needs nothing beside it. Needs jinja2."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .sentences import findings, overview, title
from .tables import layer_table, measured_table, savings_table, similar_table

if TYPE_CHECKING:
    from .report import AnalysisReport

TEMPLATE = Path(__file__).parent / "report.html.j2"
CAPTIONS = {
    "similarity_distribution": "How alike pages are, over all layers and heads. What lies well right of the dashed "
    "line is redundancy; what the dashed line reaches comes about by chance.",
    "layer_similarity": "The same by layer, and how alike neighbouring layers are.",
    "compression_opportunities": "What sharing pages could save and what it did save; what caches cost on the prompts.",
}


def page(report: AnalysisReport, plots: Sequence[Path]) -> str:
    """The whole file; plots are embedded."""
    from jinja2 import Environment

    found = report.found
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    images = [
        {
            "name": path.stem.replace("_", " ").capitalize(),
            "data": base64.b64encode(path.read_bytes()).decode(),
            "caption": CAPTIONS[path.stem],
        }
        for path in plots
    ]
    return template.render(
        title=title(found),
        findings=findings(found),
        overview=overview(found),
        found=found,
        code=found["recommendation"]["code"],
        images=images,
        measured=measured_table(found),
        savings=savings_table(found),
        similar=similar_table(found),
        layers=layer_table(found),
    )
