"""How things are shown: HTML in a notebook, a data frame and a plot from one table of numbers.

pandas and matplotlib are asked for only when they are used; `pip install 'hf_kvcompress[plot]'` brings both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, ClassVar


class Shown:
    """Gives `_repr_html_`, `to_pandas` and `plot` to what has `_records`, one mapping a row, and `_title`."""

    #: column that names the rows
    _index: ClassVar[str]
    #: column -> its name in the plot and the factor it is drawn with; the first is the widest bar
    _bars: ClassVar[Mapping[str, tuple[str, float]]]
    _unit: ClassVar[str] = "MB"

    @abstractmethod
    def _records(self) -> Sequence[Mapping[str, Any]]:
        """The rows."""

    @abstractmethod
    def _title(self) -> str:
        """One line above the table."""

    def _cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Header and rows, as text."""
        records = self._records()
        header = list(records[0]) if records else [self._index]
        return header, [[_text(value) for value in record.values()] for record in records]

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._title())}</p>{html_table(*self._cells())}"

    def to_pandas(self) -> Any:
        """A data frame with a row for each row of the table, numbers as they are. Needs pandas."""
        import pandas

        records = self._records()
        frame = pandas.DataFrame(records) if records else pandas.DataFrame(columns=[self._index])
        return frame.set_index(self._index)

    def plot(self) -> Any:
        """A matplotlib figure with bars for each row. Needs matplotlib."""
        from matplotlib.figure import Figure  # without pyplot: no window, no state

        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.subplots()
        records = self._records()
        places = [record[self._index] for record in records]
        for number, (column, (name, factor)) in enumerate(self._bars.items()):
            heights = [float(record[column]) * factor for record in records]
            axes.bar(places, heights, width=0.8 - 0.3 * number, color=("0.85", "C0", "C1")[number], label=name)
        axes.set(xlabel=self._index, ylabel=self._unit, title=self._title())
        axes.legend()
        return figure


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
