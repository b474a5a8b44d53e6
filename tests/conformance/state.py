"""Feeding a cache with given keys and values, and looking at what it stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from hf_kvcompress.attention import kvcompress_attention
from hf_kvcompress.calibration import Calibration
from hf_kvcompress.codecs.transform import Frame
from hf_kvcompress.lanes import LanePages
from hf_kvcompress.rotary import Rotary

from .zoo import WINDOW

HEADS, DIM, LAYERS = 2, 32, 2
FULL = LlamaConfig(num_hidden_layers=LAYERS, hidden_size=64, num_attention_heads=2, attn_implementation="eager")
SLIDING = MistralConfig(
    num_hidden_layers=LAYERS, hidden_size=64, num_attention_heads=2, sliding_window=WINDOW, attn_implementation="eager"
)
OURS, OURS_SLIDING = LlamaConfig(num_hidden_layers=LAYERS), MistralConfig(sliding_window=WINDOW)
for _config in (OURS, OURS_SLIDING):
    _config._attn_implementation_internal = "kvcompress"
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def random_pairs(rows: int, tokens: int, seed: int = 0, dim: int = DIM) -> Pairs:
    """Keys and values `[B, H, T, D]` of each layer; channels of keys differ in mean and spread, as real ones do."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    pairs = []
    for _ in range(LAYERS):
        keys = 2 * normal(1, HEADS, 1, dim) + normal(1, HEADS, 1, dim).exp() * normal(rows, HEADS, tokens, dim)
        pairs.append((keys, normal(rows, HEADS, tokens, dim)))
    return pairs


class Attention(torch.nn.Module):
    """What the attention function wants to know of its module."""

    num_key_value_groups, is_causal = 2, True


