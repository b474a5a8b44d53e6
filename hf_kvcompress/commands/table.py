"""The table of a comparison, in a terminal and as Markdown."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import JustifyMethod
from rich.table import Table

from .compare import Row

HEADER = ("cache", "MB", "ratio", "bits", "PPL", "ΔPPL", "KL", "top-1", "pass key", "prefill tok/s", "decode tok/s")
CAPTION = (
    "MB: every tensor the cache holds after prompt, question and answer. ratio: MB of the uncompressed cache over it. "
    "bits: of a packed number, scales included. KL, top-1: next-token distribution against the uncompressed model."
)


def cells(row: Row) -> list[str]:
    """One row as text; empty cells for what could not be measured."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    found = {True: "yes", False: "no", None: ""}[row.passkey_found]
    return [
        row.name,
        "n/a" if row.nbytes is None else f"{row.nbytes / 2**20:.2f}",
        number(row.ratio, ".2f"),
        number(row.bits, ".2f"),
        number(row.perplexity, ".2f"),
        number(row.delta_perplexity, "+.3f"),
        number(row.mean_kl, ".4f"),
        number(row.top1_agreement, ".3f"),
        found,
        number(row.prefill_tokens_per_second, ",.0f"),
        number(row.decode_tokens_per_second, ".1f"),
    ]


def notes(rows: list[Row]) -> list[str]:
    """A line for each row that needs one."""
    return [f"{row.name}: {row.unavailable or row.note}" for row in rows if row.unavailable or row.note]


def rich_table(rows: list[Row], title: str) -> Table:
    """For a terminal."""
    # narrow enough for 80 columns, whole: a number that is cut off says nothing
    table = Table(title=title, caption=CAPTION, caption_justify="left", box=SIMPLE, padding=0)
    for name in HEADER:
        side: JustifyMethod = "left" if name in ("cache", "pass key") else "right"
        table.add_column(name.replace(" ", "\n"), justify=side, no_wrap=True)
    for row in rows:
        table.add_row(*cells(row), style="dim" if row.unavailable else None)
    return table


def markdown(rows: list[Row]) -> str:
    """For a README."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in rows])
