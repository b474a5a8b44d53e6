"""Prefixes whose blocks stay in the pool, so that sequences that begin with one share them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from .cache import PagedCache


class Resident:
    """Caches of prefixes by name, the one used longest ago first to go. The engine takes their room when it must.

    Args:
        most: caches that are held at most; each has an exact window of its own.
    """

    def __init__(self, most: int) -> None:
        self.most = most
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
        while len(self._caches) > self.most:
            self.drop_oldest()

    def drop_oldest(self, keep: Collection[str] = ()) -> bool:
        """Give one up, but none of `keep`; False if there is no other."""
        key = next((key for key in self._caches if key not in keep), None)
        if key is None:
            return False
        del self._caches[key]
        return True

    def __contains__(self, key: str) -> bool:
        return key in self._caches

    def __len__(self) -> int:
        return len(self._caches)
