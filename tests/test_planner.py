"""A plan's bytes are those of a real cache, its order is quantize first, and its settings hold to the budget."""

import json

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from typer.testing import CliRunner

import hf_kvcompress as kvc
from hf_kvcompress import cli, footprint, storage
from hf_kvcompress.config import CacheConfig, LayerConfig
from hf_kvcompress.footprint import layer_bytes, tokens_for_bytes
from hf_kvcompress.planner import describe, plan
from hf_kvcompress.policies.settings import EvictionConfig
from hf_kvcompress.shapes import layer_shapes
from hf_kvcompress.shares import BudgetError, share_bytes

from .conformance.zoo import ENTRIES
from .tiny_model import save_tiny

BY_NAME = {entry.name: entry for entry in ENTRIES}
KEYS_ONLY = ("streaming", "keydiff", "random")  # policies that need no attention
SLAB_END = 580  # 4 sinks, 32 recent, then room for 1,024 tokens, with a window of 161 two segments of a sliding layer


def config_of(name, **changes):
    config, _ = BY_NAME[name].build()
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def llama(layers=4, **changes):
    settings = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    return LlamaConfig(num_hidden_layers=layers, **{**settings, **changes})


def feed(cache, config, tokens, batch=1, steps=None, dtype=torch.bfloat16):
    """Random keys and values of `tokens` tokens in every layer, `steps` at a time; the most bytes ever held."""
    most = 0
    for size in torch.arange(tokens).split(steps or tokens):
        for shape in layer_shapes(config):
            if shape.heads:
                keys = torch.randn(batch, shape.heads, len(size), shape.key_dim).to(dtype)
                cache.update(keys, torch.randn(batch, shape.heads, len(size), shape.value_dim).to(dtype), shape.layer)
        most = max(most, cache.nbytes) if hasattr(cache, "nbytes") else 0
    return most


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.kind != "encoder_decoder"], ids=lambda e: e.name)
def test_layers_are_those_of_the_model(entry):
    cache = DynamicCache(config=entry.model.config)
    entry.model(input_ids=torch.randint(3, 90, (2, 30)), past_key_values=cache, use_cache=True)
    real = {
        i: (tuple(layer.keys.shape), tuple(layer.values.shape))
        for i, layer in enumerate(cache.layers)
        if getattr(layer, "keys", None) is not None
    }
    planned = {
        s.layer: ((2, s.heads, s.tokens_at(30), s.key_dim), (2, s.heads, s.tokens_at(30), s.value_dim))
        for s in layer_shapes(entry.model.config)
        if s.heads
    }
    assert planned == real
    ours = kvc.CompressedCache(entry.model.config)
    packed = {s.layer for s in layer_shapes(entry.model.config) if s.packed}
    assert packed == {i for i, layer in enumerate(ours.layers) if layer in list(ours.packed_layers())}


