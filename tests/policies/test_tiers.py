"""Several tiers: every token is in one of them, budgets hold, nothing is lost or doubled, what matters comes back."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.hierarchical import level_bits, share_tokens_by_ratio
from hf_kvcompress.reading import lane_stores

from ..conformance.factories import PAGE, RESIDUAL, SINKS, SMALL
from ..conformance.state import FULL, feed, random_pairs
from ..tiny_model import tiny_llama

WARNING = "ignore:importance:UserWarning"


def positions_by_tier(cache: Any, layer: int, lane: int) -> list[list[int]]:
    """Positions of a lane's sealed tokens, tier by tier."""
    tiers = []
    for _, pages, _ in lane_stores(cache.layers[layer].storage):
        at = pages.look_up("positions", pages.table([lane // pages.heads]), -1)[lane % pages.heads]
        tiers.append(sorted(int(p) for p in at if p >= 0))
    return tiers


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("levels", [("int8", "int4", "int2"), ("eqrot4", "eqrot2", "cpu"), ("kivi4", "kivi2")], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_trace_loses_and_doubles_no_token(levels: tuple[str, ...], seed: int) -> None:
    """Chunks of random length, rows behind padding, random attention mass, rows taken and repeated."""
    rng = random.Random(seed)
    cache = kvc.HierarchicalCache(FULL, levels=levels, ratio=0.3, min_length=16, **SMALL)
    pairs = random_pairs(2, 260, seed=seed)
    mask = torch.ones(2, 260, dtype=torch.long)
    mask[1, :7] = 0
    seen, rows = 0, 2
    while seen < 250:
        size = min(rng.choice([1, 3, 8, 21]), 260 - seen)
        feed(
            cache, [tuple(x[:rows, :, seen : seen + size] for x in pair) for pair in pairs], mask[:rows, : seen + size]
        )
        seen += size
        cache.commit()
        if rng.random() < 0.15:
            order = torch.tensor([rng.randrange(rows) for _ in range(rows)])
            cache.batch_select_indices(order)
            pairs = [tuple(x[order] for x in pair) for pair in pairs]
            mask = mask[order]
        for index, layer in enumerate(cache.layers):
            storage = layer.storage
            for _, pages, _ in lane_stores(storage):
                for block in pages.blocks:  # another pass's attention decides anew
                    if block.mass is not None:
                        block.mass = torch.rand_like(block.mass)
            for row in range(rows):
                first, sinks = storage.first_position(row), storage.window.sinks[row]
                sealed = storage.pages.counts[row]
                wanted = list(range(first + sinks, first + sinks + sealed))
                for head in range(2):
                    tiers = positions_by_tier(cache, index, row * 2 + head)
                    assert sorted(p for tier in tiers for p in tier) == wanted
                    if seen > 16:
                        for tier, part in zip(tiers, cache.shares, strict=False):
                            assert len(tier) <= part * (SINKS + sealed + RESIDUAL + PAGE) + SINKS + RESIDUAL + 2 * PAGE
    assert cache.stats()["tokens_demoted"] > 0 and cache.stats()["tokens_evicted"] == 0


@pytest.mark.filterwarnings(WARNING)
def test_what_attention_turns_to_is_promoted() -> None:
    cache = kvc.HierarchicalCache(
        FULL, levels=("identity", "int4"), shares=(0.3,), weights={"attention": 1}, min_length=16, **SMALL
    )
    pairs = random_pairs(1, 300, seed=3)
    mask = torch.ones(1, 300, dtype=torch.long)

    def go(start: int, end: int) -> None:
        feed(cache, [tuple(x[:, :, start:end] for x in pair) for pair in pairs], mask[:, :end])
        cache.commit()

    go(0, 200)
    below = positions_by_tier(cache, 0, 0)[1]
    wanted = below[5]
    tail = cache.layers[0].storage.tail
    for at in range(200, 260, 4):
        for block in tail.pages.blocks:
            assert block.mass is not None
            block.mass[block.positions == wanted] = 1e6
        go(at, at + 4)
    assert wanted in positions_by_tier(cache, 0, 0)[0]


@pytest.mark.filterwarnings(WARNING)
def test_a_short_text_costs_nothing() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 256, (1, 128), generator=torch.Generator().manual_seed(0))
    cache = kvc.HierarchicalCache(model.config, **SMALL)
    with kvc.enable(model), torch.no_grad():
        out = model(ids, past_key_values=cache).logits
    assert cache.stats()["tokens_demoted"] == 0
    torch.testing.assert_close(out, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("ratio", [0.35, 0.5, 0.8])
def test_the_ratio_is_what_comes_out(ratio: float) -> None:
    """Of bytes in bfloat16, metadata of the policy and exact window included; a long text comes close."""
    config = FULL.__class__(num_hidden_layers=1, hidden_size=256, num_attention_heads=2, num_key_value_heads=2)
    cache = kvc.HierarchicalCache(config, ratio=ratio)
    keys, values = (torch.randn(1, 2, 6000, 128).bfloat16() for _ in range(2))
    for start in range(0, 6000, 1000):
        cache.update(keys[:, :, start : start + 1000], values[:, :, start : start + 1000], 0)
        cache.commit()
    assert 1 / cache.stats()["avg_compression_ratio"] == pytest.approx(ratio, abs=0.06)


def test_shares_follow_from_the_ratio() -> None:
    bits = level_bits(("identity", "int8", "int4"))
    for ratio in (0.3, 0.5, 0.9):
        shares = share_tokens_by_ratio(bits, ratio)
        assert sum(shares) == pytest.approx(1) and min(shares) > 0
        assert sum(s * b for s, b in zip(shares, bits, strict=True)) == pytest.approx(16 * ratio, abs=0.01)
    assert share_tokens_by_ratio(bits, 1.0)[0] == pytest.approx(1, abs=1e-6)
    assert share_tokens_by_ratio(bits, 0.1)[-1] == pytest.approx(1, abs=1e-6)


@pytest.mark.filterwarnings(WARNING)
def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KVCOMPRESS_LEVELS", "4")
    monkeypatch.setenv("HF_KVCOMPRESS_RATIO", "0.4")
    cache = kvc.HierarchicalCache(FULL)
    assert cache.levels == ("identity", "int8", "eqrot4", "eqrot2")
    assert cache.settings.default.eviction.tiers == ("int8", "eqrot4", "eqrot2")
    monkeypatch.setenv("HF_KVCOMPRESS_ENABLE", "0")
    assert kvc.HierarchicalCache(FULL).settings.default.eviction is None


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"levels": ()}, "levels: expected one codec or more"),
        ({"levels": ("cpu", "int4")}, "levels: expected one codec or more"),
        ({"levels": ("int8", "int5")}, "levels: expected .*'int5'"),
        ({"levels": ("int8", "cpu", "int4")}, "demote_to: expected 'cpu' as the last tier only"),
        ({"ratio": 0}, "ratio: expected a number above 0"),
        ({"shares": (0.5,)}, "shares: expected 2 parts"),
        ({"weights": {"size": 1}}, "weights: expected magnitude, learned, attention, got 'size'"),
        ({"weights": {"attention": 0}}, "weights: expected one above 0"),
    ],
)
@pytest.mark.filterwarnings(WARNING)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kvc.HierarchicalCache(FULL, **settings)
