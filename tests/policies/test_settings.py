"""Settings of eviction: bad ones are named, good ones survive JSON, the environment and a class of a user's own."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import hf_kvcompress as kvc
from hf_kvcompress.policies.base import Candidates, Policy
from hf_kvcompress.policies.settings import EvictionConfig, parse_bytes

from ..conformance.factories import SMALL
from ..conformance.state import FULL, feed_in_parts, held, random_pairs

CONFIG = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2)

BAD = [
    ({"budget": 0}, ["budget", "above 0", "0"]),
    ({"budget": -5}, ["budget", "above 0", "-5"]),
    ({"budget": 1.5}, ["budget", "up to 1", "1.5"]),
    ({"budget": 0.0}, ["budget", "above 0", "0.0"]),
    ({"budget": float("nan")}, ["budget", "up to 1", "nan"]),
    ({"budget": True}, ["budget", "whole number", "True"]),
    ({"budget": "12 apples"}, ["budget", "64MB", "12 apples"]),
    ({"budget": "-3MB"}, ["budget", "64MB", "-3MB"]),
    ({"budget": [64]}, ["budget", "whole number", "[64]"]),
    ({"budget": 99}, ["budget", "at least 100", "sink_length 4", "residual_length 32", "99"]),
    ({"budget": 25, **SMALL}, ["budget", "at least 26", "25"]),
    ({"policy": "h20", "budget": 200}, ["policy", "did you mean 'h2o'", "h20"]),
    ({"policy": "best", "budget": 200}, ["policy", "streaming, h2o, snapkv", "best"]),
    ({"policy": 3}, ["policy", "or a Policy", "3"]),
    ({"policy": "snapkv", "policy_options": {"windows": 3}}, ["policy_options", "windows", "window_size", "snapkv"]),
    ({"policy": "h2o", "policy_options": {"seed": 3}}, ["policy_options", "seed", "h2o"]),
    ({"policy": "h2o", "policy_options": 3}, ["policy_options", "mapping", "3"]),
    ({"policy": "snapkv", "policy_options": {"kernel_size": 4}}, ["kernel_size", "odd", "4"]),
    ({"policy": "snapkv", "policy_options": {"window_size": 0}}, ["window_size", "at least 1", "0"]),
    ({"policy": "expected", "policy_options": {"n_queries": 0}}, ["n_queries", "at least 1", "0"]),
    ({"policy": "rkv", "policy_options": {"weight": 2}}, ["weight", "0 to 1", "2"]),
    ({"policy": "rkv", "policy_options": {"kernel_size": 2}}, ["kernel_size", "odd", "2"]),
    ({"policy": "tova", "head_budget": "adaptive"}, ["head_budget", "'uniform'", "tova", "adaptive"]),
    ({"policy": "streaming", "head_budget": "adaptive"}, ["head_budget", "'uniform'", "streaming", "adaptive"]),
    ({"policy": "h2o", "head_budget": "adaptiv"}, ["head_budget", "'uniform' or 'adaptive'", "adaptiv"]),
    ({"policy": "h2o", "head_floor": 1.1}, ["head_floor", "0 to 1", "1.1"]),
    ({"policy": "h2o", "recent": -0.1}, ["recent", "0 to 1", "-0.1"]),
    ({"policy": "h2o", "recent": "much"}, ["recent", "0 to 1", "much"]),
    ({"policy": "h2o", "boundary": 0.7}, ["boundary", "below 0.5", "0.7"]),
    ({"policy": "h2o", "boundary": "wide"}, ["boundary", "below 0.5", "wide"]),
    ({"policy": "h2o", "max_tokens": -1}, ["max_tokens", "at least 0", "-1"]),
    ({"policy": "h2o", "max_tokens": 10.5}, ["max_tokens", "whole number", "10.5"]),
    ({"policy": "h2o", "chunk_size": 0}, ["chunk_size", "at least 1", "0"]),
    ({"policy": "h2o", "pin": [(5, 2)]}, ["pin", "0 <= start < end", "(5, 2)"]),
    ({"policy": "h2o", "pin": [(-1, 2)]}, ["pin", "0 <= start < end", "(-1, 2)"]),
    ({"policy": "h2o", "pin": [(1, 2, 3)]}, ["pin", "(start, end)", "(1, 2, 3)"]),
    ({"policy": "h2o", "pin": [5]}, ["pin", "(start, end)", "5"]),
    ({"policy": "h2o", "pin": (0, 20)}, ["pin", "(start, end)", "0"]),
    ({"policy": "h2o", "pin": "0:20"}, ["pin", "(start, end)", "0:20"]),
    ({"policy": "h2o", "pin_prompt": -3}, ["pin_prompt", "-3"]),
    ({"policy": "h2o", "pin_prompt": 0.5}, ["pin_prompt", "0.5"]),
    ({"policy": "h2o", "demote_to": "int9"}, ["demote_to", "int9"]),
    ({"policy": "h2o", "demote_to": "int2", "demote_budget": 0}, ["demote_budget", "at least 1", "0"]),
    ({"policy": "h2o", "demote_to": "cpu", "fetch_pages": -1}, ["fetch_pages", "at least 0", "-1"]),
    ({"policy": "h2o", "budget": 200, "layer_budget": "pyramids"}, ["layer_budget", "'pyramid:BETA'", "pyramids"]),
    ({"policy": "h2o", "budget": 200, "layer_budget": "pyramid:0.5"}, ["layer_budget", "at least 1", "pyramid:0.5"]),
    ({"policy": "h2o", "budget": 200, "layer_budget": [1, 2, 3]}, ["layer_budget", "2 positive weights", "(1, 2, 3)"]),
    ({"policy": "h2o", "budget": 200, "layer_budget": [1, -2]}, ["layer_budget", "2 positive weights", "(1, -2)"]),
    ({"layers": {0: {"policy": "h3o"}}}, ["policy", "h2o", "h3o"]),
    ({"layers": {0: {"budgets": 200}}}, ["layers[0]", "budget", "budgets"]),
    ({"polcy": "h2o"}, ["policy", "polcy"]),
]


@pytest.mark.parametrize("settings, names", BAD, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_bad_settings_are_named(settings: dict, names: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        kvc.CompressedCache(CONFIG, **settings)
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: kvc.H2OCache(CONFIG, heavy_ratio=0.7, recent_ratio=0.5), ["heavy_ratio", "at most 1", "(0.7, 0.5)"]),
        (lambda: kvc.H2OCache(CONFIG, heavy_ratio=-0.1), ["heavy_ratio", "-0.1"]),
        (lambda: kvc.StreamingLLMCache(CONFIG, window_length=50), ["budget", "at least 100", "50"]),
        (lambda: kvc.SnapKVCache(CONFIG, kernel_size=6), ["kernel_size", "odd", "6"]),
        (lambda: kvc.RKVCache(CONFIG, budget=150), ["budget", "residual_length 128", "150"]),
        (lambda: kvc.PyramidKVCache(CONFIG, beta=0.1), ["layer_budget", "at least 1", "pyramid:0.1"]),
        (lambda: kvc.AdaKVCache(CONFIG, floor=2), ["head_floor", "0 to 1", "2"]),
        (lambda: kvc.CompressedCache(policy="h2o", budget=200, layer_budget="pyramid"), ["layer_budget", "without"]),
    ],
    ids=range(8),
)
def test_bad_arguments_of_named_classes(make: Any, names: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("64MB", 64 * 2**20),
        ("1.5 GB", 3 * 2**29),
        ("100B", 100),
        ("2kb", 2048),
        ("1 TiB", 2**40),
        (" 3MiB ", 3 * 2**20),
    ],
)
def test_bytes_are_read_in_powers_of_1024(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


# -- what they become --------------------------------------------------------------------------------------------------

GOOD: list[dict[str, Any]] = [
    {"policy": "h2o", "budget": 256},
    {"policy": "streaming", "budget": 0.25, "boundary": 0.1, "max_tokens": 100},
    {"policy": "snapkv", "policy_options": {"window_size": 32}, "budget": 200, "head_budget": "adaptive"},
    {"policy": "random", "policy_options": {"seed": 4}, "budget": "64MB", "layer_budget": "pyramid:5"},
    {"policy": "rkv", "budget": 300, "pin": [(0, 20), [30, 40]], "pin_prompt": 12, "chunk_size": 4, "merge": True},
    {"policy": "h2o", "budget": 300, "demote_to": "int2", "demote_budget": 50, "layer_budget": [1, 3]},
    {"budget": 0.5, "layers": {1: {"policy": "none"}, 0: {"budget": 0.3, "recent": 0.5}}},
]


@pytest.mark.parametrize("settings", GOOD, ids=str)
def test_settings_survive_json(settings: dict) -> None:
    cache = kvc.CompressedCache(CONFIG, **settings)
    text = json.dumps(cache.settings.to_dict())
    again = kvc.CacheConfig.from_dict(json.loads(text))
    assert again == cache.settings
    assert json.dumps(again.to_dict()) == text
    both = (kvc.CompressedCache(CONFIG, **own.to_dict()) for own in (cache.settings, again))
    assert [[layer.config for layer in cache.layers]] * 2 == [[layer.config for layer in own.layers] for own in both]


def test_what_a_budget_alone_means() -> None:
    default = kvc.CompressedCache(CONFIG, budget=256).settings.default
    assert default.eviction == EvictionConfig(policy="h2o", budget=256)
    assert kvc.CompressedCache(CONFIG).settings.default.eviction is None
    assert kvc.CompressedCache(CONFIG, policy="none", budget=256).settings.default.eviction is None
    layers = kvc.CompressedCache(CONFIG, budget=256, layers={1: {"policy": "none"}}).layers
    assert [layer.config.eviction is None for layer in layers] == [False, True]


def test_a_policy_of_a_single_layer_takes_its_own_options() -> None:
    cache = kvc.CompressedCache(
        CONFIG,
        policy="random",
        policy_options={"seed": 3},
        budget=256,
        layers={1: {"policy": "snapkv"}, 0: {"budget": 128}},
    )
    evictions = [layer.config.eviction for layer in cache.layers]
    assert [own.policy for own in evictions] == ["random", "snapkv"]
    assert [dict(own.policy_options) for own in evictions] == [{"seed": 3}, {}]
    assert [own.budget for own in evictions] == [128, 256]


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"POLICY": "snapkv", "BUDGET": "256"}, {"policy": "snapkv", "budget": 256}),
        ({"BUDGET": "0.25"}, {"policy": "h2o", "budget": 0.25}),
        ({"POLICY": "streaming", "BUDGET": "200", "RECENT": "0.5"}, {"policy": "streaming", "recent": 0.5}),
        ({"POLICY": "h2o", "MERGE": "1"}, {"policy": "h2o", "merge": True, "budget": None}),
    ],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, variables: dict, expected: dict) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"HF_KVCOMPRESS_{name}", value)
    eviction = kvc.CompressedCache(CONFIG).settings.default.eviction
    assert {name: getattr(eviction, name) for name in expected} == expected
    assert kvc.CompressedCache(CONFIG, budget=128).settings.default.eviction.budget == 128, "an argument wins"
    assert kvc.CompressedCache(CONFIG, policy="none").settings.default.eviction is None


def test_environment_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KVCOMPRESS_BUDGET", "64MB")
    assert kvc.CompressedCache(CONFIG).settings.budget_bytes == 64 * 2**20


@pytest.mark.parametrize(
    "name, value, names",
    [
        ("POLICY", "h3o", ["policy", "h3o"]),
        ("BUDGET", "lots", ["budget", "64MB", "lots"]),
        ("BUDGET", "0", ["budget", "above 0"]),
        ("RECENT", "much", ["HF_KVCOMPRESS_RECENT", "a number", "much"]),
        ("PIN", "0:20", ["pin", "0:20"]),
    ],
)
def test_a_bad_environment_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, names: list[str]) -> None:
    monkeypatch.setenv(f"HF_KVCOMPRESS_{name}", value)
    with pytest.raises(ValueError) as error:
        kvc.CompressedCache(CONFIG)
    for part in names:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "cache, policy, expected",
    [
        (kvc.StreamingLLMCache(CONFIG), "streaming", {"budget": 1024}),
        (kvc.H2OCache(CONFIG), "h2o", {"budget": 0.5, "recent": 0.8, "max_tokens": 4096}),
        (kvc.H2OCache(CONFIG, budget=500, max_tokens=0), "h2o", {"budget": 500, "recent": 0.8, "max_tokens": 0}),
        (kvc.SnapKVCache(CONFIG), "snapkv", {"budget": 1024}),
        (kvc.AdaKVCache(CONFIG), "snapkv", {"head_budget": "adaptive", "head_floor": 0.2}),
        (kvc.TOVACache(CONFIG), "tova", {"recent": 0.0}),
        (kvc.ExpectedAttentionCache(CONFIG), "expected", {}),
        (kvc.KeyDiffCache(CONFIG), "keydiff", {}),
        (kvc.RKVCache(CONFIG), "rkv", {"recent": 0.0}),
        (kvc.RandomCache(CONFIG, seed=2), "random", {"policy_options": {"seed": 2}}),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, kvc.CompressedCache) else "",
)
def test_named_classes_are_settings(cache: kvc.CompressedCache, policy: str, expected: dict) -> None:
    eviction = cache.settings.default.eviction
    assert eviction.policy == policy == eviction.make_policy().name
    assert {name: getattr(eviction, name) for name in expected} == expected
    assert kvc.CacheConfig.from_dict(cache.settings.to_dict()) == cache.settings
    assert all(layer.config.eviction == eviction for layer in cache.layers)


def test_named_classes_set_what_their_papers_do() -> None:
    assert kvc.StreamingLLMCache(CONFIG, num_sink_tokens=8).settings.default.sink_length == 8
    assert kvc.RKVCache(CONFIG, buffer_length=64).settings.default.residual_length == 64
    assert kvc.PyramidKVCache(CONFIG).settings.layer_budget == "pyramid:20"
    first, last = (layer.config.eviction.budget for layer in kvc.PyramidKVCache(CONFIG).layers)
    assert (first, last) == (1948, 100), "1024 * (2 - 1 / 20) less what lifts the last to the least a layer needs"


# -- a policy of one's own ---------------------------------------------------------------------------------------------


class EvenPositions(Policy):
    """Even positions before odd ones, each the older the better."""

    name = "even"

    def __init__(self, sign: int = 1):
        self.sign = sign

    def score(self, candidates: Candidates) -> torch.Tensor:
        at = candidates.positions
        return self.sign * (1000.0 * (at % 2 == 0) - at)


@pytest.mark.parametrize("copied", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_policy_of_ones_own(copied: Any) -> None:
    cache = kvc.CompressedCache(FULL, codec="identity", policy=EvenPositions(), budget=40, recent=0.0, **SMALL)
    feed_in_parts(cache, random_pairs(1, 60), [60])
    cache = copied(cache)
    feed_in_parts(cache, random_pairs(1, 40), [39, 1])
    own = held(cache)[0].of_head(0)
    middle = [at for at in own if 2 <= at < 84]
    assert middle == list(range(2, 2 + 2 * len(middle), 2)) and len(middle) > 15
    assert cache.settings.to_dict()["policy"] == "even" and "EvenPositions(sign=1)" in repr(EvenPositions())
    assert not EvenPositions().needs_queries


class Broken(EvenPositions):
    def score(self, candidates: Candidates) -> torch.Tensor:
        return super().score(candidates) * float("nan")


def test_scores_that_are_no_numbers_break_nothing() -> None:
    cache = kvc.CompressedCache(FULL, codec="identity", policy=Broken(), budget=40, pin=[(0, 4)], **SMALL)
    feed_in_parts(cache, random_pairs(1, 100), [60, 40])
    assert all(count <= 40 for layer in held(cache) for count in layer.counts)
    assert held(cache)[0].of_head(0)[:4] == [0, 1, 2, 3]
