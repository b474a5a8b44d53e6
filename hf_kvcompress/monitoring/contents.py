"""Keys and values of a layer's pages, copied out as they are read, a limited number of tokens at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..clustered.frozen import SharedSlab
from ..codecs.base import Codec, Packed
from ..lanes import LanePages
from ..layer import CompressedLayer
from ..reading import exact_run, page_runs
from ..storage import LayerStorage
from .probe import own_fields
from .samples import Tokens

TOKENS = 4096  # that are read at once


def tokens_of(layer: Any, row: int, heads: list[int], since: int, page: int) -> tuple[list[Tokens], int]:
    """What a layer holds of a row, and the mark up to which it has been looked at.

    Args:
        layer: ours or one of transformers' own, at rest.
        since: an earlier call's mark; what stands a page before it is not read again. 0 reads from the beginning.
        page: tokens that must have come since then, so that it is worth looking.
    """
    if isinstance(layer, CompressedLayer):
        if layer.storage is None:
            return [], since
        return _packed(layer.storage, row, heads, since, page)
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor) or keys.dim() != 4:
        return [], since
    first = int(layer.get_seq_length()) - keys.shape[2]
    begin = max(since // page * page, first)
    end = min(begin + TOKENS, first + keys.shape[2])
    if end - begin < page:
        return [], since
    own = (x[row, heads, begin - first : end - first].detach().clone() for x in (keys, values))
    return [Tokens(heads, torch.arange(begin, end), *own)], end


def _packed(storage: LayerStorage, row: int, heads: list[int], since: int, page: int) -> tuple[list[Tokens], int]:
    parts = []
    sealed, pages = storage.pages.counts[row], storage.pages
    if since and sealed - since < page:
        return [], since
    exact = exact_run(storage)
    if exact is not None:
        keys, values = (x[row, heads].detach().clone() for x in exact[:2])
        positions = exact[2].positions(storage.device)
        parts.append(Tokens(heads, positions[row if len(positions) > 1 else 0].clone(), keys, values))
    if isinstance(pages, LanePages):
        return parts + list(_lines(storage, row, heads)), sealed
    read, begin = 0, max(since - page, 0)  # a page of positions may begin in what was read before
    for (slab, _), run in zip(pages.runs(), page_runs(storage, None), strict=True):
        end = min(slab.end, sealed)
        if end <= begin:
            continue
        if read and read + run.tokens > TOKENS:
            break
        if isinstance(slab, SharedSlab):
            keys, values = (pages.decode(role, slab, run.tokens)[row, heads] for role in ("key", "value"))
        else:
            own = ((run.codecs[role], getattr(run, f"{role}s")) for role in ("key", "value"))
            keys, values = (_decode(codec, packed, row, heads, run.tokens) for codec, packed in own)
        positions = run.slots.positions(storage.device)
        positions = positions[row if len(positions) > 1 else 0]
        new = slice(max(begin - slab.start, 0), None)
        parts.append(Tokens(heads, positions[new].clone(), keys[:, new], values[:, new]))
        read, since = read + run.tokens, end
    return parts, since


def _decode(codec: Codec, packed: Packed, row: int, heads: list[int], tokens: int) -> torch.Tensor:
    return codec.decode(own_fields(codec, packed, row, heads)).flatten(2, 3)[0, :, :tokens]


def _lines(storage: LayerStorage, row: int, heads: list[int]) -> Iterator[Tokens]:
    """The lines of a row's heads, the newest blocks first, until enough has been read; host tiers are left out."""
    pages, read = storage.pages, 0
    assert isinstance(pages, LanePages)
    for run in reversed(list(page_runs(storage, None))):
        assert run.block is not None
        for head in heads:
            lines = [i for i, lane in enumerate(run.block.lanes) if lane == row * pages.heads + head]
            if not lines or read > TOKENS * len(heads):
                continue
            index = torch.tensor(lines, device=storage.device)
            pair = []
            for role in ("key", "value"):
                packed = {name: t[index] for name, t in getattr(run, f"{role}s").items()}
                pair.append(run.codecs[role].decode(packed).flatten(1, 3)[:, : run.tokens])
            yield Tokens([head], run.slots.positions(storage.device)[index], *pair)
            read += len(lines) * run.tokens
