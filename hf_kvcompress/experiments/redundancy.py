"""How redundant the pages are that the prompts of an experiment make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..analysis.analyze import analyze
from ..analysis.sentences import findings
from ..analysis.tables import mean_of

FOLDER = "redundancy"
PAGE = 16  # tokens: prompts of experiments are shorter than those that are worth an analysis of their own
#: a prompt of fewer has no two pages after the first tokens, which always stay exact
LEAST_TOKENS = 64
THRESHOLDS = (0.8, 0.9, 0.95)


def redundancy_of(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[torch.Tensor],
    seed: int,
    folder: Path,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Sentences and a few means of `analyze` on the prompts alone; its whole report goes into `folder/redundancy`.

    Args:
        prompts: `[1, T]` each, one of them of `LEAST_TOKENS` or more.
    """
    report = analyze(
        model,
        tokenizer,
        list(prompts),
        max_tokens=0,
        page_size=PAGE,
        thresholds=THRESHOLDS,
        measured_prompts=0,
        seed=seed,
        on_progress=on_progress,
    )
    report.save(folder / FOLDER)
    rows = {kind: [row for row in report["heads"] if row["kind"] == kind] for kind in report["kinds"]}
    saved = {row["threshold"]: row["saved_share"] for row in report["savings"]["total"] if row["scope"] == "within"}
    return {
        "page_size": PAGE,
        "repeated_within": report["text"]["repeated_within"],
        "repeated_across": report["text"]["repeated_across"],
        "cosine": {kind: mean_of(own, "nearest_within") for kind, own in rows.items()},
        "cosine_shuffled": {kind: mean_of(own, "nearest_within_shuffled") for kind, own in rows.items()},
        "saved_within": {str(threshold): share for threshold, share in saved.items()},
        "findings": findings(report.found),
    }
