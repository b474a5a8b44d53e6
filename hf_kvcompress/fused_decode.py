"""A layer's attention by the fused kernels: which runs there are, what hides their tokens, and what comes back.

`fused_decode` does what `packed_attention` does, where kernels serve the device. What it uploads is kept as long as the
layer's pages do not change, which is all steps between two seals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch

from .blocks import Block
from .clustered.store import ClusteredPages
from .codecs.base import Codec, Packed
from .codecs.channel_int import ChannelIntCodec
from .codecs.eqrot import EqRotCodec
from .codecs.fp8 import Fp8Codec
from .codecs.identity import IdentityCodec
from .codecs.token_int import TokenIntCodec
from .codecs.turbo import TurboCodec
from .lanes import LanePages
from .layer import CompressedLayer
from .masks import CausalMask, DenseMask, Mask
from .mass import chunk_slots
from .ops import attention_formats as formats
from .ops import attention_table as tables
from .ops import fused_attention as fused
from .ops import kernels
from .reading import PageRun, exact_run, page_runs
from .softmax import Extras
from .storage import LayerStorage


@dataclass(frozen=True)
class _Known:
    """A table and what it was made of; tensors and blocks are held weakly, so no memory is kept for a table's sake."""

    objects: list[ReferenceType[Any]]
    numbers: tuple[Any, ...]
    table: tables.Table
    blocks: list[ReferenceType[Block] | None]  # that the runs come from; None: a slab


_TABLES: WeakKeyDictionary[LayerStorage, _Known] = WeakKeyDictionary()
_VARIANTS: WeakKeyDictionary[LayerStorage, list[formats.Variant | None]] = WeakKeyDictionary()
_NO_STRIDES = (0,) * 6


def serves(layer: CompressedLayer, query: torch.Tensor, mask: Mask, extras: Extras) -> bool:
    """Whether the kernels can do this pass of `query` `[B, Hq, q, D]`."""
    storage = layer.storage
    if storage is None or not kernels.serves(query) or query.dtype not in fused.DTYPES or query.dtype != storage.dtype:
        return False
    rows = query.shape[1] // storage.heads["key"] * query.shape[2]
    plain = extras.bias is None and not extras.dropout
    boolean = not isinstance(mask, DenseMask) or mask.mask.dtype == torch.bool
    if isinstance(storage.pages, ClusteredPages) and storage.pages.shares:
        return False
    host = storage.tail is not None and (storage.tail.host or storage.tail.beyond is not None)
    if not (plain and boolean) or rows > fused.MOST_ROWS or host or query.requires_grad:
        return False
    return query.stride(-1) == 1 and None not in _variants(storage)


@dataclass(frozen=True)
class Observed:
    """What a policy is shown: each run with its logits (-inf where hidden), and lse `[B * H, G * q]` over them all."""

    logits: Iterator[tuple[Any, torch.Tensor]]
    lse: torch.Tensor