def queries_of(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Queries `[B, 2 * H, T, D]` that follow from the tokens, so that a row has the same in a batch and alone."""
    return torch.stack([values, values.roll(1, -1)], dim=2).flatten(1, 2)


def feed(cache: Any, pairs: Pairs, attention_mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """One forward pass without a model: what the layers would hand to the cache.

    The mask is built first, as a model under `enable` builds it: that is how a cache learns what is padding. Without
    `attention_mask` (`[B, tokens so far]`, 0 for padding) no mask is built, as with a plain attention. A cache that
    evicts is always attended to with `queries_of` the tokens; what comes out of each layer is given back.
    """
    rows, _, tokens, _ = pairs[0][0].shape
    start, evicts, mask = cache.get_seq_length(), cache.settings.default.eviction is not None, None
    if attention_mask is None and evicts:
        attention_mask = torch.ones(rows, start + tokens, dtype=torch.long)
    if attention_mask is not None:
        sliding = any(layer.is_sliding for layer in cache.layers)
        make = create_sliding_window_causal_mask if sliding else create_causal_mask
        mask = make(
            config=OURS_SLIDING if sliding else OURS,
            inputs_embeds=torch.empty(rows, tokens, 1),
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=torch.arange(start, start + tokens).expand(rows, -1),
        )
    out = []
    for index, (keys, values) in enumerate(pairs):
        handles = cache.update(keys, values, index)
        if evicts:
            out.append(kvcompress_attention(Attention(), queries_of(keys, values), *handles, mask)[0])
    return out


def feed_in_parts(cache: Any, pairs: Pairs, sizes: list[int], attention_mask: torch.Tensor | None = None) -> None:
    """`feed` the same tokens in parts of these sizes."""
    assert sum(sizes) == pairs[0][0].shape[2]
    start = 0
    for size in sizes:
        end = start + size
        part = [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in pairs]
        feed(cache, part, None if attention_mask is None else attention_mask[:, :end])
        start = end


def decoded(cache: Any) -> Pairs:
    """Keys and values of each layer in full, copied."""
    return [(keys.clone(), values.clone()) for keys, values, *_ in cache]


def equal(first: Pairs, second: Pairs) -> bool:
    return all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def errors(cache: Any, pairs: Pairs) -> torch.Tensor:
    """Relative L2 error of what the cache holds, keys and values of each layer."""
    return torch.stack(
        [
            (got - x).norm() / x.norm()
            for held, made in zip(decoded(cache), pairs, strict=True)
            for got, x in zip(held, made, strict=True)
        ]
    )


def codecs(cache: Any) -> Iterator[tuple[int, str, Any]]:
    """Layer number, role and codec of everything that is packed (after the first update)."""
    for index, layer in enumerate(cache.layers):
        for role, codec in layer.storage.pages.codecs.items():
            yield index, role, codec


def packed_rows(cache: Any, row: int) -> list[torch.Tensor]:
    """The packed entries that a row fills, in a fixed order: what must be equal bit for bit."""
    cache.commit()
    found = []
    for layer in cache.layers:
        pages = layer.storage.pages
        for slab in pages.slabs:
            tokens = min(max(pages.counts[row] - slab.start, 0), slab.capacity)
            for role, codec in pages.codecs.items():
                for name, tensor in slab.packed(role).items():
                    field = codec.fields[name]
                    own = tensor[row]
                    if field.tokens is None:
                        found.append(own if tokens else own[..., :0])
                    else:
                        units = tokens // field.tokens
                        found.append(own[..., :units] if field.tokens_last else own[:, :, :units])
    return found


@dataclass
class Held:
    """Every token that the heads of a row hold in one layer, sorted by position, -1 where a head has fewer.

    positions `[H, n]`, keys and values `[H, n, D]` as they decode, mass `[H, n]` if it is tracked.
    """

    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mass: torch.Tensor | None

    def of_head(self, head: int) -> list[int]:
        """Positions that one head holds."""
        own = self.positions[head]
        return own[own >= 0].tolist()

    @property
    def counts(self) -> list[int]:
        return (self.positions >= 0).sum(1).tolist()


def held(cache: Any, row: int = 0) -> list[Held]:
    """What a row of the cache holds, layer by layer: sinks, sealed tokens of the first tier, recent window."""
    cache.commit()
    return [_held(layer.storage, row) for layer in cache.layers]


def _held(storage: Any, row: int) -> Held:
    window, pages, heads = storage.window, storage.pages, storage.heads["key"]
    sinks, recent = window.sinks[row], window.recent[row]
    exact = torch.cat([torch.arange(sinks), torch.arange(recent) + window.sink_length])
    at = storage.exact_positions()[row, exact].expand(heads, -1)
    if isinstance(pages, LanePages):
        table = pages.table([row])
        sealed = pages.look_up("positions", table, -1).long()
        keys, values = (pages.decode(role, table) for role in ("key", "value"))
        mass = pages.look_up("mass", table, 0.0) if pages.track_mass else None
    else:
        keys, values = (x[0] for x in pages.read_row(row, 0, pages.counts[row]))
        sealed = storage.positions.of_row(row, sinks, sinks + pages.counts[row]).expand(heads, -1)
        mass = None
    parts = [at[:, :sinks], sealed, at[:, sinks:]]
    everything = [
        torch.cat([part[row][:, exact[:sinks]], own, part[row][:, exact[sinks:]]], dim=1)
        for part, own in zip(
            window.parts, (keys, values) if mass is None else (keys, values, mass[..., None]), strict=True
        )
    ]
    return Held(
        torch.cat(parts, dim=1), everything[0], everything[1], everything[2][..., 0] if mass is not None else None
    )


def held_bytes(cache: Any) -> int:
    """Bytes of every storage reachable from the cache, counted once: attributes, lists, tuples, sets, dictionaries."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    waiting = [cache]
    alive = []
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        alive.append(item)  # an id must not be used twice
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
        elif isinstance(item, Rotary | Calibration | Frame):
            continue  # of the model
        elif type(item).__module__.startswith(("hf_kvcompress", "transformers.cache_utils")):
            waiting += list(getattr(item, "__dict__", {}).values())
            waiting += [getattr(item, name) for name in getattr(type(item), "__slots__", ()) if hasattr(item, name)]
    return sum(storages.values())
