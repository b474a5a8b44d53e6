"""`save` and `load` of a compressed cache, as a mixin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from .config import CacheConfig
from .monitor import Monitor
from .policies.base import Policy
from .restoring import restore
from .saving import check, header_of, pack, unpack, write_atomically
from .snapshots import Snapshot, capture, sealed

Own = TypeVar("Own", bound="Portable")


class Portable:
    """What a cache needs to go into a file and come back; the cache brings `layers`, `settings` and `commit`."""

    layers: list[Any]
    settings: CacheConfig
    fingerprint: dict[str, Any] | None  # of the model that it is for
    layer_class_to_replicate: Any
    _recording_past: bool

    def commit(self) -> None: ...

    def _grow(self, kinds: Sequence[str]) -> None: ...

    def _prepare(self, layer: Any) -> None: ...

    def save(self, path: str | Path) -> None:
        """Write all that the cache holds into one safetensors file, whole or not at all; passes in flight are stored.

        Raises OSError if the disk refuses; what was at `path` before is then still there.
        """
        snapshot = self.snapshot(copy=False)
        write_atomically(path, pack(header_of(snapshot, self.settings, self.fingerprint), snapshot.tensors))

    @classmethod
    def load(
        cls: type[Own],
        path: str | Path,
        config: Any = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        policy: str | Policy | None = None,
        monitor: bool | Monitor = False,
        calibration: Any = None,
        **more: Any,
    ) -> Own:
        """Read a cache that `save` wrote; it goes on exactly as that one would have.

        Args:
            path: the file.
            config: the model's config; None for a cache that was made without one.
            device: where to put it.
            dtype: the model's, where its config does not say or was not told of a conversion.
            policy: the policy, where it was one of your own.
            monitor, calibration: as for a new cache; so is what a class of caches takes besides, as a `PagedCache` its
                pool.

        Raises ValueError for a file of another model, dtype, codec version or format, and for one that was cut or
        changed; FileNotFoundError if there is none.
        """
        header, tensors = unpack(Path(path).read_bytes(), "path")
        check(header, config, dtype, "path")
        settings = header["settings"] | ({} if policy is None else {"policy": policy})
        cache = cls.from_settings(config, settings, monitor=monitor, calibration=calibration, **more)
        cache.put_back([Snapshot(header["layers"], tensors)], device)
        return cache

    @classmethod
    def from_settings(cls: type[Own], config: Any, settings: Mapping[str, Any], **more: Any) -> Own:
        """An empty cache of this class with settings as `CacheConfig.to_dict` gives them, whatever its own defaults."""
        cache = cls.__new__(cls)
        maker = next(kind for kind in cls.__mro__ if Portable in kind.__bases__)  # named strategies take less
        vars(maker)["__init__"](cache, config, **more, **settings)
        return cache

    def snapshot(self, since: Sequence[int] = (), copy: bool = True) -> Snapshot:
        """What the cache holds now, less the sealed tokens that earlier snapshots have: `since` is from `sealed()`."""
        self.commit()
        return capture(self.layers, since, copy)

    def sealed(self) -> list[int]:
        """Sealed tokens of each layer."""
        self.commit()
        return sealed(self.layers)

    def put_back(self, chain: Sequence[Snapshot], device: torch.device | str) -> None:
        """Make this empty cache what the last snapshot of a chain tells, on `device`."""
        if self.layer_class_to_replicate is not None:
            self._grow([layer["kind"] for layer in chain[-1].layers])
        restore(self.layers, chain, torch.device(device), self._prepare)
        self._recording_past = any(getattr(layer, "record_past", False) for layer in self.layers)
