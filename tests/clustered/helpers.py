"""Stores of clustered pages without a cache around them, and what must always hold of them."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcompress.clustered.frozen import SharedSlab
from hf_kvcompress.clustered.settings import ClusterSettings
from hf_kvcompress.clustered.shared import Clusters, Sharing
from hf_kvcompress.clustered.store import ClusteredPages
from hf_kvcompress.codecs.registry import make_codec
from hf_kvcompress.pages import PageStore
from hf_kvcompress.rotary import Rotary

HEADS, DIM, PAGE, FIRST = 2, 32, 8, 2
ROTARY = Rotary(1 / 100.0 ** (torch.arange(0, DIM, 2) / DIM))


def make_store(codec: str = "int8", batch: int = 1, rotary: Any = ROTARY, local: bool = False, **settings: Any) -> Any:
    sizes = {"page_size": PAGE, "group_size": PAGE}
    codecs = [make_codec(codec, role, DIM, **sizes) for role in ("key", "value")]
    sharing = Sharing(Clusters(ClusterSettings(**settings)), rotary)
    segment = 128 if local else None
    rest = *codecs, batch, HEADS, torch.device("cpu"), segment, FIRST
    return ClusteredPages(sharing, 0, lambda row: 0, *rest)


def make_plain(codec: str = "int8", batch: int = 1, local: bool = False) -> PageStore:
    sizes = {"page_size": PAGE, "group_size": PAGE}
    codecs = [make_codec(codec, role, DIM, **sizes) for role in ("key", "value")]
    return PageStore(*codecs, batch, HEADS, torch.device("cpu"), 128 if local else None, FIRST)


def content(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys before their rotation and values, `[H, T, D]` each."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, HEADS, tokens, DIM, generator=generator)
    return keys + 1, values


def put(store: PageStore, rows: list[int], keys: torch.Tensor, values: torch.Tensor, rotary: Any = ROTARY) -> None:
    """Seal tokens `[R, H, T, D]`, keys not yet rotated, behind what the rows hold."""
    start = store.counts[rows[0]]
    at = torch.arange(FIRST + start, FIRST + start + keys.shape[2])
    rotated = keys if rotary is None else rotary.apply(keys, at)
    if isinstance(store, ClusteredPages):
        store.note(rows, FIRST + start, values)
    store.seal(rows, rotated, values, keys.shape[2])


def read(store: PageStore, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a row's sealed tokens decode to."""
    return store.read_row(row, 0, store.counts[row])


def check(store: ClusteredPages) -> None:
    """Every page of a row is somewhere, every base is a plain page that is there, and nothing is held in vain."""
    for place, slab in enumerate(store.slabs):
        if not isinstance(slab, SharedSlab):
            continue
        for role, pool in slab.pools.items():
            codes = pool.table
            for row, count in enumerate(store.counts):
                pages = min(max(count - slab.start, 0), slab.capacity) // store.page_size
                assert (codes[row, :, :pages] >= 0).all() and (codes[row, :, pages:] < 0).all()
            held = codes[codes >= 0]
            plain = held[held < 1 << 20]
            wanted = {int(code) for code in plain}
            for other_place, other in enumerate(store.slabs[place:], place):
                for group in other.pools[role].groups if isinstance(other, SharedSlab) else ():
                    if other_place - group.back == place:
                        wanted |= set(group.base[:, :2].flatten().tolist())
            assert wanted == set(range(len(pool.plain_statistics)))
            for number, group in enumerate(pool.groups, 1):
                assert 0 <= group.back <= place and isinstance(store.slabs[place - group.back], SharedSlab)
                members = (held[held >> 20 == number] & ((1 << 20) - 1)).unique()
                assert members.tolist() == list(range(len(group.shift)))
                assert all(len(t) == len(group.shift) for t in group.tensors())
