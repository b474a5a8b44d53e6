"""Rows of results, kept in a folder as they come, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SETTINGS = "settings.json"


class Store:
    """Rows by unit and cache, in memory and, with a folder, in one file a process.

    Args:
        folder: made if it is not there; None keeps rows in memory.
        settings: what rows depend on, JSON-ready. Raises ValueError if the folder holds rows of other settings.
        index: of this process. Only the first one writes the settings.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], index: int = 0):
        self.folder, self.rows = folder, {}  # type: Path | None, dict[tuple[str, str], Row]
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._check(folder / SETTINGS, json.loads(json.dumps(settings)), index)
        self._own = folder / f"rows-{index}.jsonl"
        self.read()
        self._file = open(self._own, "a", encoding="utf-8")  # noqa: SIM115  # open as long as the run

    def _check(self, file: Path, settings: dict[str, Any], index: int) -> None:
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            differ = sorted(_differences(before, settings))
            if differ:
                raise ValueError(
                    f"out: expected an empty folder or one of the same run, got {str(file.parent)!r} with another "
                    + ", ".join(differ)
                )
        elif index == 0:
            temporary = file.with_suffix(".part")
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, file)

    def read(self) -> None:
        """Take in what all processes have written; a last line that was cut off is taken out of this one's file."""
        assert self.folder is not None
        for file in sorted(self.folder.glob("rows-*.jsonl")):
            whole = 0
            with open(file, "rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    row = json.loads(line)
                    self.rows[row["unit"], row["cache"]] = row
                    whole += len(line)
            if file == self._own and whole < file.stat().st_size:
                os.truncate(file, whole)

    def has(self, unit: str, cache: str) -> bool:
        return (unit, cache) in self.rows

    def add(self, row: Row) -> None:
        """Keep a row; once this returns, it survives the process."""
        if self.has(row["unit"], row["cache"]):
            return
        self.rows[row["unit"], row["cache"]] = row
        if self.folder is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self.folder is not None:
            self._file.close()


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = {*a, *b}
        return [d for n in names for d in _differences(a.get(n), b.get(n), f"{path}.{n}".lstrip("."))]
    return [] if a == b else [path]
