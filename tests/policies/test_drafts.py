"""Taking tokens back from a cache that evicts: exact with past recording, refused without, and never half done."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.observation import LONGEST_DRAFT

from ..conformance.factories import EVICTING_FEW, SMALL, TIGHT, Factory
from ..conformance.state import FULL, Pairs, feed, feed_in_parts, held, random_pairs
from .test_rows import assert_same_row

few_caches = pytest.mark.parametrize("factory", EVICTING_FEW, ids=lambda factory: factory.name)
PAIRS = random_pairs(2, 160, seed=2)
MASK = torch.ones(2, 160, dtype=torch.long)
MASK[1, :9] = 0


def part(start: int, end: int) -> Pairs:
    return [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in PAIRS]


def fed(cache: Any, *ends: int) -> Any:
    """A cache after the tokens up to each of these ends, a pass each."""
    for end in ends:
        feed(cache, part(cache.get_seq_length(), end), MASK[:, :end])
    return cache


def windows(cache: Any) -> list[torch.Tensor]:
    """The newest queries that policies remember."""
    evictors = [layer.storage.evictor for layer in cache.layers]
    return [evictor.window.queries for evictor in evictors if evictor.window is not None]


def assert_same(cache: Any, other: Any, exactly: bool = True) -> None:
    assert cache.get_seq_length() == other.get_seq_length()
    for row in range(2):
        assert_same_row(held(cache, row), held(other, row), exactly)
    for one, two in zip(windows(cache), windows(other), strict=True):
        assert torch.equal(one, two)


@few_caches
@pytest.mark.parametrize("drafted", [1, 30])
def test_a_draft_that_is_taken_back_leaves_no_trace(factory: Factory, drafted: int) -> None:
    cache, other = (fed(factory(FULL), 40, 61) for _ in range(2))
    for one in (cache, other):
        one.activate_past_recording()
    for end in (61, 65):
        fed(cache, end + drafted)
        assert cache.is_croppable
        cache.crop(-drafted)
        assert_same(cache, other)
        for one in (cache, other):
            fed(one, end + 4)
            one.commit()


@few_caches
def test_the_part_of_a_draft_that_stays_is_as_if_it_came_alone(factory: Factory) -> None:
    cache, other = (fed(factory(FULL), 40, 61) for _ in range(2))
    cache.activate_past_recording()
    for start in range(61, 125, 8):
        fed(cache, start + 13)
        cache.crop(-5)
        fed(other, start + 8)
    assert_same(cache, other, exactly=False)


@few_caches
def test_a_draft_behind_a_long_prompt(factory: Factory) -> None:
    """Assisted decoding hands prompt and first draft over in one pass."""
    cache, other = factory(FULL), factory(FULL)
    cache.activate_past_recording()
    fed(cache, 104).crop(-4)
    fed(other, 100)
    assert_same(cache, other, exactly=False)
    for one in (cache, other):
        fed(one, 110, 111)
    assert_same(cache, other, exactly=False)


@few_caches
def test_without_recording_a_crop_after_eviction_is_refused(factory: Factory) -> None:
    cache, other = (fed(factory(FULL), 40, 100) for _ in range(2))
    assert not cache.is_croppable
    with pytest.raises(RuntimeError, match=r"crop: layer \d has evicted tokens.*activate_past_recording"):
        cache.crop(-2)
    assert_same(cache, other)
    cache.crop(0)
    for one in (cache, other):
        fed(one, 120)
    assert_same(cache, other)


@few_caches
def test_a_crop_beyond_the_draft_is_refused_and_changes_nothing(factory: Factory) -> None:
    cache, other = (fed(factory(FULL), 40, 100) for _ in range(2))
    for one in (cache, other):
        one.activate_past_recording()
        fed(one, 105)
    with pytest.raises(RuntimeError, match=r"crop: layer \d has evicted tokens"):
        cache.crop(-6)
    for one in (cache, other):
        one.crop(-5)
    assert_same(cache, other)


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "streaming"])
def test_a_crop_into_the_middle_of_a_long_pass(policy: str) -> None:
    """Mass is kept by query for the newest tokens of a pass only; what was not counted is not asked for."""
    cache, other = (kvc.CompressedCache(FULL, codec="identity", policy=policy, budget=TIGHT, **SMALL) for _ in range(2))
    cache.activate_past_recording()
    fed(cache, 150)
    back = LONGEST_DRAFT + 1
    if policy == "h2o":
        with pytest.raises(RuntimeError, match=f"at most the last {LONGEST_DRAFT} tokens of a pass, or all of it"):
            cache.crop(-back)
        back = LONGEST_DRAFT
    cache.crop(-back)
    assert_same(cache, fed(other, 150 - back), exactly=False)
    cache.reset()
    fed(cache, 150).crop(-150)
    other.reset()
    for one in (cache, other):
        fed(one, 100)
    assert_same(cache, other, exactly=False)


@pytest.mark.parametrize("policy", ["streaming", "keydiff", "random", "snapkv"])
def test_before_anything_is_evicted_a_crop_is_exact(policy: str) -> None:
    """What tokens score does not depend on those taken back, but for attention mass, which is not given back."""
    cache, other = (kvc.CompressedCache(FULL, codec="identity", policy=policy, budget=80, **SMALL) for _ in range(2))
    fed(cache, 50, 70).crop(-25)
    fed(other, 45)
    for row in range(2):
        assert_same_row(held(cache, row), held(other, row))
    if policy != "snapkv":  # its newest queries were those of tokens that are gone
        for one in (cache, other):
            fed(one, 100, 120)
        assert_same(cache, other)


def test_bytes_do_not_grow_over_drafts() -> None:
    cache = kvc.CompressedCache(FULL, codec="int4", policy="h2o", budget=40, **SMALL)
    cache.activate_past_recording()
    pairs = random_pairs(1, 60)
    feed_in_parts(cache, pairs, [50, 10])
    before = cache.nbytes
    for seed in range(40):
        feed(cache, random_pairs(1, 5, seed))
        cache.crop(-3)
    assert cache.nbytes <= 1.1 * before
