"""What a cache tells of itself: bytes, statistics, settings, errors, broken numbers."""

import copy
import io
import json

import pytest
import torch
from transformers import LlamaConfig

import hf_kvcompress as kvc

from .tiny_model import tiny_llama

CONFIG = LlamaConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def fill(cache, tokens=700, batch=1, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(1, 2, 1, 16, generator=generator) * 3 + 0.1
    for layer in range(2):
        keys = torch.randn(batch, 2, tokens, 16, generator=generator) * spread + spread
        values = torch.randn(batch, 2, tokens, 16, generator=generator)
        cache.update(keys.to(dtype), values.to(dtype), layer)
    return cache


def test_stats_is_a_mapping_that_prints():
    from rich.console import Console

    cache = fill(kvc.CompressedCache(CONFIG))
    stats = cache.stats()
    assert stats["nbytes"] == cache.nbytes == kvc.tensor_bytes(cache.layers)
    assert 0 <= stats["slack_bytes"] < stats["nbytes"]
    assert stats["compression_ratio"] == pytest.approx(700 * 2 * 2 * 2 * 16 * 2 / cache.nbytes)
    assert stats["memory_saved_mb"] == pytest.approx((stats["uncompressed_bytes"] - cache.nbytes) / 2**20)
    assert stats["compressed_pages"] == 2 * ((700 - 4 - 32) // 32)
    assert stats["tokens_stored"] == stats["tokens_seen"] == 700
    assert set(stats) == set(dict(stats)) and "compression_ratio" in stats
    assert json.loads(json.dumps(stats.to_dict()))["layers"][1]["keys"] == "eqrot4"
    assert "eqrot4 / eqrot4" in repr(stats) and "<table>" in cache._repr_html_()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(stats)
    assert "eqrot4 / eqrot4" in console.export_text()


def test_bits_of_each_layer_follow_its_settings():
    cache = fill(kvc.CompressedCache(CONFIG, codec="int8", layers={1: {"keys": "eqrot4", "values": "int2"}}))
    bits = cache.stats()["bits_per_layer"]
    assert bits[0] == pytest.approx(9.0)  # 8 bits and one 16-bit scale for 16 numbers
    assert bits[1] < 5.5


def test_settings_survive_json():
    cache = kvc.CompressedCache(CONFIG, preset="small", layers={1: {"codec": "kivi4"}}, sink_length=8)
    again = kvc.CacheConfig.from_dict(json.loads(json.dumps(cache.settings.to_dict())))
    assert again == cache.settings


@pytest.mark.parametrize("name, worst", [("int8", 0.02), ("eqrot4", 0.15), ("eqrot2", 0.6)])
def test_reconstruction_error_follows_the_bits(name, worst):
    cache = fill(kvc.CompressedCache(CONFIG, codec=name, monitor=True))
    errors = cache.reconstruction_error
    assert set(errors) == {0, 1}
    for error in (errors[0]["key"], errors[1]["value"]):
        assert worst / 20 < error.relative_l2 < worst
        assert 1 - worst < error.cosine <= 1 and error.vectors > 50


@pytest.mark.parametrize("name", ["int8", "kivi4", "turbo4", "eqrot4", "fp8"])
def test_broken_numbers_are_named_and_do_not_spread(name):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(1, 2, 400, 16, generator=generator), torch.randn(1, 2, 400, 16, generator=generator)
    broken = keys.clone()
    broken[0, 0, 150, 3], broken[0, 1, 151, 0] = float("nan"), float("inf")
    clean, dirty = (kvc.CompressedCache(CONFIG, codec=name, monitor=True) for _ in range(2))
    clean.update(keys, values, 1)
    with pytest.warns(RuntimeWarning, match="layer 1: 2 keys or values are NaN or infinite"):
        dirty.update(broken, values, 1)
    for cache in (clean, dirty):
        cache.commit()
    assert dirty.monitor.non_finite == {1: 2}
    good, bad = (cache.layers[1].dense("key") for cache in (clean, dirty))
    assert bad.isfinite().all()
    page = cache.layers[1].storage.pages.page_size
    first = (150 - 4) // page * page + 4
    others = torch.tensor([t for t in range(400) if not first <= t < first + page])
    error, allowed = (bad - keys)[:, :, others].norm(), (good - keys)[:, :, others].norm()
    assert error < 1.05 * allowed, "statistics of the segment are hardly touched, other pages not at all"


def test_interrupted_and_repeated_use():
    cache = fill(kvc.CompressedCache(CONFIG))
    before = cache.nbytes
    assert cache.nbytes == before, "looking changes nothing"
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    assert fill(cache).nbytes == before


@pytest.mark.parametrize("settings", [{}, {"policy": "h2o", "budget": 60}, {"policy": "snapkv", "budget": 60}], ids=str)
def test_a_prompt_may_be_read_in_inference_mode_and_continued_without(settings: dict) -> None:
    """What `inference_mode` makes cannot be written to outside of it, so the storage must not be made there."""
    model = tiny_llama()
    ids = torch.randint(0, 256, (2, 150), generator=torch.Generator().manual_seed(0))
    logits = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = kvc.CompressedCache(model.config, page_size=8, residual_length=8, **settings)
        with kvc.enable(model):
            with mode():
                model(ids[:, :100], past_key_values=cache)
            with torch.no_grad():
                model(ids[:, 100:110], past_key_values=cache)
                cache.reorder_cache(torch.tensor([1, 0]))
                model(ids[:, 110:130], past_key_values=cache)
            with mode():
                cache = copy.deepcopy(cache)
            with torch.inference_mode():
                out = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(130, 140)]
            with torch.no_grad():
                logits.append([*out, model(ids[:, 140:], past_key_values=cache).logits])
    for one, two in zip(*logits, strict=True):
        assert torch.equal(one, two)
