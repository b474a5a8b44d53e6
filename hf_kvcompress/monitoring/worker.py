"""A thread that takes work off the generating one, and never lets it wait: what does not fit is dropped and counted."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

ERRORS = 20  # that are kept


class Worker:
    """Hands items to `handle` in a thread of its own, in order.

    Args:
        handle: is called with every item.
        charge: is told the seconds of processor time that each took.
        max_bytes: of the items that wait; more are dropped.
        idle: is called between items and at least every `every` seconds.
    """

    def __init__(
        self,
        handle: Callable[[Any], None],
        charge: Callable[[float], None],
        max_bytes: int,
        idle: Callable[[], None] = lambda: None,
        every: float = 0.25,
    ):
        self._handle, self._charge, self._idle, self._every = handle, charge, idle, every
        self._waiting: deque[tuple[Any, int]] = deque()
        self._bytes, self._max_bytes = 0, max_bytes
        self._wake = threading.Condition()
        self._closing = False
        self.dropped = 0
        self.errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="kvcompress-monitor", daemon=True)
        self._thread.start()

    def put(self, item: Any, nbytes: int = 0) -> bool:
        """Leave an item to the thread; False if there is no room for it."""
        with self._wake:
            if self._closing or (self._waiting and self._bytes + nbytes > self._max_bytes):
                self.dropped += 1
                return False
            self._waiting.append((item, nbytes))
            self._bytes += nbytes
            self._wake.notify_all()
            return True

    def wait(self) -> None:
        """Until nothing waits any more."""
        with self._wake:
            self._wake.wait_for(lambda: not self._waiting and not self._bytes)

    def close(self) -> None:
        """Let the thread finish what waits, and end it."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._waiting and not self._closing:
                    self._wake.wait(self._every)
                item, nbytes = self._waiting.popleft() if self._waiting else (None, 0)
                ends = item is None and self._closing
            begun = time.thread_time()
            try:
                if item is not None:
                    self._handle(item)
                if not ends:
                    self._idle()
            except Exception as error:  # noqa: BLE001 - nothing that a monitor does may end a generation
                if len(self.errors) < ERRORS:
                    self.errors.append(error)
            self._charge(time.thread_time() - begun)
            if item is not None:
                with self._wake:
                    self._bytes -= nbytes
                    self._wake.notify_all()
            if ends:
                return
