"""Places below the memory: prefixes as bytes by name. A tier that fails is warned of and left alone a while."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")
BACK_OFF = 30.0  # seconds for which a tier that failed is not asked


class Tier(ABC):
    """Bytes by name. What a subclass raises of its `errors` is turned into a warning and a miss.

    Entries are written whole or not at all, and any number of processes may share a tier.
    """

    name: str
    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self) -> None:
        self._silent_until = 0.0
        self.failures = 0

    @abstractmethod
    def _find(self, keys: Sequence[str]) -> str | None: ...

    @abstractmethod
    def _get(self, key: str) -> bytes | None: ...

    @abstractmethod
    def _put(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def _delete(self, key: str) -> None: ...

    def find(self, keys: Sequence[str]) -> str | None:
        """The first of these names that the tier has."""
        return self._try("look for a prefix", lambda: self._find(keys)) if keys else None

    def get(self, key: str) -> bytes | None:
        return self._try("read a prefix", lambda: self._get(key))

    def put(self, key: str, data: bytes) -> bool:
        """Store an entry; False if that failed."""
        return bool(self._try("store a prefix", lambda: self._put(key, data) or True))

    def delete(self, key: str) -> None:
        self._try("delete a prefix", lambda: self._delete(key))

    def close(self) -> None:  # noqa: B027
        """Give back what the tier holds open."""

    def _try(self, what: str, act: Callable[[], Result]) -> Result | None:
        if time.monotonic() < self._silent_until:
            return None
        try:
            return act()
        except self.errors as error:
            self.failures += 1
            self._silent_until = time.monotonic() + BACK_OFF
            warnings.warn(
                f"{self.name}: could not {what} ({type(error).__name__}: {error}); going on without it for "
                f"{BACK_OFF:g} seconds",
                RuntimeWarning,
                stacklevel=3,
            )
            return None

    def __repr__(self) -> str:
        return self.name


def open_tier(where: Any, max_bytes: int | None = None) -> Tier:
    """A tier for a path, a `redis://` URL, or any other URL that fsspec knows."""
    from .disk import DiskTier
    from .remote import FileSystemTier, RedisTier

    if isinstance(where, Tier):
        return where
    text = str(where)
    if text.startswith(("redis://", "rediss://", "unix://")):
        return RedisTier(text)
    return FileSystemTier(text) if "://" in text else DiskTier(where, max_bytes)
