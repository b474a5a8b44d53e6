"""Prefixes whose blocks stay in the pool, so that sequences that begin with one share them."""

from __future__ import annotations

from collections import OrderedDict

from .cache import PagedCache


class Resident:
    """Caches of prefixes by name, the one used longest ago first to go. The engine takes their room when it must."""

    def __init__(self) -> None:
        self._caches: OrderedDict[str, PagedCache] = OrderedDict()

    def get(self, key: str) -> PagedCache | None:
        """A fork of a prefix's cache, if it is there."""
        if key not in self._caches:
            return None
        self._caches.move_to_end(key)
        return self._caches[key].fork()

    def put(self, key: str, cache: PagedCache) -> None:
        """Keep a fork of a cache that has just read a prefix."""
        if key not in self._caches:
            self._caches[key] = cache.fork()

    def drop_oldest(self) -> bool:
        """Give one up; False if there is none."""
        if not self._caches:
            return False
        self._caches.popitem(last=False)
        return True

    def __len__(self) -> int:
        return len(self._caches)
