"""What a cache holds as plain data: a tree of JSON values that names tensors, and the tensors.

Only what cannot be made again from the settings is in it. Sealed tokens are cut where an earlier snapshot of the same
cache ends, so a chain of snapshots holds every page once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .blocks import Block
from .clustered.frozen import SharedSlab
from .clustered.pool import Members, Pool
from .clustered.repeats import RepeatIndex
from .clustered.store import ClusteredPages
from .config import expect
from .eviction import Evictor
from .exact_copies import ExactCopies
from .host_tier import Bounds, HostBlock
from .lane_statistics import LaneStatistics
from .lanes import LanePages
from .layer import CompressedLayer
from .observers import QueryWindow
from .pages import PageStore, Slab
from .positions import Positions
from .queries import QueryStatistics
from .storage import LayerStorage
from .tiers import Tail
from .window import ExactWindow

_OF_PAGES = ("codecs", "heads", "device", "segment_length", "page_size", "first")
_LINES = ("lanes", "epochs", "counts", "capacity", "packed", "positions", "mass")
#: what a snapshot holds of each class, in an order in which nothing refers to what comes later
HELD: dict[type, tuple[str, ...]] = {
    LayerStorage: ("window", "pages", "tail", "copies", "positions", "queries", "evictor"),
    ExactWindow: ("sinks", "recent", "parts"),
    PageStore: ("counts", "histories", "slabs"),
    ClusteredPages: ("counts", "histories", "slabs", "hashes", "index"),
    SharedSlab: ("start", "capacity", "pools"),
    Pool: ("statistics", "owners", "table", "plain", "plain_statistics", "plain_pages", "groups"),
    Members: ("nbits", "back", "base", "shift", "statistics", "packed"),
    RepeatIndex: ("feeder", "found", "tails", "seen"),
    LanePages: ("blocks", "statistics", "counts", "open", "holes"),
    LaneStatistics: ("tables", "histories", "known", "epoch"),
    Block: _LINES,
    HostBlock: (*_LINES, "bounds"),
    Bounds: ("low", "high", "hot"),
    Tail: ("pages", "beyond"),
    ExactCopies: ("pages",),
    Positions: ("counts", "offsets", "table"),
    QueryStatistics: ("sums", "counts"),
    Evictor: ("budget", "window", "prompts", "evicted"),
    QueryWindow: ("queries", "positions", "seen"),
}
#: what the settings, the shapes and the pass in flight say of each class: a snapshot leaves it out
REMADE: dict[type, tuple[str, ...]] = {
    LayerStorage: ("config", "sliding_window", "index", "monitor", "dtype", "device", "heads", "dims", "context"),
    ExactWindow: ("sink_length",),
    PageStore: _OF_PAGES,
    ClusteredPages: (*_OF_PAGES, "clusters", "rotary", "layer", "begins", "local", "newest", "_pass"),
    Pool: ("codec", "page", "move", "device", "first"),
    RepeatIndex: ("pending", "_asked"),
    LanePages: ("codecs", "heads", "device", "track_mass", "page_size", "first_position"),
    LaneStatistics: ("codecs", "heads", "device"),
    Block: ("_index",),
    HostBlock: ("_index",),
    Tail: ("device", "host", "fetch_pages", "settled"),
    ExactCopies: ("limit",),
    QueryStatistics: ("heads", "keep_newest", "newest"),
    Evictor: ("config", "settings", "index", "heads", "first_head", "sliding_window", "policy"),
    QueryWindow: ("size", "heads"),
}
CLUSTERS_FORMAT = 1  # goes up when shared pages would be read differently
OF_LAYER = ("seen", "record_past", "is_initialized")
#: attributes of our own layer that the cache sets as it is made, or that belong to the pass in flight
LAYER_REMADE = ("config", "index", "sliding_window", "monitor", "is_sliding", "storage", "chunk", "share", "plan") + (
    ("context", "sharing", "query_heads", "stands_alone", "may_be_cross_attention", "mask_is_ours", "keys", "values")
)


@dataclass
class Snapshot:
    """One entry of `layers` for each layer of the cache, and the tensors that they name.

    since: sealed tokens of each layer that earlier snapshots of a chain hold.
    """

    layers: list[Any]
    tensors: dict[str, torch.Tensor]
    since: list[int] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def sealed(layers: Iterable[Any]) -> list[int]:
    """Sealed tokens of each layer's fullest row: what `capture` takes as `since` for the next one of a chain.

    0 where pages change after they were sealed: such a layer is whole in every snapshot.
    """
    stores = [layer.storage.pages if getattr(layer, "storage", None) is not None else None for layer in layers]
    return [max(store.counts) if isinstance(store, PageStore) and store.plain_slabs else 0 for store in stores]


def capture(layers: Sequence[Any], since: Sequence[int] = (), copy: bool = True) -> Snapshot:
    """What these layers of a cache hold, with nothing in flight.

    Without `copy` tensors may be the cache's own: they hold until it is used again.
    """
    writer = _Writer(copy)
    before = since or [0] * len(layers)
    made = [writer.layer(layer, f"layers.{i}", before[i]) for i, layer in enumerate(layers)]
    return Snapshot(made, writer.tensors, list(since))


class _Writer:
    def __init__(self, copy: bool):
        self.copy = copy
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self._since = 0

    def layer(self, layer: Any, name: str, since: int) -> dict[str, Any]:
        ours = isinstance(layer, CompressedLayer)
        own = [key for key in vars(layer) if not ours or key not in LAYER_REMADE]
        made = {
            "kind": type(layer).__name__,
            "state": {key: self.put(vars(layer)[key], f"{name}.{key}") for key in own},
        }
        if ours and layer.storage is not None:
            storage = layer.storage
            self._since = since
            made["shape"] = [storage.batch, *storage.heads.values(), *storage.dims.values()]
            made["dtype"] = str(storage.dtype).removeprefix("torch.")
            made["storage"] = self.put(storage, name)
        return made

    def put(self, x: Any, name: str) -> Any:
        """JSON for `x`: plain values as they are, the rest as a mapping whose one or two keys say what it is."""
        if x is None or isinstance(x, bool | int | float | str):
            return x
        if id(x) in self._names:
            return {"same": self._names[id(x)]}
        if isinstance(x, torch.Tensor):
            self._names[id(x)] = name
            return self.tensor(x, name)
        if isinstance(x, list | tuple):
            items = [self.put(item, f"{name}.{i}") for i, item in enumerate(x)]
            return {"tuple": items} if isinstance(x, tuple) else items
        if isinstance(x, dict):
            return {"dict": [[key, self.put(value, f"{name}.{key}")] for key, value in x.items()]}
        if isinstance(x, torch.dtype | torch.device):
            return {"dtype": str(x).removeprefix("torch.")} if isinstance(x, torch.dtype) else {"device": None}
        if isinstance(x, ExactWindow):
            return {"class": "ExactWindow", "state": self._window(x, name)}
        if isinstance(x, ClusteredPages):
            return {"class": "ClusteredPages", "state": self._clustered(x, name)}
        if isinstance(x, PageStore):
            return {"class": "PageStore", "state": self._pages(x, name)}
        if type(x) in HELD:
            self._names[id(x)] = name
            state = {key: self.put(getattr(x, key), f"{name}.{key}") for key in HELD[type(x)]}
            return {"class": type(x).__name__, "name": name, "state": state}
        raise expect(name, "a value that can be saved", type(x).__name__)

    def tensor(self, x: torch.Tensor, name: str) -> dict[str, str]:
        self.tensors[name] = x.detach().clone() if self.copy else x.detach()
        return {"tensor": name}

    def _window(self, window: ExactWindow, name: str) -> dict[str, Any]:
        """Without the empty slots behind the recent tokens."""
        used = window.sink_length + max(window.recent)
        parts = [self.tensor(part[:, :, :used], f"{name}.parts.{i}") for i, part in enumerate(window.parts)]
        return {"sinks": [*window.sinks], "recent": [*window.recent], "slots": window.keys.shape[2], "parts": parts}

    def _pages(self, pages: PageStore, name: str) -> dict[str, Any]:
        """Fields of tokens are joined over the slabs, from the first token that no earlier snapshot has."""
        high = max(pages.counts)
        low = max(self._since, pages.slabs[0].start) if pages.slabs else high
        slabs, runs = [], {}
        for i, slab in enumerate(pages.slabs):
            known = {
                role: {key: self.tensor(slab.packed(role)[key], f"{name}.slabs.{i}.{role}.{key}")
                       for key in codec.statistics}
                for role, codec in pages.codecs.items()
            }  # fmt: skip
            slabs.append({"start": slab.start, "capacity": slab.capacity, "statistics": known})
        for role, codec in pages.codecs.items():
            for key in codec.fields:
                parts = [own for slab in pages.slabs if (own := _part(codec, slab, role, key, low, high)) is not None]
                if key not in codec.statistics and parts:
                    axis = token_axis(codec, key)
                    joined = self.tensor(torch.cat(parts, dim=axis), f"{name}.{role}.{key}")
                    runs[f"{role}.{key}"] = {**joined, "axis": axis, "per": codec.fields[key].tokens}
        histories = self.put(pages.histories, f"{name}.histories")
        counts = list(pages.counts)
        return {"counts": counts, "histories": histories, "slabs": slabs, "from": low, "to": high, "runs": runs}

    def _clustered(self, pages: ClusteredPages, name: str) -> dict[str, Any]:
        """Slab by slab: plain ones up to their last token, shared ones with tables, references and differences."""
        slabs = []
        for i, slab in enumerate(pages.slabs):
            own, end = f"{name}.slabs.{i}", min(max(pages.counts), slab.end)
            if isinstance(slab, SharedSlab):
                slabs.append(self.put(slab, own))
                continue
            packed = {
                role: {
                    key: self.tensor(whole if part is None else part, f"{own}.{role}.{key}")
                    for key, whole in slab.packed(role).items()
                    if (part := _part(codec, slab, role, key, slab.start, end)) is not None or key in codec.statistics
                }
                for role, codec in pages.codecs.items()
            }
            slabs.append({"start": slab.start, "capacity": slab.capacity, "packed": packed})
        pages.index.settle()
        index = self.put(pages.index, f"{name}.index") if pages.feeds else None
        rest = {key: self.put(getattr(pages, key), f"{name}.{key}") for key in ("counts", "histories", "hashes")}
        return {**rest, "slabs": slabs, "index": index, "level": pages.clusters.level, "format": CLUSTERS_FORMAT}


def token_axis(codec: Any, key: str) -> int:
    return -1 if codec.fields[key].tokens_last else 3


def _part(codec: Any, slab: Slab, role: str, key: str, low: int, high: int) -> torch.Tensor | None:
    """The tokens `low .. high` of a field in a slab, or None if it has none of them."""
    start, end, per = max(low, slab.start), min(high, slab.end), codec.fields[key].tokens
    if per is None or start >= end:
        return None
    return slab.packed(role)[key].narrow(token_axis(codec, key), (start - slab.start) // per, (end - start) // per)
