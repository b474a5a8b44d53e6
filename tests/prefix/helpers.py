"""Small models and prompts of the prefix tests, and what a cache that reads a prompt itself gives."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from hf_kvcompress.prefix.cache import PrefixCache

from ..tiny_model import tiny_llama

SMALL = {"page_size": 8, "residual_length": 8, "sink_length": 2, "group_size": 8}
TOLERANCE = 1e-4


@functools.cache
def llama() -> Any:
    return tiny_llama(eos_token_id=None).requires_grad_(False)


def text(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prefix_cache(model: Any = None, codec: str = "identity", **options: Any) -> PrefixCache:
    """A small store for a model; `cache` and the rest as for `PrefixCache`."""
    own = {**SMALL, "codec": codec, **options.pop("cache", {})}
    return PrefixCache(options.pop("max_cache_size_gb", 1), model=model or llama(), cache=own, **options)


def rest(model: Any, cache: Any, ids: Sequence[int], have: int, steps: int = 12) -> torch.Tensor:
    """Logits of what a cache has not read of a prompt, then of single tokens behind it, `[T, V]`."""
    first = model(torch.tensor([list(ids[have:])]), past_key_values=cache).logits[0]
    tokens = [3 + token % 80 for token in text(steps, 99)]
    more = [model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in tokens]
    return torch.cat([first[-1:], *more])


def by_itself(store: PrefixCache, ids: Sequence[int], stops: Sequence[int], steps: int = 12) -> torch.Tensor:
    """The same logits of a cache that reads the prompt itself, up to each of `stops` in a pass of its own."""
    reader = store.reader
    cache, have = reader.new_cache(), 0
    for stop in stops:
        reader.model(torch.tensor([list(ids[have:stop])]), past_key_values=cache)
        have = stop
    return rest(reader.model, cache, ids, have, steps)


def by_store(store: PrefixCache, ids: Sequence[int], steps: int = 12) -> tuple[torch.Tensor, int]:
    """The logits behind what the store knows, and how many tokens it knew."""
    before = store.store.stats.tokens_reused
    cache, have = store.open(list(ids))
    assert cache.get_seq_length() == have < len(ids)
    return rest(store.reader.model, cache, ids, have, steps), store.store.stats.tokens_reused - before
