"""Tokens that stay whatever they score: pins, the prompt, both ends; and tokens that go or stay together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kvcompress as kvc

from ..conformance.factories import NAMES, RESIDUAL, SINKS, SMALL
from ..conformance.state import FULL, feed, held, random_pairs

LENGTHS = (200, 170)  # of two rows, the second behind padding


def filled(first: int = 100, steps: int = 100, **settings: Any) -> Any:
    """A batch of two rows, the first pass of `first` tokens, then steps of a few."""
    cache = kvc.CompressedCache(FULL, **{"codec": "identity", "budget": 64, **SMALL, **settings})
    pairs = random_pairs(2, 200, seed=4)
    mask = torch.stack([torch.arange(200) >= 200 - length for length in LENGTHS]).long()
    for start, end in [(0, first), *((at, min(at + 4, first + steps)) for at in range(first, first + steps, 4))]:
        feed(cache, [tuple(x[:, :, start:end] for x in pair) for pair in pairs], mask[:, :end])
    return cache


def offsets(cache: Any) -> list[list[set[int]]]:
    """By row, for every layer and head the tokens that are held, counted from the row's first."""
    return [
        [{at - 200 + length for at in layer.of_head(head)} for layer in held(cache, row) for head in range(2)]
        for row, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
@pytest.mark.parametrize("policy", NAMES)
def test_pinned_tokens_stay(policy: str, head_budget: str) -> None:
    if head_budget == "adaptive" and kvc.CacheConfig.make(policy=policy).default.eviction.make_policy().shared:
        with pytest.raises(ValueError, match="head_budget: expected 'uniform'"):
            filled(policy=policy, head_budget=head_budget)
        return
    cache = filled(policy=policy, pin=[(0, 5), (20, 30)], head_budget=head_budget)
    for row, lanes in enumerate(offsets(cache)):
        for own in lanes:
            assert own >= {*range(5), *range(20, 30)}
            assert len(own) < LENGTHS[row] / 2


@pytest.mark.parametrize("policy", ["streaming", "h2o", "random"])
@pytest.mark.parametrize("pinned, expected", [(True, 40), (12, 12), (1000, 40)])
def test_a_pinned_prompt_stays(policy: str, pinned: bool | int, expected: int) -> None:
    """What counts is a row's own first pass: the padded row's has 10 tokens."""
    cache = filled(first=40, steps=160, policy=policy, pin_prompt=pinned, budget=72)
    full, padded = offsets(cache)
    for own in full:
        assert own >= set(range(expected))
    for own in padded:
        assert own >= set(range(min(expected, 10)))
    if policy == "streaming":
        assert all(min(own - set(range(expected))) > 100 for own in full)


def test_a_row_that_is_padding_in_the_first_pass_has_its_prompt_later() -> None:
    cache = filled(first=24, steps=176, policy="streaming", pin_prompt=True)
    full, padded = offsets(cache)
    assert all(own >= set(range(24)) for own in full)
    assert all(own >= {0, 1} and not own & {3, 4, 5} for own in padded), (
        "its first pass has 2 tokens, in the step to 32"
    )


@pytest.mark.parametrize("policy", ["random", "keydiff", "h2o"])
@pytest.mark.parametrize("first", [200, 100])
def test_a_boundary_keeps_both_ends(policy: str, first: int) -> None:
    """The beginning as long as it was when something first had to go; the end as long as it is now."""
    settings = {"policy": policy, "budget": 100, "first": first, "steps": 200 - first}
    with_ends, without = (offsets(filled(boundary=part, **settings)) for part in (0.1, 0.0))
    for length, lanes in zip(LENGTHS, with_ends, strict=True):
        begin = (first - 200 + length) // 10
        for own in lanes:
            assert own >= {*range(begin), *range(length - length // 10, length)}
    if policy == "random":
        assert not any(own >= set(range(20)) for lanes in without for own in lanes)


def test_recent_tokens_stay() -> None:
    for recent in (0.25, 0.5, 0.9):
        for lanes in offsets(filled(policy="random", recent=recent, budget=64)):
            length = max(max(own) for own in lanes) + 1
            for own in lanes:
                # a page less than the budget's part may be what is being sealed
                assert own >= set(range(length - max(min(int(recent * 64), 64 - 17) - 8, RESIDUAL), length))


def test_pins_come_before_recent_tokens() -> None:
    for lanes in offsets(filled(policy="streaming", pin=[(10, 50)], recent=1.0, budget=64)):
        assert all(own >= set(range(10, 50)) for own in lanes)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("policy", ["h2o", "keydiff", "random"])
def test_chunks_go_or_stay_together(policy: str, size: int) -> None:
    """By their mean score: in a middle that no boundary cuts at most one chunk of a head is split."""
    cache = filled(policy=policy, chunk_size=size, recent=0.0, budget=65, steps=0, first=200)
    for row, lanes in enumerate(offsets(cache)):
        last = LENGTHS[row] - RESIDUAL - 8
        for own in lanes:
            chunks = [set(range(at, at + size)) for at in range(-(-SINKS // size) * size, last - size, size)]
            split = [chunk for chunk in chunks if chunk & own and not chunk <= own]
            assert len(split) <= 1
            assert len(own) > 40


@pytest.mark.parametrize("codec", ["identity", "kivi4"])
def test_pins_fill_the_budget_to_its_last_token(codec: str) -> None:
    """Codecs that pack tokens together evict some in advance: not at the cost of pins."""
    sealed = 64 - SINKS - RESIDUAL - SMALL["page_size"] + 1
    cache = filled(policy="random", pin=[(20, 20 + sealed)], codec=codec, budget=64, group_size=SMALL["page_size"])
    for lanes in offsets(cache):
        for own in lanes:
            assert own >= set(range(20, 20 + sealed))


@pytest.mark.parametrize("name, pin", [("pin", {"pin": [(10, 70)]}), ("pin_prompt", {"pin_prompt": True})])
def test_pins_that_the_budget_cannot_hold_are_refused(name: str, pin: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected at most 4\d tokens .*layer 0.*got \d\d"):
        filled(policy="h2o", budget=64, **pin)
