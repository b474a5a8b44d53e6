"""Putting snapshots back into the layers of a new cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .clustered.repeats import RepeatIndex
from .clustered.store import ClusteredPages
from .config import expect
from .exact_copies import ExactCopies
from .host_tier import Bounds
from .observers import QueryWindow
from .pages import PageStore
from .positions import Positions
from .snapshots import CLUSTERS_FORMAT, HELD, Snapshot, token_axis
from .tiers import Tail
from .window import ExactWindow

_ON_HOST = {(Positions, "table"), (QueryWindow, "positions"), (Bounds, "hot")} | {
    (RepeatIndex, "found"),
    (RepeatIndex, "tails"),
    (ClusteredPages, "hashes"),
}
_BY_NAME = {kind.__name__: kind for kind in HELD}


@torch.inference_mode(False)
def restore(
    layers: Sequence[Any],
    chain: Sequence[Snapshot],
    device: torch.device,
    prepare: Callable[[Any], None] = lambda layer: None,
) -> None:
    """Put into new layers what the last snapshot of a chain tells, pages from all of them, on `device`.

    `prepare` is shown each layer when it has its storage.
    """
    if len(layers) != len(chain[-1].layers):
        raise expect("config", f"a model of {len(chain[-1].layers)} layers", f"{len(layers)}")
    for index, layer in enumerate(layers):
        reader = _Reader([one.layers[index] for one in chain], [one.tensors for one in chain], device)
        reader.layer(layer, prepare)


class _Reader:
    def __init__(self, chain: list[Any], tensors: list[dict[str, torch.Tensor]], device: torch.device):
        self.chain, self.tensors, self.device = chain, tensors, device
        self._made: dict[str, Any] = {}

    def layer(self, layer: Any, prepare: Callable[[Any], None]) -> None:
        told = self.chain[-1]
        if told["kind"] != type(layer).__name__:
            raise expect("config", f"a model whose layer is a {told['kind']}", type(layer).__name__)
        if "storage" in told:
            batch, key_heads, value_heads, key_dim, value_dim = told["shape"]
            dtype = getattr(torch, told["dtype"])
            keys = torch.empty(batch, key_heads, 0, key_dim, dtype=dtype, device=self.device)
            values = torch.empty(batch, value_heads, 0, value_dim, dtype=dtype, device=self.device)
            layer.lazy_initialization(keys, values)
            prepare(layer)
            self._fill(layer.storage, told["storage"]["state"], self.device)
        for key, value in told["state"].items():
            setattr(layer, key, self.get(value, self.device, None))

    def get(self, x: Any, device: torch.device, target: Any) -> Any:
        """What `put` was given; into `target` if there is one of its class already."""
        if isinstance(x, list):
            targets = target if isinstance(target, list) and len(target) == len(x) else [None] * len(x)
            return [self.get(item, device, own) for item, own in zip(x, targets, strict=True)]
        if not isinstance(x, dict):
            return x
        if "tensor" in x:
            return self._made.setdefault(x["tensor"], self._tensor(x, device))
        if "same" in x:
            return self._made[x["same"]]
        if "tuple" in x:
            return tuple(self.get(item, device, None) for item in x["tuple"])
        if "dict" in x:
            return {key: self.get(value, device, None) for key, value in x["dict"]}
        if "dtype" in x:
            return getattr(torch, x["dtype"])
        if "device" in x:
            return self.device
        kind = _BY_NAME[x["class"]]
        if isinstance(target, kind):
            self._fill(target, x["state"], device)
            return target
        if issubclass(kind, PageStore):
            raise expect("cache", f"one that holds {kind.__name__}, as what was saved", type(target).__name__)
        state = {key: self.get(value, self._place(kind, key, device), None) for key, value in x["state"].items()}
        return self._made.setdefault(x["name"], kind(**state))

    def _place(self, kind: type, key: str, device: torch.device) -> torch.device:
        if (kind, key) in _ON_HOST:
            return torch.device("cpu")
        return self.device if kind is Bounds else device

    def _tensor(self, x: dict[str, str], device: torch.device) -> torch.Tensor:
        return self.tensors[-1][x["tensor"]].to(device, copy=True)

    def _fill(self, target: Any, state: dict[str, Any], device: torch.device) -> None:
        if isinstance(target, ExactWindow):
            return self._fill_window(target, state, device)
        if isinstance(target, ClusteredPages) and "format" in state:
            return self._fill_clustered(target, state, device)
        if isinstance(target, PageStore):
            return self._fill_pages(target, state, device)
        if isinstance(target, ExactCopies) or (isinstance(target, Tail) and target.host):
            device = torch.device("cpu")
        for key in (key for key in HELD[type(target)] if key in state):  # what refers to others comes behind them
            place = self._place(type(target), key, device)
            setattr(target, key, self.get(state[key], place, getattr(target, key)))

    def _fill_window(self, window: ExactWindow, state: dict[str, Any], device: torch.device) -> None:
        window.sinks, window.recent = list(state["sinks"]), list(state["recent"])
        parts = []
        for told in state["parts"]:
            part = self._tensor(told, device)
            parts.append(torch.nn.functional.pad(part, (0, 0, 0, state["slots"] - part.shape[2])))
        window.parts = tuple(parts)

    def _fill_pages(self, pages: PageStore, state: dict[str, Any], device: torch.device) -> None:
        pages.counts = list(state["counts"])
        pages.histories = self.get(state["histories"], device, None)
        pages.slabs = []
        for told in state["slabs"]:
            pages.make_slab(told["start"], told["capacity"])
            for role, known in told["statistics"].items():
                for key, tensor in known.items():
                    pages.slabs[-1].packed(role)[key].copy_(self._tensor(tensor, device))
        for one, tensors in zip(self.chain, self.tensors, strict=True):
            told = one["storage"]["state"]["pages"]["state"]
            for name, tensor in told["runs"].items():
                role, key = name.split(".")
                _spread(pages, role, key, tensors[tensor["tensor"]], told["from"], min(told["to"], state["to"]))

    def _fill_clustered(self, pages: ClusteredPages, state: dict[str, Any], device: torch.device) -> None:
        if state["format"] != CLUSTERS_FORMAT:
            raise expect("path", f"shared pages of format {CLUSTERS_FORMAT}", f"format {state['format']}")
        for key in ("counts", "histories", "hashes"):
            setattr(pages, key, self.get(state[key], self._place(ClusteredPages, key, device), None))
        for told in state["slabs"]:
            if "packed" in told:
                pages.make_slab(told["start"], told["capacity"])
                for role, packed in told["packed"].items():
                    for name, tensor in packed.items():
                        self._copy_first(pages, role, name, self._tensor(tensor, device))
                continue
            slab = pages.make_shared_slab(told["state"]["start"], told["state"]["capacity"])
            for role, pool in told["state"]["pools"]["dict"]:
                self._fill(slab.pools[role], pool["state"], device)
        if state["index"] is not None:
            self.get(state["index"], device, pages.index)
        pages.clusters.level = state["level"]

    @staticmethod
    def _copy_first(pages: PageStore, role: str, name: str, tensor: torch.Tensor) -> None:
        """Into the newest slab: a statistic, or the first entries of a field."""
        codec, whole = pages.codecs[role], pages.slabs[-1].packed(role)[name]
        if name in codec.statistics:
            whole.copy_(tensor)
        else:
            pages.write(pages.slabs[-1], role, name, 0, tensor)


def _spread(pages: PageStore, role: str, key: str, run: torch.Tensor, low: int, high: int) -> None:
    """Copy a run of tokens `low .. high` of one field to where they are in the slabs."""
    codec = pages.codecs[role]
    for slab in pages.slabs:
        first, last, per = max(low, slab.start), min(high, slab.end), codec.fields[key].tokens or 1
        if first < last:
            part = run.narrow(token_axis(codec, key), (first - low) // per, (last - first) // per)
            pages.write(slab, role, key, (first - slab.start) // per, part.to(pages.device))
