"""`monitor(cache)`: what a cache holds and what attention reads of it, while it generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from .files import read
from .recording import Recording
from .report import Report
from .session import Monitor
from .settings import MonitorSettings

__all__ = ["Monitor", "MonitorSettings", "Recording", "Report", "monitor", "read"]


def monitor(
    cache: DynamicCache,
    *,
    model: PreTrainedModel | None = None,
    output_dir: str | Path | None = None,
    show: bool = False,
    **settings: Any,
) -> Monitor:
    """A context manager that looks on while `cache` is used: `with monitor(cache) as m: model.generate(...)`.

    Results are the same with and without it. Attention by page is seen where the model runs under `enable(model)`, or
    under sdpa if it is given here.

    Args:
        cache: of any kind of this package, or a `DynamicCache`.
        model: the model that uses it.
        output_dir: an empty or new folder that gets everything; None keeps it in memory.
        show: a live table in the terminal or the notebook; needs rich.
        settings: the fields of `MonitorSettings` (layers, heads, row, page_size, share, max_bytes, used, similar ...).

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    return Monitor(cache, MonitorSettings(**settings), model, output_dir, show)
