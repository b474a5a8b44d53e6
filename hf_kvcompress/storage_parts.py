"""What a layer's storage is made of, as its settings have it: codecs, tiers, room for copies."""

from __future__ import annotations

from typing import Protocol

import torch

from .codecs.base import Codec, CodecContext, Role
from .codecs.registry import make_codec
from .config import LayerConfig
from .exact_copies import AUTO_BYTES, ExactCopies
from .lanes import LanePages
from .pages import PageStore
from .policies.settings import HOST, EvictionConfig
from .tiers import Tail


class Owner(Protocol):
    """What of a storage decides how its parts are made."""

    config: LayerConfig
    context: CodecContext
    dims: dict[str, int]
    heads: dict[str, int]
    dtype: torch.dtype
    device: torch.device
    pages: PageStore | LanePages
    tail: Tail | None

    @property
    def batch(self) -> int: ...

    def first_position(self, row: int) -> int: ...


def codecs_of(owner: Owner) -> tuple[Codec, Codec]:
    """Codecs of keys and values."""
    return _codec(owner, owner.config.keys, "key"), _codec(owner, owner.config.values, "value")


def _codec(owner: Owner, name: str, role: Role) -> Codec:
    sizes = {"page_size": owner.config.tokens_per_page, "group_size": owner.config.group_size}
    made = make_codec(name, role, owner.dims[role], **sizes, dtype=owner.dtype, context=owner.context)
    made.compute_dtype = torch.bfloat16 if owner.dtype.itemsize == 2 else torch.float32
    return made


def tail_of(owner: Owner, settings: EvictionConfig, mass: bool) -> Tail | None:
    """The tiers below the first one, each behind the one above it; `mass`: they keep what attention tokens received."""
    tail = None
    above = [(owner.config.keys, owner.config.values), *((name, name) for name in settings.tiers)]
    for number, name in reversed(list(enumerate(settings.tiers))):
        keys, values = above[number] if name == HOST else (name, name)  # codes keep their meaning in host memory
        codecs = _codec(owner, keys, "key"), _codec(owner, values, "value")
        batch, heads, host, fetched = owner.batch, owner.heads["key"], name == HOST, settings.fetch_pages
        tail = Tail(*codecs, batch, heads, owner.device, mass, host, fetched, owner.first_position, tail)
    return tail


def copies_of(owner: Owner, settings: EvictionConfig) -> ExactCopies | None:
    """Room for copies of what leaves the first level, if there is to be any."""
    pages, limit = owner.pages, settings.keep_exact
    assert isinstance(pages, LanePages)
    if limit == "auto":
        limit = 0 if owner.device.type == "cpu" else AUTO_BYTES
    if not limit or not owner.config.token_wise or owner.tail is None or owner.tail.host:  # its codes are not touched
        return None
    return ExactCopies(pages.codecs, pages.batch, pages.heads, int(limit), pages.track_mass, owner.first_position)
