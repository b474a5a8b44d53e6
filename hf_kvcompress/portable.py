"""`save` and `load` of a compressed cache, as a mixin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from .calibration import Calibration
from .config import CacheConfig, expect
from .fingerprints import of_calibration
from .policies.base import Policy
from .restoring import restore
from .saving import check, header_of, pack, unpack, write_atomically
from .sealing_error import SealingMonitor
from .snapshots import Snapshot, capture, sealed

Own = TypeVar("Own", bound="Portable")


class Portable:
    """What a cache needs to go into a file and come back; the cache brings `layers`, `settings` and `commit`."""

    layers: list[Any]
    settings: CacheConfig
    fingerprint: dict[str, Any] | None  # of the model that it is for
    calibration: Calibration | None
    own_settings: str | None = None  # what a class with settings besides those of `CacheConfig` calls them in a file
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
        calibrated = of_calibration(self.settings, self.calibration)
        about = header_of(snapshot, self.settings, self.fingerprint, calibrated)
        header = {**about, "strategy": self.strategy()}
        write_atomically(path, pack(header, snapshot.tensors))

    def strategy(self) -> dict[str, Any]:
        """Settings besides those of `CacheConfig`, JSON-ready and under `own_settings`; `{}` if there are none."""
        return {}

    @classmethod
    def load(
        cls: type[Own],
        path: str | Path,
        config: Any = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        policy: str | Policy | None = None,
        monitor: bool | SealingMonitor = False,
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
            calibration: the one that the cache was saved with, where its codecs need one: the file keeps its
                fingerprint, not its numbers, since they belong to the model and are as large as a short cache.
            monitor: as for a new cache; so is what a class of caches takes besides, as a `PagedCache` its
                pool.

        Raises ValueError for a file of another model, dtype, codec version or format, and for one that was cut or
        changed; FileNotFoundError if there is none.
        """
        header, tensors = unpack(Path(path).read_bytes(), "path")
        calibration = None if calibration is None else Calibration.open(calibration)
        check(header, config, dtype, "path", None if calibration is None else calibration.fingerprint)
        strategy = header.get("strategy", {})
        if strategy.keys() - {cls.own_settings}:
            raise expect("path", f"a file that {cls.__name__} can read", f"one of {', '.join(strategy)}")
        settings = header["settings"] | strategy | ({} if policy is None else {"policy": policy})
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
