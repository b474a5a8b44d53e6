"""The quality guard: error of the attention output as it is sealed, and layers that go one level back."""

from __future__ import annotations

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.stepping import next_level

from .conformance.factories import SMALL
from .conformance.state import held
from .tiny_model import tiny_llama


def run(cache: kvc.CompressedCache, model: torch.nn.Module, rows: int = 2) -> list[torch.Tensor]:
    ids = torch.randint(0, 256, (rows, 160), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, 160, dtype=torch.long)
    mask[1:, :9] = 0
    out = []
    with kvc.enable(model), torch.no_grad():
        for start in range(0, 160, 16):
            part = slice(start, start + 16)
            out.append(model(ids[:, part], attention_mask=mask[:, : start + 16], past_key_values=cache).logits)
    return out


@pytest.mark.parametrize("policy", [{}, {"policy": "h2o", "budget": 80}], ids=["all", "h2o"])
def test_a_layer_that_loses_too_much_goes_back_until_it_does_not(policy: dict) -> None:
    model = tiny_llama()
    cache = kvc.CompressedCache(model.config, codec="int2", quality_guard=0.05, **SMALL, **policy)
    run(cache, model)
    assert cache.events
    for index, layer in enumerate(cache.layers):
        steps = [event for event in cache.events if event.layer == index]
        names = [steps[0].before[0], *(event.after[0] for event in steps)]
        assert names == ["int2", "int3", "int4", "int8", "identity"][: len(names)] and len(names) >= 4
        assert all(event.error > event.threshold == 0.05 for event in steps)
        assert layer.config.keys == names[-1] == cache.stats().layers[index].keys
        assert layer.storage.pages.codecs["key"].name == ("identity16" if names[-1] == "identity" else names[-1])


def test_going_back_keeps_every_token_and_its_place() -> None:
    model = tiny_llama()
    plain = kvc.CompressedCache(model.config, codec="int8", **SMALL)
    guarded = kvc.CompressedCache(model.config, codec="int8", quality_guard=1e-9, **SMALL)
    run(plain, model), run(guarded, model)
    assert {event.after for event in guarded.events} == {("identity", "identity")}
    for row in range(2):
        for one, two in zip(held(plain, row), held(guarded, row), strict=True):
            assert torch.equal(one.positions, two.positions)
            torch.testing.assert_close(one.keys, two.keys, atol=0.3, rtol=0.02)


def test_a_layer_within_the_threshold_stays() -> None:
    model = tiny_llama()
    plain, guarded = (kvc.CompressedCache(model.config, codec="int8", **SMALL, **own) for own in ({}, GENEROUS))
    for one, two in zip(run(plain, model), run(guarded, model), strict=True):
        assert torch.equal(one, two)
    assert guarded.events == [] and set(guarded.monitor.errors) == {0, 1}
    assert all(0 < error < 0.1 for error in guarded.monitor.errors.values())


GENEROUS = {"quality_guard": 0.5}


def test_levels_end_with_the_exact_numbers() -> None:
    assert [next_level(name) for name in ("eqrot2", "eqrot3", "eqrot4", "int8", "fp8", "identity")] == [
        "eqrot3",
        "eqrot4",
        "int8",
        "identity",
        "identity",
        None,
    ]


@pytest.mark.parametrize("threshold", [0, -1, True, "much"])
def test_bad_thresholds_are_named(threshold: object) -> None:
    with pytest.raises(ValueError, match="quality_guard: expected a number above 0"):
        kvc.CompressedCache(quality_guard=threshold)
