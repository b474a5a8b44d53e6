"""`monitoring_data/`: a header, steps and events as lines of JSON, attention and pages as safetensors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from ..config import expect
from ..saving import pack, unpack, write_atomically
from .recording import Recording
from .samples import Mass, Pages

FORMAT = 1
HEADER, STEPS, EVENTS, REPORT = "header.json", "steps.jsonl", "events.jsonl", "report.json"
FOLDER = "snapshots"
FLUSH_BYTES, FLUSH_SECONDS = 1 << 20, 5.0


class Writer:
    """Writes what a monitor sees into an empty folder, until it holds `max_bytes`.

    Raises ValueError, when it is made, for a folder that holds something; OSError if the disk refuses.
    """

    def __init__(self, folder: Path, header: dict[str, Any], max_bytes: int):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise expect("output_dir", "an empty folder, or one that is not there yet", str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.max_bytes, self.written, self.full = folder, max_bytes, 0, False
        self._lines: dict[str, list[str]] = {STEPS: [], EVENTS: []}
        self._waiting: list[Mass | Pages] = []
        self._waiting_bytes, self._flushed, self._number = 0, time.monotonic(), 0
        self._header(header)

    def line(self, file: str, entry: dict[str, Any]) -> None:
        """A step or an event."""
        if not self.full:
            self._lines[file].append(json.dumps(entry) + "\n")

    def add(self, item: Mass | Pages) -> None:
        """Attention or pages, for the next file of tensors."""
        if self.full:
            return
        self._waiting.append(item)
        own = [item.mass, item.held] if isinstance(item, Mass) else list(item.parts.values())
        self._waiting_bytes += sum(tensor.nbytes for tensor in own)

    def tick(self) -> None:
        """Write, if there is enough or it has waited long enough."""
        if self._waiting_bytes > FLUSH_BYTES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all that waits."""
        self._flushed = time.monotonic()
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        for file, lines in self._lines.items():
            text, self._lines[file] = "".join(lines).encode(), []
            if text and self._has_room(len(text)):
                with open(self.folder / file, "ab") as out:
                    out.write(text)
                self.written += len(text)
        if waiting:
            header, tensors = to_tensors(waiting)
            data = pack({"format": FORMAT, **header}, tensors)
            if self._has_room(len(data)):
                self._number += 1
                (self.folder / FOLDER).mkdir(exist_ok=True)
                self._write(f"{FOLDER}/{self._number:06d}.safetensors", data)

    def finish(self, header: dict[str, Any], report: dict[str, Any]) -> None:
        """Write what waits, the header as it is now, and the report, however full the folder is."""
        self.flush()
        self._header(header)
        self._write(REPORT, (json.dumps(report, indent=2) + "\n").encode())

    def _header(self, header: dict[str, Any]) -> None:
        self._write(HEADER, (json.dumps({"format": FORMAT, **header}, indent=2) + "\n").encode())

    def _has_room(self, nbytes: int) -> bool:
        self.full = self.full or self.written + nbytes > self.max_bytes
        return not self.full

    def _write(self, name: str, data: bytes) -> None:
        write_atomically(self.folder / name, data)
        self.written += len(data)


def to_tensors(items: list[Mass | Pages]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Items of many heads as a few tensors, and a header with the numbers that are no tensors."""
    tensors: dict[str, torch.Tensor] = {}
    header: dict[str, Any] = {"mass": [], "pages": []}
    masses = [item for item in items if isinstance(item, Mass)]
    if masses:
        tensors["mass"] = torch.cat([item.mass for item in masses])
        tensors["held"] = torch.cat([item.held for item in masses])
    for item in masses:
        header["mass"].append([item.layer, item.head, item.step, item.seen, item.time, len(item.mass)])
    pages = [item for item in items if isinstance(item, Pages)]
    for number, own in enumerate(pages):
        header["pages"].append([own.layer, own.head, own.step])
        tensors[f"pages.{number}.numbers"] = own.numbers
        tensors.update({f"pages.{number}.{name}": tensor for name, tensor in own.parts.items()})
    return header, tensors


def from_tensors(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[Mass | Pages]:
    """What `to_tensors` was given."""
    items: list[Mass | Pages] = []
    at = 0
    for layer, head, step, seen, when, length in header["mass"]:
        part = slice(at, at + length)
        items.append(Mass(layer, head, step, seen, when, tensors["mass"][part].clone(), tensors["held"][part].clone()))
        at += length
    for number, (layer, head, step) in enumerate(header["pages"]):
        prefix = f"pages.{number}."
        parts = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        items.append(Pages(layer, head, step, parts.pop("numbers"), parts))
    return items


def read(folder: str | Path, max_bytes: int = 256 * 2**20) -> Recording:
    """A recording from the folder that a monitor wrote, also from one whose process was killed.

    Raises ValueError for a folder of another format, and for files that were cut or changed; FileNotFoundError if there
    is no header.
    """
    folder = Path(folder)
    header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    if header.get("format") != FORMAT:
        raise expect("folder", f"a recording of format {FORMAT}", f"{folder} of format {header.get('format')}")
    recording = Recording(header, max_bytes)
    items: list[tuple[int, Any]] = []
    for file in sorted((folder / FOLDER).glob("*.safetensors")):
        found, tensors = unpack(file.read_bytes(), str(file))
        items += [(item.step, item) for item in from_tensors(found, tensors)]
    events = _lines(folder / EVENTS)
    for step in _lines(folder / STEPS):
        recording.add_step(step)
    # In the order in which it happened: what was taken back is forgotten as it was then.
    taken = [(event["step"], event) for event in events if event["kind"] in ("crop", "reset")]
    for _, item in sorted([*items, *taken], key=lambda pair: (pair[0], isinstance(pair[1], dict))):
        if isinstance(item, dict):
            recording.take_back(item["tokens"], recording.page_size)
        else:
            recording.extend([item])
    for event in events:
        recording.add_event(event)
    return recording


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; the last one may have been cut off."""
    if not file.is_file():
        return []
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise expect(f"{file} line {number}", "JSON", str(error)) from None
    return found
