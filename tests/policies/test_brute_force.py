"""Every policy against a dense layer that hides what it evicts: the same tokens stay, the same attention comes out."""

from __future__ import annotations

import pytest
import torch

import hf_kvcompress as kvc

from ..conformance.factories import PAGE, RESIDUAL, SINKS, SMALL
from ..conformance.state import FULL, HEADS, LAYERS, feed, held, queries_of, random_pairs
from .reference import SCORES, DenseLayer

BUDGET = 40
SIZES = {
    "prompt and decoding": [70] + [1] * 20,
    "chunks": [20, 31, 1, 1, 30, 7, 1, 9],
    "decoding": [1] * 72,
}


def run(policy: str, sizes: list[int], budget: int | None, **settings):
    cache = kvc.CompressedCache(FULL, codec="identity", policy=policy, budget=budget, **{**SMALL, **settings})
    adaptive, recent = settings.get("head_budget") == "adaptive", settings.get("recent", 0.25)
    dense = [
        DenseLayer(policy, budget, SINKS, RESIDUAL, PAGE, recent, adaptive, layer=index) for index in range(LAYERS)
    ]
    pairs, start = random_pairs(1, sum(sizes), seed=3), 0
    for size in sizes:
        part = [tuple(x[:, :, start : start + size] for x in pair) for pair in pairs]
        start += size
        for layer, got, (keys, values) in zip(dense, feed(cache, part), part, strict=True):
            expected = layer.step(queries_of(keys, values)[0], keys[0], values[0])
            torch.testing.assert_close(got[0], expected, atol=2e-5, rtol=1e-4)
        for layer, stored in zip(dense, held(cache), strict=True):
            yield layer, stored


def check(layer: DenseLayer, stored) -> None:
    for head in range(HEADS):
        kept = layer.kept[head].nonzero()[:, 0]
        assert stored.of_head(head) == kept.tolist()
        own = stored.positions[head] >= 0
        assert torch.equal(stored.keys[head, own], layer.keys[head, kept])
        assert torch.equal(stored.values[head, own], layer.values[head, kept])
        if stored.mass is not None:
            torch.testing.assert_close(stored.mass[head, own], layer.mass[head, kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("policy", SCORES)
def test_same_tokens_and_attention_as_a_dense_layer(policy: str, sizes: list[int]) -> None:
    for layer, stored in run(policy, sizes, budget=BUDGET):
        check(layer, stored)
    assert max(layer.kept.sum(1).tolist()) <= BUDGET < layer.kept.shape[1]


@pytest.mark.parametrize("policy", sorted(set(SCORES) - {"streaming", "tova"}))
def test_heads_that_compete_for_one_budget(policy: str) -> None:
    for layer, stored in run(policy, SIZES["chunks"], budget=BUDGET, head_budget="adaptive", recent=0.1):
        check(layer, stored)


def test_without_a_budget_all_tokens_stay_and_collect_mass() -> None:
    for layer, stored in run("h2o", SIZES["chunks"], budget=None):
        check(layer, stored)
    assert bool(layer.kept.all())