def fused_decode(
    layer: CompressedLayer, query: torch.Tensor, mask: Mask, scaling: float, extras: Extras
) -> tuple[torch.Tensor, Observed | None]:
    """Attention `[B, Hq, q, Dv]` in the model's dtype, and what a policy is to see if it wants the attention mass."""
    storage, chunk = layer.storage, layer.chunk
    assert storage is not None
    batch, query_heads, length, _ = query.shape
    heads = storage.heads["key"]
    shape = batch, heads, query_heads // heads * length
    keys, values = (None, None) if chunk is None else (_dense(chunk.keys), _dense(chunk.values))
    news, mass = 0 if keys is None else keys.shape[2], layer.wants_mass
    strides = query.stride()[:3] + (
        _NO_STRIDES if keys is None or values is None else keys.stride()[:3] + values.stride()[:3]
    )
    own = tables.Pass(heads, query_heads // heads, length, news, strides, mass)
    known = _table(storage, own)
    table = known.table
    window = _window(storage)
    masks, causal = _masks(layer, mask, length)
    kept = None if masks is None else tables.masks_of(masks, query.device)
    out = torch.empty(batch, length, query_heads, storage.dims["value"], dtype=query.dtype, device=query.device)
    lse = logits = None
    if mass:
        lse = query.new_empty(batch * heads, shape[2], dtype=torch.float32)
        numel = table.logits + lse.numel() * (window + news)
        logits = query.new_full((numel,), float("-inf"), dtype=torch.float32)
    sinks = None if extras.sink_logits is None else extras.sink_logits.detach().float().contiguous()
    pieces = (query.detach(), table.data, kept, keys, values, sinks, out, lse, logits)
    numbers = (table.sizes, window, causal, heads, scaling, float(extras.softcap or 0.0))
    fused.fused_attention(*pieces, *numbers, table.variants)
    if logits is None or lse is None:
        return out.transpose(1, 2), None
    return out.transpose(1, 2), Observed(_logits(known, logits, window, shape), lse)


def _window(storage: LayerStorage) -> int:
    """Exact tokens that are stored, as `exact_run` has them."""
    recent = max(storage.window.recent, default=0)
    return storage.window.sink_length + recent if recent or any(storage.window.sinks) else 0


def _dense(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def _logits(
    known: _Known, logits: torch.Tensor, window: int, shape: tuple[int, int, int]
) -> Iterator[tuple[Any, torch.Tensor]]:
    """Each run's logits, `[B, H, rows, n]` of "exact" and "new", `[lines, 1, rows, capacity]` of a block."""
    for own, (begin, line) in zip(known.blocks, known.table.logits_at, strict=True):
        block = None if own is None else own()
        if block is not None:
            lines = len(block.lanes)
            yield block, logits[begin : begin + lines * shape[2] * line].view(lines, 1, shape[2], line)
    exact = logits[known.table.logits :].view(*shape, -1)
    if window:
        yield "exact", exact[..., :window]
    if exact.shape[-1] > window:
        yield "new", exact[..., window:]


# -- the table ---------------------------------------------------------------------------------------------------------


def _table(storage: LayerStorage, own: tables.Pass) -> _Known:
    objects, numbers = _state(storage)
    numbers = (*numbers, own)
    known = _TABLES.get(storage)
    if known is not None and known.numbers == numbers:
        if len(known.objects) == len(objects) and all(a() is b for a, b in zip(known.objects, objects, strict=True)):
            return known
    runs = _runs(storage)
    variants = [variant for variant in _variants(storage) if variant is not None]
    starts = [] if isinstance(storage.pages, LanePages) else [slab.start for slab, _ in storage.pages.runs()]
    described = [_described(storage, run, start) for run, start in zip(runs, starts or [0] * len(runs), strict=True)]
    window = storage.window.keys, storage.window.values
    table = tables.make_table(described, variants, window, own)
    blocks = [None if run.block is None else ref(run.block) for run in runs]
    known = _TABLES[storage] = _Known([ref(x) for x in objects], numbers, table, blocks)
    return known


def _runs(storage: LayerStorage) -> list[PageRun]:
    runs = list(page_runs(storage, storage.window.keys))  # only a host tier, which is not served, looks at the queries
    assert all(isinstance(run, PageRun) for run in runs)
    return runs  # type: ignore[return-value]


def _state(storage: LayerStorage) -> tuple[list[Any], tuple[Any, ...]]:
    """What a table depends on: objects that are the same, and numbers that are equal, as long as it holds."""
    pages = storage.pages
    objects: list[Any] = [storage.window.keys, storage.window.values]
    if not isinstance(pages, LanePages):
        for slab in pages.slabs:
            objects += [slab.keys["codes"], slab.values["codes"]]
        return objects, (*pages.counts,)
    numbers: list[Any] = []
    for store in [pages] if storage.tail is None else [pages, storage.tail.pages]:
        for block in store.blocks:
            objects += [block, block.positions]
            numbers += [block.capacity, *block.counts]
        numbers.append(store.holes)
    return objects, tuple(numbers)


def _described(storage: LayerStorage, run: PageRun, start: int) -> tables.Run:
    """A run for the table; a slab's begins at token number `start`."""
    keys, values, block = _flat(run.keys), _flat(run.values), run.block
    pairs = (run.keys, keys), (run.values, values)
    copied = [x for old, new in pairs for name, x in new.items() if x.data_ptr() != old[name].data_ptr()]
    if block is None:
        counts = [min(max(count - start, 0), run.tokens) for count in storage.pages.counts]
        return tables.Run(keys, values, run.capacity, counts, own=copied)
    store = storage.pages if run.tier == "packed" or storage.tail is None else storage.tail.pages
    holes = isinstance(store, LanePages) and store.holes
    lines = tables.Lines(block.lanes, block.index("lanes"), block.positions.contiguous() if holes else None)
    variant = int(run.tier == "tail")
    # Statistics of lines were looked up in their table for this run alone.
    looked_up = [packed[name] for packed in (keys, values) for name in ("mean", "spread") if name in packed]
    own = [*copied, *looked_up, block.index("lanes")]
    return tables.Run(keys, values, run.capacity, list(block.counts), lines, variant, own)


def _flat(packed: Packed) -> Packed:
    """Fields `[B, H, 1, ...]` or `[lines, 1, 1, ...]` as contiguous `[lines, ...]`."""
    return {name: tensor.flatten(0, 2).contiguous() for name, tensor in packed.items()}


# -- formats -----------------------------------------------------------------------------------------------------------


def _variant(codecs: dict[str, Codec], page: int) -> formats.Variant | None:
    key, value = format_of(codecs["key"]), format_of(codecs["value"])
    made = None if key is None or value is None else formats.Variant(key, value, page)
    return made if made is not None and made.fits else None


def _variants(storage: LayerStorage) -> list[formats.Variant | None]:
    """The pairs of codecs: of the pages, and of the tail where there is one."""
    known = _VARIANTS.get(storage)
    if known is None:
        stores = [storage.pages] if storage.tail is None else [storage.pages, storage.tail.pages]
        known = _VARIANTS[storage] = [_variant(store.codecs, store.page_size) for store in stores]
    return known


_FAMILIES: dict[type[Codec], int] = {
    IdentityCodec: formats.IDENTITY,
    Fp8Codec: formats.FP8,
    TokenIntCodec: formats.TOKENS,
    ChannelIntCodec: formats.CHANNELS,
    TurboCodec: formats.TURBO,
    EqRotCodec: formats.EQROT,
}


def format_of(codec: Codec) -> formats.Format | None:
    """How the kernels see what a codec packs; None for one that they do not know."""
    family = _FAMILIES.get(type(codec))
    if family is None:
        return None
    return formats.Format(codec.dim, family, 0 if family == formats.IDENTITY else codec.nbits, codec.group_size)


# -- masks -------------------------------------------------------------------------------------------------------------


def _masks(layer: CompressedLayer, mask: Mask, length: int) -> tuple[list[torch.Tensor | None] | None, bool]:
    """A mask for every run, the window and the new tokens, or None; and whether new tokens are seen from then on only.

    Where a query sees all that comes before it, the kernels know what exists without a mask.
    """
    assert layer.storage is not None
    which, chunk, window = slice(0, length), layer.chunk, layer.storage.window
    simple = isinstance(mask, CausalMask) or (mask.causal and mask.no_padding)
    alike = window.recent.count(window.recent[0]) == window.sinks.count(window.sink_length) == len(window.recent)
    news = 0 if chunk is None else chunk.keys.shape[2]
    # A single new token sees itself; the position of more is looked at, which may wait for the device.
    same = chunk is None or (simple and news == length and (length == 1 or _start(mask) == chunk.start))
    causal = same and mask.causal and length > 1
    if simple and alike and same:
        return None, causal
    masks = [None if simple else _bytes(mask.allowed(run.slots, which)) for run in _runs(layer.storage)]
    exact = exact_run(layer.storage)
    masks.append(None if exact is None or (simple and alike) else _bytes(mask.allowed(exact[2], which)))
    masks.append(None if chunk is None or same else _bytes(mask.allowed(chunk_slots(chunk.start, news), which)))
    return masks if any(one is not None for one in masks) else None, causal


def _start(mask: Mask) -> int:
    """Position of the first query."""
    assert not isinstance(mask, DenseMask)
    return mask.q_offset if isinstance(mask, CausalMask) else mask.start


def _bytes(allowed: torch.Tensor | None) -> torch.Tensor | None:
    """Booleans whose last axis is dense."""
    if allowed is None or allowed.stride(-1) == 1 or allowed.shape[-1] == 1:
        return allowed
    return allowed.contiguous()
