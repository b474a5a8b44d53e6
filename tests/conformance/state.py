"""Feeding a cache with given keys and values, and looking at what it stores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig
from transformers.masking_utils import create_causal_mask

from .zoo import WINDOW

HEADS, DIM, LAYERS = 2, 32, 2
FULL = LlamaConfig(num_hidden_layers=LAYERS, hidden_size=64, num_attention_heads=2, attn_implementation="eager")
SLIDING = MistralConfig(
    num_hidden_layers=LAYERS, hidden_size=64, num_attention_heads=2, sliding_window=WINDOW, attn_implementation="eager"
)
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


def feed(cache: Any, pairs: Pairs, attention_mask: torch.Tensor | None = None) -> None:
    """One forward pass without a model: what the layers would hand to the cache.

    The mask is built first, as a model under `enable` builds it: that is how a cache learns what is padding. Without
    `attention_mask` (`[B, tokens so far]`, 0 for padding) no mask is built, as with a plain attention.
    """
    if attention_mask is not None:
        rows, _, tokens, _ = pairs[0][0].shape
        config = LlamaConfig(num_hidden_layers=LAYERS, attn_implementation="eager")
        config._attn_implementation_internal = "kvcompress"
        start = cache.get_seq_length()
        create_causal_mask(
            config=config,
            inputs_embeds=torch.empty(rows, tokens, 1),
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=torch.arange(start, start + tokens).expand(rows, -1),
        )
    for index, (keys, values) in enumerate(pairs):
        cache.update(keys, values, index)


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
        elif type(item).__module__.startswith(("hf_kvcompress", "transformers.cache_utils")):
            waiting += list(getattr(item, "__dict__", {}).values())
            waiting += [getattr(item, name) for name in getattr(type(item), "__slots__", ()) if hasattr(item, name)]
    return sum(storages.values())