@pytest.mark.parametrize("codec", ["identity", "int8", "eqrot4", "eqrot3", "int4"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_planned_bytes_are_real_where_slabs_end(name, codec):
    config = config_of(name) if name in ("llama", "deepseek_v3") else config_of(name, sliding_window=161)
    cache = kvc.CompressedCache(config, codec=codec)
    held = feed(cache, config, SLAB_END, batch=2)
    planned = describe(config, CacheConfig.make(codec=codec), context=SLAB_END, batch=2)
    assert 0.95 * planned.nbytes <= held <= planned.nbytes
    uncompressed = DynamicCache(config=config)
    feed(uncompressed, config, SLAB_END, batch=2)
    dense = sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in uncompressed.layers)
    assert planned.uncompressed_bytes == dense


@pytest.mark.parametrize("tokens, steps", [(20, 1), (47, 3), (165, 165), (700, 41), (2600, 700)])
def test_planned_bytes_are_never_exceeded(tokens, steps):
    config = config_of("gemma3", sliding_window=100)
    for settings in ({"codec": "eqrot4"}, {"codec": "kivi2"}, {"keys": "int8", "values": "eqrot2", "page_size": 8}):
        cache = kvc.CompressedCache(config, **settings)
        feed(cache, config, tokens, 2, steps)
        planned = describe(config, CacheConfig.make(**settings), context=tokens, batch=2)
        for layer, real in zip(planned.layers, cache.stats().layers, strict=True):
            assert real.bytes_held <= layer.nbytes


def test_bytes_of_a_layer_need_no_model():
    settings = LayerConfig(keys="int8", values="int8")
    # 68 exact slots of 2 * 64 numbers in bfloat16; 92 sealed tokens of 3 pages, room for 128 in the first segment
    whole = 68 * 128 * 2 + 128 * 2 * (64 + 2)
    assert layer_bytes(settings, 4 + 32 + 96, key_dim=64, value_dim=64, heads=1) == whole
    assert layer_bytes(settings, 4 + 32 + 96, key_dim=64, value_dim=64, heads=3, batch=2) == 6 * whole
    more = [layer_bytes(settings, n, key_dim=64, value_dim=64, heads=1) for n in range(1, 6000, 7)]
    assert more == sorted(more)


def test_sizes_that_the_footprint_repeats():
    assert footprint.SLIDING_SEGMENT == storage.SLIDING_SEGMENT


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "expected", "streaming"])
def test_tokens_for_bytes_is_the_inverse(policy):
    layer = LayerConfig(eviction=EvictionConfig(policy=policy))
    sizes = {"key_dim": 64, "value_dim": 32, "heads": 2, "batch": 3, "dtype": torch.bfloat16, "query_heads": 8}
    for tokens in (layer.least_budget, 500, 3001, 70_000):
        nbytes = layer_bytes(layer, tokens, **sizes)
        found = tokens_for_bytes(layer, nbytes=nbytes, **sizes)
        assert tokens <= found <= tokens + 2 * layer.tokens_per_page
        assert layer_bytes(layer, found, **sizes) <= nbytes < layer_bytes(layer, found + 1, **sizes)
    least = layer_bytes(layer, layer.least_budget, **sizes)
    with pytest.raises(ValueError, match=f"budget: expected at least {least:,} bytes .* got {least - 1:,}"):
        tokens_for_bytes(layer, nbytes=least - 1, **sizes)


def test_what_policies_hold_is_counted():
    def of(policy):
        layer = LayerConfig(eviction=EvictionConfig(policy=policy))
        return layer_bytes(layer, 1000, key_dim=64, value_dim=64, heads=1, query_heads=4)

    assert of("h2o") - of("streaming") >= 4 * 1000
    assert of("snapkv") - of("streaming") >= 64 * 4 * 64 * 2
    none = layer_bytes(LayerConfig(), 1000, key_dim=64, value_dim=64, heads=1)
    assert of("streaming") >= none - 4 * (512 * 68)  # a layer without a policy may have one slab of slack


# -- plans -------------------------------------------------------------------------------------------------------------


def test_quantize_first_then_evict():
    found = [plan(llama(), context=20_000, budget=share) for share in (1.0, 0.9, 0.6, 0.3, 0.25, 0.15, 0.03)]
    codecs = [p.settings.default.keys for p in found]
    assert codecs == ["int8", "int8", "int8", "eqrot4", "eqrot3", "eqrot4", "eqrot3"]
    assert [p.policy for p in found] == [None] * 5 + ["h2o"] * 2
    assert all(p.fits and p.nbytes <= p.budget_bytes for p in found)
    assert plan(llama(), context=20_000, budget="10GB").settings.default.keys == "identity"
    longest = found[3].max_context
    assert longest >= 20_000 and found[-1].max_context is None
    assert describe(llama(), found[3].settings, context=longest).nbytes <= found[3].budget_bytes
    assert describe(llama(), found[3].settings, context=longest + 600).nbytes > found[3].budget_bytes


