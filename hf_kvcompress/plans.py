"""A plan: what every layer of a cache stores and how many bytes it takes, as a table, as JSON and as settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import Any

import torch

from .config import NO_POLICY, CacheConfig, LayerConfig
from .fingerprints import asks_for_calibration
from .policies.settings import EvictionConfig
from .showing import Shown

MB = 1024 * 1024
MANY_LAYERS = 40  # above, neighbours that are alike share a line


@dataclass(frozen=True)
class LayerPlan:
    """One layer: `tokens` are those a `DynamicCache` would hold of a row, `kept` those this cache holds by head."""

    layer: int
    kind: str
    keys: str
    values: str
    tokens: int
    kept: int
    nbytes: int
    uncompressed_bytes: int


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What a cache with `settings` holds after `context` tokens in each of `batch` rows.

    Bytes are what is held at most, allocated room included, however the tokens came. The recurrent state of linear
    layers, whose size does not depend on the context, is not counted.

    max_context: the longest context that these settings hold within the budget; None if any does.
    calibration: the file of the calibration that it was planned with, if any.
    """

    settings: CacheConfig
    layers: tuple[LayerPlan, ...]
    context: int
    batch: int
    dtype: torch.dtype
    budget_bytes: int | None = None
    max_context: int | None = None
    calibration: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def uncompressed_bytes(self) -> int:
        """What `DynamicCache(config=config)` holds: of sliding layers only the window."""
        return sum(layer.uncompressed_bytes for layer in self.layers)

    @property
    def compression_ratio(self) -> float:
        return self.uncompressed_bytes / max(self.nbytes, 1)

    @property
    def fits(self) -> bool:
        """Within the budget, or without one."""
        return self.budget_bytes is None or self.nbytes <= self.budget_bytes

    @property
    def kept_fraction(self) -> float:
        """Part of the tokens that layers with full attention keep."""
        full = [layer for layer in self.layers if layer.kind == "full"]
        return sum(layer.kept for layer in full) / max(sum(layer.tokens for layer in full), 1)

    @property
    def policy(self) -> str | None:
        """Name of the policy that evicts, if any does."""
        configs = [self.settings.for_layer(layer.layer) for layer in self.layers if layer.kept < layer.tokens]
        names = [own.eviction.make_policy().name for own in configs if own.eviction is not None]
        return names[0] if names else None

    def cache_settings(self) -> dict[str, Any]:
        """Keyword arguments of `CompressedCache(config, **settings)`, JSON-ready; only what is not the default.

        A calibration in memory is not among them: the cache wants it beside them.
        """
        return compact_settings(self.settings) | calibration_setting(self.settings, self.calibration)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the totals, the settings and every layer."""
        return {
            "context": self.context,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "budget_bytes": self.budget_bytes,
            "nbytes": self.nbytes,
            "uncompressed_bytes": self.uncompressed_bytes,
            "compression_ratio": self.compression_ratio,
            "fits": self.fits,
            "max_context": self.max_context,
            "policy": self.policy,
            "kept_fraction": self.kept_fraction,
            "settings": self.cache_settings(),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def code(self) -> str:
        """The line of Python that makes the cache."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.cache_settings().items())
        if asks_for_calibration(self.settings) and self.calibration is None:
            settings += ", calibration=calibration"
        return f"cache = kvc.CompressedCache(model.config, {settings})"

    # -- as a table ----------------------------------------------------------------------------------------------------

    _HEADER = ("layer", "kind", "keys / values", "kept", "of", "MB", "ratio")

    def _rows(self) -> list[list[str]]:
        grouped = [list(own) for _, own in groupby(self.layers, key=lambda layer: (*asdict(layer).values(),)[1:])]
        groups = grouped if len(self.layers) > MANY_LAYERS else [[layer] for layer in self.layers]
        return [_row(own) for own in groups]

    def title(self) -> str:
        """The totals in one line."""
        rows = f" x {self.batch} rows" if self.batch > 1 else ""
        budget = "" if self.budget_bytes is None else f" of {_mb(self.budget_bytes)} MB"
        return (
            f"{self.context:,} tokens{rows}: {_mb(self.nbytes)} MB{budget}, {_mb(self.uncompressed_bytes)} MB "
            f"uncompressed ({self.compression_ratio:.2f}x)"
        )

    def __repr__(self) -> str:
        rows = [list(self._HEADER), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self._HEADER))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([self.title(), *lines])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self.title())
        for name in self._HEADER:
            table.add_column(name, justify="right")
        for row in self._rows():
            table.add_row(*row)
        return table

    _index = "layer"
    _bars = {"uncompressed_bytes": ("uncompressed", 1 / MB), "nbytes": ("held", 1 / MB)}

    def _title(self) -> str:
        return self.title()

    def _records(self) -> list[dict[str, Any]]:
        return [asdict(layer) for layer in self.layers]

    def _cells(self) -> tuple[tuple[str, ...], list[list[str]]]:
        return self._HEADER, self._rows()


def _row(layers: list[LayerPlan]) -> list[str]:
    first, last, count = layers[0], layers[-1], len(layers)
    codecs = "-" if first.keys == "-" else f"{first.keys} / {first.values}"
    ratio = f"{first.uncompressed_bytes / first.nbytes:.2f}" if first.nbytes else "-"
    return [
        str(first.layer) if count == 1 else f"{first.layer}-{last.layer}",
        first.kind,
        codecs,
        f"{first.kept:,}",
        f"{first.tokens:,}",
        _mb(first.nbytes) if count == 1 else f"{count} x {_mb(first.nbytes)}",
        ratio,
    ]


def _mb(nbytes: int) -> str:
    return f"{nbytes / MB:,.2f}"


def calibration_setting(settings: CacheConfig, file: str | None) -> dict[str, str]:
    """The file of a calibration as a keyword argument, where there is one and the settings ask for it."""
    return {"calibration": file} if file is not None and asks_for_calibration(settings) else {}


def compact_settings(settings: CacheConfig) -> dict[str, Any]:
    """The keyword arguments that make these settings: codecs always, the rest where it is not the default."""
    found = _codecs(settings.default) | _differences(settings.default, LayerConfig())
    if settings.budget_bytes is not None:
        found["budget"] = f"{settings.budget_bytes}B"
    layers = {}
    for index, layer in settings.layers.items():
        codecs = (
            _codecs(layer) if (layer.keys, layer.values) != (settings.default.keys, settings.default.values) else {}
        )
        layers[index] = codecs | _differences(layer, settings.default)
    return {**found, "layers": layers} if layers else found


def _codecs(layer: LayerConfig) -> dict[str, Any]:
    return {"codec": layer.keys} if layer.keys == layer.values else {"keys": layer.keys, "values": layer.values}


def _differences(layer: LayerConfig, base: LayerConfig) -> dict[str, Any]:
    """Settings of `layer` that are not those of `base`; codecs apart."""
    own = [f.name for f in fields(LayerConfig) if f.name not in ("keys", "values", "eviction")]
    found = {name: getattr(layer, name) for name in own if getattr(layer, name) != getattr(base, name)}
    if layer.eviction == base.eviction:
        return found
    if layer.eviction is None:
        return {**found, "policy": NO_POLICY}
    before: Mapping[str, Any] = (base.eviction or EvictionConfig()).to_dict()
    new = {name: value for name, value in layer.eviction.to_dict().items() if value != before[name]}
    if base.eviction is None:
        new = {"policy": layer.eviction.to_dict()["policy"], **new}
    return {**found, **new}
