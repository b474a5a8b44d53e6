"""A budget holds after every update, whatever way tokens come, and memory stays where it is over thousands of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig

import hf_kvcompress as kvc

from ..conformance.factories import CODEC_KINDS, EVICTING, EVICTING_FEW, NAMES, PAGE, RESIDUAL, SINKS, SMALL, Factory
from ..conformance.state import FULL, feed, feed_in_parts, held, random_pairs

LEAST = SINKS + RESIDUAL + 2 * PAGE
PASSES = {"decoding": [1] * 48, "chunks": [50, 1, 1, 33, 7, 64, 1, 5]}


def limits(cache: Any, row: int) -> list[float]:
    """Tokens that each layer may hold for a row, on average over its heads."""
    storages = [layer.storage for layer in cache.layers]
    return [storage.evictor.tokens(storage.seen_by(row)) or float("inf") for storage in storages]


def assert_sound(cache: Any, rows: int, padding: list[int] | None = None) -> None:
    """Within the budget, sorted, no hole, sinks and recent tokens there, no padding, and all heads' numbers true."""
    for row in range(rows):
        first, seen = (padding or [0] * rows)[row], cache.get_seq_length()
        if seen <= first:
            continue
        for layer, kept, limit in zip(cache.layers, held(cache, row), limits(cache, row), strict=True):
            assert sum(kept.counts) <= limit * len(kept.counts)
            if layer.config.eviction.uniform_heads:
                assert max(kept.counts) <= limit
            table = layer.storage.pages.table([row])
            assert bool(((table >= 0) | (table.roll(1, 1) < 0))[:, 1:].logical_or(table[:, 1:] < 0).all())
            for head in range(len(kept.counts)):
                own = kept.of_head(head)
                assert own == sorted(set(own)) and first <= own[0] and own[-1] == seen - 1
                assert own[:SINKS] == list(range(first, min(first + SINKS, seen)))
                near = list(range(max(seen - RESIDUAL, first), seen))
                assert own[-len(near) :] == near


def every_update() -> list:
    few = [factory for factory in EVICTING_FEW if factory.name in ("h2o-eqrot4", "adaptive", "snapkv-kivi4", "ratio")]
    cases = [(factory, "chunks") for factory in EVICTING] + [(factory, "decoding") for factory in few]
    return [pytest.param(factory, PASSES[name], id=f"{factory.name}-{name}") for factory, name in cases]


@pytest.mark.parametrize("factory, sizes", every_update())
def test_after_every_update(factory: Factory, sizes: list[int]) -> None:
    """Two rows, one of them behind padding; the tokens of every head are counted after each pass."""
    pairs, cache, end = random_pairs(2, sum(sizes)), factory(FULL), 0
    mask = torch.ones(2, sum(sizes), dtype=torch.long)
    mask[1, :13] = 0
    for size in sizes:
        end += size
        feed(cache, [tuple(x[:, :, end - size : end] for x in pair) for pair in pairs], mask[:, :end])
        assert_sound(cache, 2, [0, 13])
    assert max(sum(layer.counts) for layer in held(cache)) < 2 * end


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("page", [8, 32])
def test_a_ratio_follows_the_tokens_seen(ratio: float, page: int) -> None:
    settings = {**SMALL, "page_size": page, "group_size": page}
    cache, seen = kvc.CompressedCache(FULL, codec="identity", policy="h2o", budget=ratio, **settings), 0
    for size in (10, 90, 1, 200, 99):
        feed(cache, random_pairs(1, size, seed=size))
        seen += size
        limit = max(-(-int(ratio * seen * 4) // 4), SINKS + RESIDUAL + 2 * page)
        assert_sound(cache, 1)
        for layer in held(cache):
            assert min(seen, limit - page) <= max(layer.counts) <= limit


@pytest.mark.parametrize("codec", CODEC_KINDS)
def test_nothing_goes_below_the_threshold(codec: str) -> None:
    """Each row counts its own tokens; above the threshold the budget holds at once."""
    cache = kvc.H2OCache(FULL, max_tokens=100, codec=codec, **SMALL)
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[1, :30] = 0
    for end in (60, 99, 100, 101, 129, 130, 131, 180):
        start = cache.get_seq_length()
        feed(cache, random_pairs(2, end - start, seed=end), mask[:, :end])
        for row, seen in enumerate((end, end - 30)):
            for layer in held(cache, row):
                if seen <= 100:
                    assert layer.counts == [seen, seen]
                else:
                    assert max(layer.counts) <= -(-seen // 2)


@pytest.mark.parametrize("name", NAMES)
def test_two_thousand_decoded_tokens(name: str) -> None:
    """Sinks survive, slots stay sorted, memory does not grow."""
    cache = kvc.CompressedCache(FULL, codec="int4", policy=name, budget=96, **SMALL)
    pairs, chunk = random_pairs(1, 250), 10 if name == "h2o" else 50
    nbytes: dict[int, int] = {}
    for step in range(2000 // chunk):
        start = step * chunk % 250
        feed(cache, [tuple(x[:, :, start : start + chunk] for x in pair) for pair in pairs])
        seen = cache.get_seq_length()
        if seen % 250 == 0:
            assert_sound(cache, 1)
            nbytes[seen] = cache.nbytes
    assert max(bytes_held for seen, bytes_held in nbytes.items() if seen > 500) <= 1.05 * nbytes[500]


@pytest.mark.parametrize("codec", CODEC_KINDS)
def test_memory_stays_within_what_the_tokens_take(codec: str) -> None:
    """Codec by codec: the most that was held in 2,000 tokens, beside a cache that saw no more than the budget."""
    cache = kvc.CompressedCache(FULL, codec=codec, policy="streaming", budget=128, **SMALL)
    most = 0
    for seed in range(50):
        feed(cache, random_pairs(1, 40, seed % 7))
        most = max(most, cache.nbytes)
    small = kvc.CompressedCache(FULL, codec=codec, policy="streaming", **SMALL)
    feed_in_parts(small, random_pairs(1, 128), [128])
    assert most <= 1.35 * small.nbytes


def test_the_peak_of_chunked_prefill_is_that_of_a_chunk() -> None:
    """Twice as long a prompt in chunks of the same size holds no more at any time."""
    most = []
    for chunks in (4, 8):
        cache, own = kvc.CompressedCache(FULL, codec="int4", policy="h2o", budget=64, **SMALL), []
        for seed in range(chunks):
            feed(cache, random_pairs(1, 100, seed))
            own.append(cache.nbytes)
        most.append(max(own))
    assert most[1] <= 1.02 * most[0]


@pytest.mark.parametrize("budget, window", [(40, 100), (40, 30), (None, 50)])
@pytest.mark.parametrize("policy", ["h2o", "streaming", "snapkv"])
def test_sliding_layers_hold_to_the_budget_and_the_window(policy: str, budget: int | None, window: int) -> None:
    config = MistralConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, sliding_window=window)
    cache = kvc.CompressedCache(config, codec="identity", policy=policy, budget=budget, sliding="evict", **SMALL)
    for size in (70, 1, 1, 40, 1, 25, *[1] * 20):
        feed(cache, random_pairs(1, size, seed=size))
        for layer in held(cache):
            limit = window + PAGE if budget is None else min(budget, window + PAGE)
            assert max(layer.counts) <= limit
            assert layer.of_head(0)[-RESIDUAL:] == list(range(cache.get_seq_length()))[-RESIDUAL:]
            hidden = [at for at in layer.of_head(0) if at < cache.get_seq_length() - window + 1 - PAGE]
            assert not hidden, "what no query sees any more is not kept for more than a page"