def test_the_ends_keep_more_and_the_budget_is_used():
    found = plan(llama(6), context=30_000, batch=2, budget=0.1, policy="streaming")
    kept = [layer.kept for layer in found.layers]
    assert kept[0] == kept[-1] and len(set(kept[1:-1])) == 1
    assert kept[0] == pytest.approx(1.5 * kept[1], rel=0.01)
    assert 0.98 * found.budget_bytes <= found.nbytes <= found.budget_bytes
    assert found.cache_settings()["policy"] == "streaming"


def test_sliding_layers_are_quantized_never_evicted():
    config = config_of("gemma3", sliding_window=200)
    found = plan(config, context=8000, budget=0.2)
    sliding, full = [p for p in found.layers if p.kind == "sliding 200"], [p for p in found.layers if p.kind == "full"]
    assert len(sliding) == 2 and all(p.kept == p.tokens == 199 for p in sliding)
    assert len(full) == 1 and full[0].kept < full[0].tokens == 8000
    shared = plan(config_of("gemma3n"), context=8000, budget=0.5)
    assert [p.kind for p in shared.layers] == ["sliding 24", "full", "shared", "shared"]
    assert all(p.nbytes == 0 for p in shared.layers[2:])


def test_an_impossible_budget_names_the_smallest():
    for changes in ({}, {"policy": "none"}, {"codec": "int8"}, {"codec": "int8", "policy": "none"}):
        with pytest.raises(BudgetError, match=r"budget: expected at least [\d,]+ bytes for 9,000 tokens") as refused:
            plan(llama(), context=9000, budget=10_000, **changes)
        smallest = refused.value.smallest
        assert plan(llama(), context=9000, budget=smallest, **changes).nbytes <= smallest
        with pytest.raises(BudgetError):
            plan(llama(), context=9000, budget=smallest - 1, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"budget": 1.5}, "budget: expected bytes"),
        ({"budget": "many"}, "budget: expected bytes"),
        ({"budget": True}, "budget: expected bytes"),
        ({"context": 0}, "context: expected a whole number of at least 1, got 0"),
        ({"batch": 2.0}, "batch: expected a whole number"),
        ({"policy": "h20"}, "policy: expected one of .*'h2o'"),
        ({"codec": "int9"}, "expected 8 or 4 or 3 or 2 bits"),
        ({"config": object()}, "config: expected a model's config"),
    ],
)
def test_a_bad_argument_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        arguments = {"config": llama(), "context": 1000, "budget": "1MB", **changes}
        plan(arguments.pop("config"), **arguments)


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon_h1"])
@pytest.mark.parametrize("budget", [0.9, 0.4, 0.1])
def test_settings_make_the_planned_cache(name, budget):
    config = config_of(name) if name != "gemma3" else config_of(name, sliding_window=100)
    found = plan(config, context=9000, budget=budget, policy="keydiff")
    read = json.loads(json.dumps(found.to_dict()))
    for settings in (found.cache_settings(), read["settings"]):
        cache = kvc.CompressedCache(config, **settings)
        for layer in found.layers:
            own = cache.settings.for_layer(layer.layer)
            if layer.keys != "-":
                assert (own.keys, own.values) == (layer.keys, layer.values)
            if layer.kept < layer.tokens and layer.kind == "full":
                assert own.eviction is not None and own.eviction.budget == layer.kept
    assert read["nbytes"] == sum(layer["nbytes"] for layer in read["layers"]) == found.nbytes


@pytest.mark.parametrize("policy", KEYS_ONLY)
def test_a_cache_that_evicts_holds_to_the_plan(policy):
    found = plan(llama(3), context=2500, budget=0.12, policy=policy)
    assert found.policy == policy
    cache = kvc.CompressedCache(llama(3), **found.cache_settings())
    most = feed(cache, llama(3), 2500, steps=300)
    for _ in range(40):
        most = max(most, feed(cache, llama(3), 1))
    assert 0.85 * found.nbytes <= most <= found.nbytes


