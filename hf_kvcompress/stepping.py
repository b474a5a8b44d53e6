"""One level back: a layer whose attention suffers more than it may is packed with more bits from then on."""

from __future__ import annotations

from dataclasses import replace

import torch

from .codecs.base import Codec
from .codecs.registry import FAMILIES, parse
from .lanes import LanePages
from .pages import PageStore
from .storage import LayerStorage
from .storage_parts import codecs_of, copies_of

LAST = ("int8", "identity")  # when a family has no more bits


def next_level(name: str) -> str | None:
    """The codec with the next more bits: of the same family, then `int8`, then `identity`; None beyond that."""
    family, nbits = parse(name)
    if name == LAST[-1]:
        return None
    more = [bits for bits in FAMILIES[family][0].supported_bits if bits > nbits]
    if more and not FAMILIES[family][0].wants_context:
        return f"{family}{min(more)}"
    return LAST[1] if nbits >= 8 else LAST[0]


def step_back(storage: LayerStorage) -> tuple[str, str] | None:
    """Pack a layer with the next level's codecs, what it holds and what is to come; the new names, or None if none.

    What was lost before stays lost; tiers below the first one stay as they are.
    """
    names = [next_level(name) or name for name in (storage.config.keys, storage.config.values)]
    if names == [storage.config.keys, storage.config.values] or type(storage.pages) not in (PageStore, LanePages):
        return None
    old = storage.pages
    storage.config = replace(storage.config, keys=names[0], values=names[1])
    if storage.evictor is not None:
        storage.evictor.config = storage.config
    codecs = codecs_of(storage)
    if isinstance(old, LanePages):
        assert storage.evictor is not None
        storage.pages = _lanes_again(storage, old, codecs)
        storage.copies = copies_of(storage, storage.evictor.settings)  # the old ones are in the old codes
    else:
        storage.pages = _pages_again(old, codecs)
    return names[0], names[1]


def _pages_again(old: PageStore, codecs: tuple[Codec, Codec]) -> PageStore:
    new = PageStore(*codecs, len(old.counts), old.heads, old.device, old.segment_length, old.first)
    first = old.slabs[0].start if old.slabs else 0
    for row, count in enumerate(old.counts):
        new.counts[row] = min(first, count)
        if count > first:
            keys, values = old.read_row(row, first, count)
            new.seal([row], keys, values, count - first)
    return new


def _lanes_again(storage: LayerStorage, old: LanePages, codecs: tuple[Codec, Codec]) -> LanePages:
    new = LanePages(*codecs, old.batch, old.heads, old.device, old.track_mass, old.first_position)
    page = old.page_size
    for row, count in enumerate(old.counts):
        table = old.table([row])
        table = torch.nn.functional.pad(table, (0, -table.shape[1] % page), value=-1)
        if table.shape[1]:
            filled = torch.where(table < 0, table[:, :1], table)
            keys, values = (old.decode(role, filled)[None] for role in ("key", "value"))
            mass = old.look_up("mass", table, 0.0) if old.track_mass else None
            new.admit(row, keys, values, old.look_up("positions", table, -1), mass, renew=True)
        new.counts[row] = count
    return new
