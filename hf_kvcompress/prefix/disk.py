"""The disk tier: a safetensors file an entry, and an index in sqlite (WAL).

A file is renamed into its place when it is complete, then indexed. So a process may be killed at any moment: what was
complete is found again, by the index or, if the process died between the two, when the folder is next opened.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..saving import write_atomically
from .tiers import Tier

_SCHEMA = "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, nbytes INTEGER NOT NULL, used REAL NOT NULL)"
_STALE = 3600.0  # seconds after which an unfinished file is nobody's any more
_AT_ONCE = 500  # names in one query


class DiskTier(Tier):
    """A folder that processes of one machine may share.

    Args:
        folder: made if there is none.
        max_bytes: the entries used longest ago go beyond this; None for no bound.
    """

    errors = (OSError, sqlite3.Error)

    def __init__(self, folder: str | Path, max_bytes: int | None = None):
        super().__init__()
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.name = f"disk tier {self.folder}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._index = self._open()
        self._adopt()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.folder / "index.sqlite", timeout=10, check_same_thread=False)
        for turn in range(200):
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError:  # another process is making the index: sqlite does not wait here
                if turn == 199:
                    raise
                time.sleep(0.05)
        connection.execute("PRAGMA synchronous=NORMAL")
        with connection:
            connection.execute(_SCHEMA)
        return connection

    def _adopt(self) -> None:
        """Index complete files that a killed process left behind, and delete its unfinished ones."""
        known = {key for (key,) in self._index.execute("SELECT key FROM entries")}
        now = time.time()
        for path in self.folder.glob("*/*"):
            try:
                found = path.stat()
            except FileNotFoundError:  # another process has just renamed or evicted it
                continue
            if path.suffix == ".part":
                if now - found.st_mtime > _STALE:
                    path.unlink(missing_ok=True)
            elif path.stem not in known:
                with suppress(sqlite3.OperationalError):  # on a full disk it has to wait
                    self._note(path.stem, found.st_size, now)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _note(self, key: str, nbytes: int, now: float) -> None:
        with self._index:
            self._index.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", (key, nbytes, now))

    def _find(self, keys: Sequence[str]) -> str | None:
        for start in range(0, len(keys), _AT_ONCE):
            part = list(keys[start : start + _AT_ONCE])
            marks = ",".join("?" * len(part))
            with self._lock:
                rows = self._index.execute(f"SELECT key FROM entries WHERE key IN ({marks})", part).fetchall()
            found = {key for (key,) in rows}
            for key in part:
                if key in found:
                    return key
        return None

    def _get(self, key: str) -> bytes | None:
        try:
            data = self._path(key).read_bytes()
        except FileNotFoundError:  # another process evicted it
            self._delete(key)
            return None
        with suppress(sqlite3.OperationalError), self._lock, self._index:  # a full disk can still be read
            self._index.execute("UPDATE entries SET used = ? WHERE key = ?", (time.time(), key))
        return data

    def _put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, data)
        with self._lock:
            self._note(key, len(data), time.time())
            self._hold_to_bound(key)

    def _hold_to_bound(self, newest: str) -> None:
        if self.max_bytes is None:
            return
        rows = self._index.execute("SELECT key, nbytes FROM entries ORDER BY used").fetchall()
        total = sum(nbytes for _, nbytes in rows)
        for key, nbytes in rows:
            if total <= self.max_bytes:
                return
            if key != newest or nbytes > self.max_bytes:
                self._forget(key)
                total -= nbytes

    def _forget(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)  # first, since the index needs room to forget it on a full disk
        with self._index:
            self._index.execute("DELETE FROM entries WHERE key = ?", (key,))

    def _delete(self, key: str) -> None:
        with self._lock:
            self._forget(key)

    def keys(self) -> list[str]:
        """Names of all entries, the one used longest ago first."""
        with self._lock:
            return [key for (key,) in self._index.execute("SELECT key FROM entries ORDER BY used")]

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._index.execute("SELECT COALESCE(SUM(nbytes), 0) FROM entries").fetchone()[0]

    def close(self) -> None:
        self._index.close()
