"""What happens on the monitor's own thread: samples become records, in memory and on disk, and a table shows them."""

from __future__ import annotations

from typing import Any

from .files import EVENTS, STEPS, Writer
from .live import LiveTable
from .pages import PageBook
from .recording import Recording
from .samples import MassSample, masses_of


class Intake:
    """Takes in what was copied out of a cache.

    Args:
        recording: where it goes in memory.
        book: knows which pages have been seen.
        writer: writes it, if given.
    """

    def __init__(self, recording: Recording, book: PageBook, writer: Writer | None):
        self.recording, self.book, self.writer = recording, book, writer
        self.live: LiveTable | None = None

    def handle(self, item: tuple[str, Any]) -> None:
        """A ("sample", ...), ("step", numbers) or ("event", what happened)."""
        kind, found = item
        if kind == "sample":
            items = masses_of(found) if isinstance(found, MassSample) else self.book.take_in(found)
            self.recording.extend(items)
            if isinstance(found, MassSample) and found.unread:
                self.recording.header["unread"] = True
            if self.writer is not None:
                for own in items:
                    self.writer.add(own)
            return
        if kind == "step":
            self.recording.add_step(found)
        else:
            self._take_back(found)
            self.recording.add_event(found)
        if self.writer is not None:
            self.writer.line(STEPS if kind == "step" else EVENTS, found)

    def _take_back(self, event: dict[str, Any]) -> None:
        if event["kind"] == "rows":
            self.book.forget()
        elif event["kind"] in ("crop", "reset"):
            self.book.forget(event["tokens"] // self.recording.page_size)
            self.recording.take_back(event["tokens"], self.recording.page_size)

    def tick(self) -> None:
        """Now and then: show and write."""
        if self.live is not None:
            self.live.refresh(self.recording)
        if self.writer is not None:
            try:
                self.writer.tick()
            except OSError:
                self.writer = None  # the disk refuses: what is in memory goes on
                raise

    def finish(self, report: dict[str, Any]) -> None:
        """The last picture, and all that is left to write."""
        if self.live is not None:
            self.live.stop(self.recording)
        if self.writer is not None:
            self.writer.finish(self.recording.header, report)
