"""What a cache holds and saves: a mapping that also prints as a table, in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .clustered.store import ClusteredPages
from .layer import CompressedLayer
from .measure import tensor_bytes
from .showing import Shown

MB = 1024 * 1024


@dataclass(frozen=True)
class LayerStats:
    """One layer: tokens seen are positions, padding included; other counts are summed over rows, bytes over tensors.

    Where heads hold different tokens, counts are averages over heads. `exact_copies` are tokens of lower levels of
    which the host keeps what the first one held; their bytes are in `bytes_held` too. The ratio counts what is stored,
    so eviction does not raise it: bytes do fall.
    """

    layer: int
    kind: str
    keys: str
    values: str
    bits: float
    tokens_seen: int
    tokens_stored: int
    tokens_sealed: int
    tokens_evicted: int
    tokens_demoted: int
    pages: int
    bytes_held: int
    bytes_used: int
    bytes_uncompressed: int
    exact_copies: int = 0
    bytes_exact_copies: int = 0

    @classmethod
    def of(cls, index: int, layer: Any) -> LayerStats:
        held = tensor_bytes(layer) - _borrowed(layer)
        if not isinstance(layer, CompressedLayer):
            return cls(index, type(layer).__name__, "-", "-", 16.0, 0, 0, 0, 0, 0, 0, held, held, held)
        kind = "full" if layer.sliding_window is None else f"sliding {layer.sliding_window}"
        settings = layer.config
        storage = layer.storage
        if storage is None:
            return cls(index, kind, settings.keys, settings.values, 0.0, 0, 0, 0, 0, 0, 0, held, held, held)
        stored = storage.tokens_stored()
        sealed = sum(stored) - sum(storage.window.sinks) - sum(storage.window.recent)
        demoted = sum(tail.tokens_held() for tail in storage.tail.chain()) if storage.tail is not None else 0
        evicted = 0 if storage.evictor is None else sum(storage.pages.counts) - sealed - demoted
        numbers = sum(storage.heads[role] * storage.dims[role] for role in ("key", "value"))
        uncompressed = (sum(stored) + demoted) * numbers * storage.dtype.itemsize
        packed = storage.pages.used_bytes()
        other = held - tensor_bytes([*storage.window.parts, *storage.pages.tensors()])
        used = storage.window.used_bytes() + packed + other
        sealed_in_slabs = storage.pages.tokens_in_slabs()
        bits = packed * 8 / (sealed_in_slabs * numbers) if sealed_in_slabs else 0.0
        return cls(
            layer=index,
            kind=kind,
            keys=settings.keys,
            values=settings.values,
            bits=bits,
            tokens_seen=layer.seen,
            tokens_stored=sum(stored),
            tokens_sealed=sealed,
            tokens_evicted=evicted,
            tokens_demoted=demoted,
            pages=sealed // storage.pages.page_size,
            bytes_held=held,
            bytes_used=used,
            bytes_uncompressed=uncompressed,
            exact_copies=0 if storage.copies is None else storage.copies.tokens,
            bytes_exact_copies=tensor_bytes(storage.copies),
        )


def _borrowed(layer: Any) -> int:
    """Bytes that are reached from this layer and counted in another."""
    pages = layer.storage.pages if isinstance(layer, CompressedLayer) and layer.storage is not None else None
    return pages.borrowed_bytes if isinstance(pages, ClusteredPages) else 0


def _mean(ratios: Iterable[float]) -> float:
    found = list(ratios)
    return sum(found) / len(found) if found else 1.0


class CacheStats(Shown, Mapping[str, Any]):
    """Totals of a cache, by name (`stats["compression_ratio"]`), with `layers` for the single ones.

    Bytes are counted from the tensors that are there: `nbytes` is everything held, `slack_bytes` the part that is
    allocated and not filled yet. The ratio is what the stored tokens would take in the model's dtype over `nbytes`.
    """

    def __init__(self, layers: list[LayerStats], nbytes: int):
        self.layers = layers
        uncompressed = sum(layer.bytes_uncompressed for layer in layers)
        packed = [layer for layer in layers if layer.tokens_stored]
        tokens = max((layer.tokens_stored for layer in packed), default=0)
        self._totals: dict[str, Any] = {
            "nbytes": nbytes,
            "slack_bytes": nbytes - sum(layer.bytes_used for layer in layers),
            "uncompressed_bytes": uncompressed,
            "compression_ratio": uncompressed / nbytes if nbytes else 1.0,
            "avg_compression_ratio": _mean(layer.bytes_uncompressed / layer.bytes_held for layer in packed),
            "memory_saved_mb": (uncompressed - nbytes) / MB,
            "compressed_pages": sum(layer.pages for layer in layers),
            "tokens_seen": max((layer.tokens_seen for layer in layers), default=0),
            "tokens_stored": tokens,
            "tokens_evicted": max((layer.tokens_evicted for layer in packed), default=0),
            "tokens_demoted": max((layer.tokens_demoted for layer in packed), default=0),
            "exact_copies": max((layer.exact_copies for layer in packed), default=0),
            "exact_copy_bytes": sum(layer.bytes_exact_copies for layer in layers),
            "bits_per_layer": {layer.layer: round(layer.bits, 3) for layer in packed},
        }

    def __getitem__(self, name: str) -> Any:
        return self._totals[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._totals)

    def __len__(self) -> int:
        return len(self._totals)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the totals and every layer."""
        return {**self._totals, "layers": [asdict(layer) for layer in self.layers]}

    def _rows(self) -> list[list[str]]:
        return [
            [
                str(layer.layer),
                layer.kind,
                f"{layer.keys} / {layer.values}",
                f"{layer.bits:.2f}",
                f"{layer.tokens_stored:,}",
                f"{layer.pages:,}",
                f"{layer.bytes_held / MB:.2f}",
                f"{layer.bytes_uncompressed / max(layer.bytes_held, 1):.2f}",
            ]
            for layer in self.layers
        ]

    _HEADER = ["layer", "kind", "keys / values", "bits", "tokens", "pages", "MB", "ratio"]

    def _title(self) -> str:
        return (
            f"{self['nbytes'] / MB:.2f} MB held ({self['slack_bytes'] / MB:.2f} MB slack), "
            f"{self['uncompressed_bytes'] / MB:.2f} MB uncompressed: {self['compression_ratio']:.2f}x"
        )

    def __repr__(self) -> str:
        rows = [self._HEADER, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self._HEADER))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([self._title(), *lines])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self._title())
        for name in self._HEADER:
            table.add_column(name, justify="right")
        for row in self._rows():
            table.add_row(*row)
        return table

    # -- in a notebook -------------------------------------------------------------------------------------------------

    _index = "layer"
    _bars = {"bytes_uncompressed": ("uncompressed", 1 / MB), "bytes_held": ("held", 1 / MB)}

    def _records(self) -> list[dict[str, Any]]:
        return [asdict(layer) for layer in self.layers]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        return self._HEADER, self._rows()
