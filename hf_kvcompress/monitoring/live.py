"""A table of what a monitor sees, while it sees it: in a terminal, or in a notebook."""

from __future__ import annotations

import time
from typing import Any

import torch

from .recording import Recording

MB = 1024 * 1024
EVERY = 0.5  # seconds between two pictures
BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 32


def table_of(recording: Recording, title: str) -> Any:
    """A rich table: a line for each head that is looked at, with the attention of its newest query."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=title, box=SIMPLE, title_justify="left", caption=_caption(recording), caption_justify="left")
    for name in ("layer", "head", "pages", "query at", "hottest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("attention, first page to last", no_wrap=True)
    for lane in recording.lanes():
        series = recording.masses.get(lane)
        if not series:
            table.add_row(str(lane[0]), str(lane[1]), str(len(recording.pages.get(lane, ()))), "", "", "not visible")
            continue
        last = series[-1]
        page = int(last.mass.argmax())
        hottest = f"page {page}: {float(last.mass[page]):.0%}"
        table.add_row(
            str(lane[0]), str(lane[1]), str(len(last.mass)), f"{last.seen:,}", hottest, sparkline(last.mass, WIDTH)
        )
    return table


def title_of(recording: Recording) -> str:
    """The newest numbers in a line."""
    if not recording.steps:
        return "waiting for the first captured pass"
    last = recording.steps[-1]
    first = recording.steps[max(len(recording.steps) - 20, 0)]
    took = last["time"] - first["time"]
    speed = f", {(last['step'] - first['step']) / took:,.1f} passes/s" if took > 0 else ""
    return (
        f"{last['seen']:,} tokens seen, {last['tokens_held']:,} held, {last['nbytes'] / MB:.2f} MB "
        f"({last['compression_ratio']:.2f}x){speed}"
    )


def _caption(recording: Recording) -> str:
    cost = recording.header.get("cost")
    dropped = recording.header.get("dropped", 0)
    parts = [f"the monitor takes {cost:.1%} of the time"] if cost is not None else []
    return ", ".join([*parts, *([f"{dropped} captures dropped"] if dropped else [])])


def sparkline(mass: torch.Tensor, width: int) -> str:
    """Parts of 1 as bars, at most `width` of them, on a scale of square roots: single pages get most of it."""
    if len(mass) > width:
        groups = torch.arange(len(mass)) * width // len(mass)
        mass = torch.zeros(width).index_add_(0, groups, mass.float())
    levels = (mass.clamp(0, 1).sqrt() * (len(BARS) - 1)).ceil().long()
    return "".join(BARS[level] for level in levels.tolist())


class LiveTable:
    """Shows a recording until it is stopped; whoever owns it calls `refresh` now and then.

    Args:
        console: rich's, or None for a new one.
    """

    def __init__(self, console: Any = None):
        from rich.console import Console
        from rich.live import Live

        self.console = console or Console()
        self._shown = 0.0
        self._handle: Any = None
        self._live: Any = None
        if self.console.is_jupyter:
            from IPython.display import HTML, display

            self._handle = display(HTML("<p>waiting</p>"), display_id=True)
        else:
            self._live = Live(console=self.console, auto_refresh=False, transient=False)
            self._live.start()

    def refresh(self, recording: Recording, at_once: bool = False) -> None:
        """Show what is there now, unless that was done a moment ago."""
        now = time.monotonic()
        if not at_once and now - self._shown < EVERY:
            return
        self._shown = now
        copied = recording.copy()
        if self._live is not None:
            self._live.update(table_of(copied, title_of(copied)), refresh=True)
        else:
            from IPython.display import HTML

            self._handle.update(HTML(html_of(copied)))

    def stop(self, recording: Recording) -> None:
        """Show the last state and leave it there."""
        self.refresh(recording, at_once=True)
        if self._live is not None:
            self._live.stop()


def html_of(recording: Recording) -> str:
    """The table as HTML, for notebooks."""
    from html import escape

    rows = []
    for lane in recording.lanes():
        series = recording.masses.get(lane)
        bars = sparkline(series[-1].mass, WIDTH) if series else "attention not visible"
        rows.append(f"<tr><td>{lane[0]}</td><td>{lane[1]}</td><td><code>{escape(bars)}</code></td></tr>")
    head = "<tr><th>layer</th><th>head</th><th>attention, first page to last</th></tr>"
    text = f"<p>{escape(title_of(recording))}. {escape(_caption(recording))}</p>"
    return f"{text}<table>{head}{''.join(rows)}</table>" if rows else text