def test_many_layers_are_grouped():
    found = plan(llama(60), context=9000, budget=0.1)
    assert len(repr(found).splitlines()) == 2 + 3  # the totals, the header, the ends and the rest
    assert "1-58" in repr(found) and "58 x" in repr(found)
    assert len(repr(plan(llama(4), context=9000, budget=0.1)).splitlines()) == 2 + 4
    assert f"codec={found.settings.default.keys!r}" in found.code()


# -- sharing one budget ------------------------------------------------------------------------------------------------


def test_one_budget_is_shared_over_layers():
    config = llama(5)
    shares = share_bytes(config, CacheConfig.make(budget="2MB", policy="streaming"), 2, torch.bfloat16)
    assert sorted(shares) == list(range(5))
    assert 0.97 * 2**21 <= sum(shares.values()) <= 2**21
    assert shares[0] == shares[4] > 1.2 * shares[2] and shares[1] == shares[2]
    hybrid = config_of("gemma3", sliding_window=200)
    settings = CacheConfig.make(budget="400KB")
    own = share_bytes(hybrid, settings, 1, torch.bfloat16)
    windows = sum(p.nbytes for p in describe(hybrid, settings, context=10**6).layers if p.kind != "full")
    assert list(own) == [1] and 0.95 * 400 * 1024 <= own[1] + windows <= 400 * 1024


def test_layers_with_a_budget_of_their_own_come_first():
    config = llama(5)
    plain = share_bytes(config, CacheConfig.make(budget="2MB"), 1, torch.bfloat16)
    own = share_bytes(config, CacheConfig.make(budget="2MB", layers={2: {"budget": 200}}), 1, torch.bfloat16)
    assert sorted(own) == [0, 1, 3, 4] and own[1] > plain[1]


def test_a_budget_that_cannot_be_shared_is_refused():
    with pytest.raises(BudgetError, match="budget: expected at least [0-9,]+ bytes for batch 4, got 1,024"):
        share_bytes(llama(), CacheConfig.make(budget="1KB"), 4, torch.bfloat16)
    with pytest.raises(ValueError, match=r"budget: expected a policy in every layer .* got none in layers\[1\]"):
        share_bytes(llama(), CacheConfig.make(budget="1MB", layers={1: {"policy": "none"}}), 1, torch.bfloat16)
    with pytest.raises(ValueError, match=r"layers\[1\]: expected tokens as budget beside"):
        share_bytes(llama(), CacheConfig.make(budget="1MB", layers={1: {"budget": 0.5}}), 1, torch.bfloat16)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def run(*arguments):
    return CliRunner().invoke(cli.build(), ["plan", *arguments])


def test_the_command_prints_a_plan(tiny, tmp_path):
    file = tmp_path / "plan.json"
    result = run("--model", tiny, "--context", "32768", "--batch", "2", "--budget", "1MB", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "kvc.CompressedCache(model.config, codec=" in result.output and "kvc.enable(model)" in result.output
    report = json.loads(file.read_text())
    assert report["fits"] and report["policy"] == "h2o" and report["nbytes"] <= 2**20
    assert len(report["layers"]) == 2
    whole = run("--model", tiny, "--context", "2000", "--budget", "0.7")
    assert whole.exit_code == 0 and "Keeps every token" in whole.output and "enable" not in whole.output


def test_the_command_ends_with_1_if_nothing_fits(tiny):
    result = run("--model", tiny, "--context", "32768", "--budget", "1KB")
    assert result.exit_code == 1 and "budget: expected at least" in result.output


@pytest.mark.parametrize("arguments", [["--budget", "lots"], ["--budget", "1MB", "--dtype", "int8"]])
def test_the_command_names_a_bad_argument(tiny, arguments):
    result = run("--model", tiny, "--context", "100", *arguments)
    assert result.exit_code == 2 and "expected" in result.output and "Traceback" not in result.output
