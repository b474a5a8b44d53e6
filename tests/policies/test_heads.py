"""Budgets by head and by layer: bytes are really freed where tokens are few."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.policies.base import Candidates, Policy

from ..conformance.factories import PAGE, RESIDUAL, SINKS, SMALL
from ..conformance.state import DIM, FULL, HEADS, Pairs, feed, held, random_pairs

BUDGET = 96
EXACT = SINKS + RESIDUAL + PAGE - 1  # what a layer keeps free for sinks and a full window


def lopsided(tokens: int, seed: int = 0) -> Pairs:
    """Head 0 looks at a few tokens only, which take nearly all; head 1 at all alike."""
    pairs = random_pairs(1, tokens, seed)
    for keys, _ in pairs:
        keys[:, 1] *= 0.01
    return pairs


class LastHead(Policy):
    """The last head's newest tokens before all others'."""

    name = "last-head"

    def score(self, candidates: Candidates) -> torch.Tensor:
        heads = torch.arange(len(candidates.positions)) % candidates.heads
        return 1e4 * heads[:, None] + candidates.positions.float()


def adaptive(budget: int = BUDGET, **settings: Any) -> Any:
    own = {"policy": "snapkv", "codec": "identity", "head_budget": "adaptive", **SMALL, **settings}
    return kvc.CompressedCache(FULL, budget=budget, **own)


def filled(cache: Any, pairs: Pairs | None = None) -> Any:
    pairs = pairs or lopsided(400)
    for start in range(0, 400, 50):
        feed(cache, [tuple(x[:, :, start : start + 50] for x in pair) for pair in pairs])
    return cache


@pytest.mark.parametrize("codec", ["identity", "int4", "eqrot4", "kivi4"])
@pytest.mark.parametrize("policy", ["snapkv", "h2o", "keydiff", "expected"])
def test_heads_share_one_budget(policy: str, codec: str) -> None:
    cache = filled(adaptive(policy=policy, codec=codec))
    for layer in held(cache):
        assert sum(layer.counts) <= HEADS * BUDGET
        assert min(layer.counts) >= int(0.2 * (BUDGET - EXACT)) * (codec != "kivi4")
        if codec != "kivi4":  # packed page by page: goes a few pages lower, to go less often
            assert sum(layer.counts) > HEADS * (BUDGET - PAGE)
    assert any(len(set(layer.counts)) > 1 for layer in held(cache))


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.6, 1.0])
def test_every_head_keeps_its_floor(floor: float) -> None:
    cache = filled(adaptive(head_floor=floor, policy="keydiff", recent=0.0))
    limit = BUDGET - EXACT
    for layer in held(cache):
        sealed = [
            count - SINKS - layer_window for count, layer_window in zip(layer.counts, windows(cache), strict=True)
        ]
        assert min(sealed) >= int(floor * limit) and sum(sealed) == HEADS * limit
        if floor == 1.0:
            assert len(set(sealed)) == 1


def windows(cache: Any) -> list[int]:
    return [cache.layers[0].storage.window.recent[0]] * HEADS


@pytest.mark.parametrize("codec", ["identity", "int4", "eqrot4"])
def test_bytes_are_those_of_the_tokens_that_are_kept(codec: str) -> None:
    """No masked eviction: as large as heads that keep equally many, not as if all kept what the fullest keeps."""
    settings = {"policy": LastHead(), "codec": codec, "recent": 0.0}
    ours = filled(adaptive(head_floor=0.0, **settings))
    (least, most), _ = (layer.counts for layer in held(ours))
    assert least == SINKS + windows(ours)[0] and least + most > 2 * BUDGET - 2 * PAGE
    even = filled(adaptive(head_budget="uniform", **settings))
    full = filled(adaptive(head_budget="uniform", **{**settings, "budget": most}))
    exact = sum(tensor.nbytes for layer in ours.layers for tensor in layer.storage.window.parts)
    queries = sum(tensor.nbytes for layer in ours.layers for tensor in layer.storage.evictor.tensors())
    assert queries == 0
    ours, even, full = (cache.nbytes - exact for cache in (ours, even, full))
    assert abs(ours - even) <= 0.15 * even
    assert ours < 0.7 * full


def test_a_page_of_head_bytes_is_freed_for_every_page_of_tokens() -> None:
    """Counted in the tensors of the pages themselves."""
    cache = filled(adaptive(head_floor=0.0, recent=0.0))
    for layer, kept in zip(cache.layers, held(cache), strict=True):
        pages = layer.storage.pages
        tokens = sum(kept.counts) - HEADS * (SINKS + layer.storage.window.recent[0])
        room = sum(len(block.lanes) * block.capacity for block in pages.blocks)
        assert tokens <= room <= tokens + (HEADS + 2) * PAGE + 16
        held_by_codes = sum(
            tensor.nbytes for block in pages.blocks for p in block.packed.values() for tensor in p.values()
        )
        assert held_by_codes == room * 2 * DIM * 4


def test_layers_of_a_pyramid_fall_with_depth() -> None:
    config = FULL.__class__(num_hidden_layers=6, hidden_size=64, num_attention_heads=2)
    cache = kvc.PyramidKVCache(config, budget=100, beta=5, window_size=8, codec="identity", **SMALL)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        feed(cache, [tuple(torch.randn(2, 1, 2, 60, DIM, generator=generator)) for _ in range(6)])
    counts = [layer.counts[0] for layer in held(cache)]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 6
    assert counts[0] <= 178 and counts[-1] <= SINKS + RESIDUAL + 2 * PAGE
    budgets = [layer.config.eviction.budget for layer in cache.layers]
    least = SINKS + RESIDUAL + 2 * PAGE
    assert budgets == [178, 146, 114, 83, 51, least]  # 180, 148 ... 52, 20, less what the last layer needs besides
    assert 594 < sum(budgets) <= 600
    sizes = [kvc.tensor_bytes([layer]) for layer in cache.layers]
    assert sizes == sorted(sizes, reverse=True)


def test_measured_weights_share_the_budget() -> None:
    cache = kvc.CompressedCache(FULL, policy="h2o", budget=60, layer_budget=[3, 1], **SMALL)
    assert [layer.config.eviction.budget for layer in cache.layers] == [90, 30]
    ratios = kvc.CompressedCache(FULL, policy="h2o", budget=0.6, layer_budget=[3, 1], **SMALL)
    assert [layer.config.eviction.budget for layer in ratios.layers] == [pytest.approx(0.9), pytest.approx(0.3)]
