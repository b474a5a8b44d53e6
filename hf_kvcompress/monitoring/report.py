"""What a monitor found, as numbers, a text, a table, HTML, data frames and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from html import escape
from statistics import median
from typing import Any

from .recording import Lane, Recording
from .temporal import AlikePages, Usage, alike_pages, drift, returns, usages

MB = 1024 * 1024
SCHEMA = 1
PAIRS = 20  # that a report lists


class Report:
    """The analysis of a recording; computed when it is first asked for."""

    def __init__(self, recording: Recording):
        self.recording = recording

    @cached_property
    def usages(self) -> dict[Lane, Usage]:
        return usages(self.recording)

    @cached_property
    def alike(self) -> list[AlikePages]:
        return alike_pages(self.recording, self.usages)

    @cached_property
    def rests(self) -> tuple[list[int], list[int]]:
        """Of all heads that were looked at, in tokens: those that a use ended, and those that last."""
        found = [usage.rests() for usage in self.usages.values()]
        return [r for ended, _ in found for r in ended], [r for _, lasting in found for r in lasting]

    def heads(self) -> list[dict[str, Any]]:
        """A row for each head that was looked at."""
        rows = []
        for lane in self.recording.lanes():
            usage = self.usages.get(lane)
            own = [pair for pair in self.alike if (pair.layer, pair.head) == lane]
            row: dict[str, Any] = {"layer": lane[0], "head": lane[1]}
            row["whole_pages"] = len(self.recording.pages.get(lane, ()))
            row["queries"] = len(usage.seen) if usage else 0
            if usage is not None:
                row |= {
                    "pages": usage.pages,
                    "hot": [{"page": p, "mass": mass, "used": used} for p, mass, used in usage.hot()],
                    "pages_for_80_percent": usage.concentration(),
                    "cold_pages": len(usage.cold()),
                }
            row["alike_pairs"] = {role: sum(pair.role == role for pair in own) for role in ("key", "value")}
            row["alike_used_apart"] = sum(pair.apart for pair in own)
            rows.append(row)
        return rows

    def notes(self) -> list[str]:
        """What a reader has to know before believing the numbers."""
        recording, header = self.recording, self.recording.header
        lines = []
        if not recording.masses:
            lines.append(
                "Attention was not visible: the model ran without enable(model), and the monitor was given no model=. "
                "Pages are described by what they hold alone."
            )
        keys = header.get("keys_compared")
        if keys:
            lines.append(f"Keys are compared {keys}.")
        if header.get("unread"):
            lines.append("Tokens in host memory were not read: attention is shared out over the others.")
        kinds = {event["kind"]: event for event in recording.events}
        if "rows" in kinds:
            times = sum(event.get("times", 1) for event in recording.events if event["kind"] == "rows")
            lines.append(f"Rows moved {times} times: the row that was looked at is not always the same text.")
        if header.get("dropped"):
            lines.append(f"{header['dropped']} captures were dropped, since the monitor's thread had no room for them.")
        if recording.thinned:
            lines.append(f"Series were thinned out {recording.thinned} times to stay within max_bytes.")
        for event in recording.events:
            if event["kind"] == "error":
                lines.append(f"The monitor failed at step {event['step']}: {event['error']}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        steps, header = self.recording.steps, self.recording.header
        ended, lasting = self.rests
        return {
            "schema": SCHEMA,
            "header": dict(header),
            "captured_steps": len(steps),
            "last_step": steps[-1] if steps else None,
            "drift": drift(steps),
            "heads": self.heads(),
            "rests": {
                "ended": len(ended),
                "lasting": len(lasting),
                "median_tokens": median(ended) if ended else None,
                "longest_tokens": max(ended) if ended else None,
                "ended_by_a_use": {str(tokens): part for tokens, part in returns(self.rests).items()},
            },
            "alike_pairs": len(self.alike),
            "alike_used_apart": sum(pair.apart for pair in self.alike),
            "alike_examples": [
                {**vars(pair), "pages": list(pair.pages)} for pair in sorted(self.alike, key=_apart_first)[:PAIRS]
            ],
            "events": self.recording.events,
            "notes": self.notes(),
        }

    # -- for people ----------------------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """What was found, in a few sentences."""
        recording = self.recording
        steps = recording.steps
        if not steps:
            return ["Nothing was captured yet."]
        last, ended = steps[-1], self.rests[0]
        lines = [
            f"{recording.header.get('cache', 'cache')}: {last['seen']:,} tokens seen, {last['tokens_held']:,} held, "
            f"{last['nbytes'] / MB:.2f} MB ({last['compression_ratio']:.2f}x), {last['step']:,} passes, "
            f"{len(steps)} captured."
        ]
        slope = drift(steps).get("per_1000_tokens", {}).get("bytes_per_token")
        if slope is not None:
            before, after = drift(steps)["bytes_per_token"]
            lines.append(f"Bytes a token went from {before:,.0f} to {after:,.0f} ({slope:+,.0f} per 1,000 tokens).")
        if ended:
            part = returns(self.rests)
            tokens = max((t for t in part if t <= median(ended)), default=min(part, default=0))
            more = f"; {part[tokens]:.0%} of rests of {tokens} tokens or more were ended by a use" if part else ""
            lines.append(f"A page that is used again has rested for {median(ended):,.0f} tokens (median){more}.")
        if self.alike:
            lines.append(
                f"{len(self.alike)} pairs of pages are alike; {sum(p.apart for p in self.alike)} of them are used at "
                "different times."
            )
        return lines + self.notes()

    HEADER = ("layer", "head", "pages", "queries", "hottest page", "80 % on", "cold", "alike K / V", "apart")

    def cells(self) -> list[list[str]]:
        """A row of text for each head."""
        rows = []
        for row in self.heads():
            hot = row.get("hot") or [None]
            alike = row["alike_pairs"]
            known = "pages" in row
            rows.append(
                [
                    str(row["layer"]),
                    str(row["head"]),
                    str(row["pages"] if known else row["whole_pages"]),
                    str(row["queries"]),
                    f"{hot[0]['page']} ({hot[0]['mass']:.0%})" if hot[0] else "",
                    f"{row['pages_for_80_percent']} pages" if known else "",
                    str(row["cold_pages"]) if known else "",
                    f"{alike['key']} / {alike['value']}",
                    str(row["alike_used_apart"]) if known else "",
                ]
            )
        return rows

    def __repr__(self) -> str:
        rows = [list(self.HEADER), *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.HEADER))]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*self.lines(), "", *table]) if len(rows) > 1 else "\n".join(self.lines())

    def __rich__(self) -> Any:
        from rich.box import SIMPLE
        from rich.console import Group
        from rich.table import Table

        table = Table(box=SIMPLE, padding=(0, 1))
        for name in self.HEADER:
            table.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
        for row in self.cells():
            table.add_row(*row)
        return Group(*self.lines(), table) if table.row_count else Group(*self.lines())

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.HEADER)
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in self.cells())
        text = "".join(f"<p>{escape(line)}</p>" for line in self.lines())
        return f"{text}<table><tr>{head}</tr>{body}</table>" if body else text

    def to_pandas(self, what: str = "steps") -> Any:
        """A data frame of "steps", "attention" (a row a captured query and page) or "alike" pairs. Needs pandas.

        Raises ValueError for anything else.
        """
        import pandas

        if what == "steps":
            return pandas.DataFrame(self.recording.steps)
        if what == "alike":
            rows: list[Mapping[str, Any]] = [
                {**vars(pair), "pages": None, "page": pair.pages[0], "other": pair.pages[1]} for pair in self.alike
            ]
            frame = pandas.DataFrame(rows)
            return frame.drop(columns="pages") if len(frame) else frame
        if what != "attention":
            raise ValueError(f"what: expected 'steps', 'attention' or 'alike', got {what!r}")
        rows = [
            {"layer": own.layer, "head": own.head, "step": own.step, "seen": own.seen, "page": page, "mass": mass}
            | {"held": held}
            for _, series in sorted(self.recording.masses.items())
            for own in series
            for page, (mass, held) in enumerate(zip(own.mass.tolist(), own.held.tolist(), strict=True))
        ]
        return pandas.DataFrame(rows)

    def plot(self, lane: Lane | None = None) -> Any:
        """A matplotlib figure: memory, attention by page of one head, rests, alike pages. Needs matplotlib."""
        from .plots import figure_of

        return figure_of(self, lane)


def _apart_first(pair: AlikePages) -> tuple[bool, float]:
    return not pair.apart, -pair.cosine
