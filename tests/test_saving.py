"""A cache that was saved and loaded goes on as the first would have; a file that does not fit is refused by name."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import hf_kvcompress as kvc
from hf_kvcompress import blocks, host_tier, snapshots
from hf_kvcompress.codecs.eqrot import EqRotCodec
from hf_kvcompress.layer import CompressedLayer

from .conformance.factories import EVICTING, LOSSY, Factory
from .conformance.helpers import BY_NAME, KVCOMPRESS, attention
from .conformance.prompts import text_ids
from .conformance.state import DIM, FULL, SLIDING, decoded, equal, feed, feed_in_parts, random_pairs
from .tiny_model import tiny_llama

KINDS = [f for f in LOSSY if f.name in ("int4", "kivi2", "eqrot3", "layer-override", "CPACCache")] + [
    f for f in EVICTING if not f.name.startswith(("tova", "rkv")) or f.name.endswith("eqrot4")
]
LENGTH = 90


def _mask(length: int) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :13] = 0
    return mask


@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("factory", KINDS, ids=lambda factory: factory.name)
def test_ragged_batches_of_every_kind_go_on_bit_for_bit(factory: Factory, config: Any, tmp_path: Path) -> None:
    cache = factory(config)
    feed_in_parts(cache, random_pairs(2, LENGTH), [60] + [1] * 30, _mask(LENGTH))
    cache.save(tmp_path / "cache.safetensors")
    loaded = type(cache).load(tmp_path / "cache.safetensors", config)
    assert type(loaded) is type(cache) and equal(decoded(loaded), decoded(cache))
    assert loaded.settings.to_dict() == cache.settings.to_dict()
    assert 0.97 * cache.nbytes <= loaded.nbytes <= cache.nbytes  # indices of lines are made when they are wanted
    for tokens in (1, 40):
        more, mask = random_pairs(2, tokens, seed=tokens), _mask(cache.get_seq_length() + tokens)
        for first, second in zip(feed(cache, more, mask), feed(loaded, more, mask), strict=True):
            assert torch.equal(first, second)
        assert equal(decoded(loaded), decoded(cache))


@pytest.mark.parametrize("settings", [{"codec": "eqrot4"}, {"codec": "int4", "sliding": "exact"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "qwen3_next", "falcon_h1", "gemma3n", "lfm2"])
def test_models_go_on_with_the_same_logits(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    entry, text = BY_NAME[name], text_ids(1, 60)
    with attention(entry, KVCOMPRESS) as model:
        cache = kvc.CompressedCache(model.config, page_size=8, residual_length=8, **settings)
        model(text[:, :50], past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = kvc.CompressedCache.load(tmp_path / "cache.safetensors", model.config)
        for at in range(50, 60):
            expected = model(text[:, at : at + 1], past_key_values=cache).logits
            assert torch.equal(model(text[:, at : at + 1], past_key_values=loaded).logits, expected)


def test_a_cache_without_a_config_and_one_that_records_its_past(tmp_path: Path) -> None:
    cache = kvc.CompressedCache(codec="int8", page_size=8, residual_length=8)
    cache.activate_past_recording()
    pairs = random_pairs(1, 60)
    for layer in (0, 2):
        cache.update(*pairs[0], layer)
    cache.save(tmp_path / "cache")
    loaded = kvc.CompressedCache.load(tmp_path / "cache")
    assert len(loaded.layers) == 3 and loaded.layers[2].record_past
    for ours, theirs in zip(loaded, cache, strict=True):
        assert ours[0] is theirs[0] is None or torch.equal(ours[0], theirs[0])
    loaded.update(*pairs[1], 5)  # it still grows
    assert len(loaded.layers) == 6
    with pytest.raises(ValueError, match="config: expected no config"):
        kvc.CompressedCache.load(tmp_path / "cache", FULL)


def test_an_empty_cache_and_half_precision(tmp_path: Path) -> None:
    cache = kvc.CompressedCache(FULL)
    cache.save(tmp_path / "empty")
    assert kvc.CompressedCache.load(tmp_path / "empty", FULL).get_seq_length() == 0
    feed(cache, [(k.bfloat16(), v.bfloat16()) for k, v in random_pairs(1, 99)])
    cache.save(tmp_path / "half")
    assert equal(decoded(kvc.CompressedCache.load(tmp_path / "half", FULL, dtype=torch.bfloat16)), decoded(cache))
    with pytest.raises(ValueError, match="path: expected a cache in float32, as the model is, got 'bfloat16'"):
        kvc.CompressedCache.load(tmp_path / "half", FULL, dtype=torch.float32)


def test_named_strategies_keep_their_settings(tmp_path: Path) -> None:
    cache = kvc.KIVICache(FULL, nbits=4, residual_length=16)
    feed(cache, random_pairs(1, 200))
    cache.save(tmp_path / "kivi")
    for kind in (kvc.KIVICache, kvc.CompressedCache):
        loaded = kind.load(tmp_path / "kivi", FULL)
        assert type(loaded) is kind and loaded.settings == cache.settings and equal(decoded(loaded), decoded(cache))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cache = kvc.CompressedCache(FULL, page_size=8, residual_length=8)
    feed(cache, random_pairs(1, 90))
    cache.save(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("change", [{"rope_theta": 5e5}, {"num_hidden_layers": 3}, {"vocab_size": 7}], ids=str)
def test_another_model_is_refused(saved: Path, change: dict[str, Any]) -> None:
    config = type(FULL)(**{"num_hidden_layers": 2, "hidden_size": 2 * DIM, "num_attention_heads": 2, **change})
    name = "rope" if "rope_theta" in change else next(iter(change))
    with pytest.raises(ValueError, match=f"path: expected a file of this model, got one of a model with .*{name}"):
        kvc.CompressedCache.load(saved, config)
    with pytest.raises(ValueError, match="model_type"):
        kvc.CompressedCache.load(saved, SLIDING)
    with pytest.raises(ValueError, match="config: expected the config of the model"):
        kvc.CompressedCache.load(saved)


def test_another_codec_version_or_format_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EqRotCodec, "format_version", 2)
    with pytest.raises(ValueError, match="path: expected codec eqrot4 of format 2, got 'format 1'"):
        kvc.CompressedCache.load(saved, FULL)
    monkeypatch.undo()
    monkeypatch.setattr("hf_kvcompress.saving.FORMAT", 2)
    with pytest.raises(ValueError, match="path: expected a file of format 2, got 'format 1"):
        kvc.CompressedCache.load(saved, FULL)


@pytest.mark.parametrize("part", [0, 4, 8, 100, 0.3, 0.9, -1], ids=str)
def test_a_cut_file_is_refused(saved: Path, part: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(part * len(data)) if isinstance(part, float) else part])
    with pytest.raises(ValueError, match="path: expected a whole file of a compressed cache"):
        kvc.CompressedCache.load(saved, FULL)


def test_every_changed_byte_is_found(saved: Path) -> None:
    """In the tensors, in our header, in the names and shapes of safetensors' own."""
    data, generator = saved.read_bytes(), torch.Generator().manual_seed(0)
    length = struct.unpack("<Q", data[:8])[0]
    places = torch.randint(8, 8 + length, (60,), generator=generator).tolist()
    for at in [*places, *torch.randint(8 + length, len(data), (60,), generator=generator).tolist(), len(data) - 1]:
        changed = bytearray(data)
        changed[at] ^= 1
        saved.write_bytes(bytes(changed))
        with pytest.raises(ValueError, match="path: expected a"):
            kvc.CompressedCache.load(saved, FULL)
    with pytest.raises(FileNotFoundError):
        kvc.CompressedCache.load(saved.with_name("none"), FULL)


def test_another_safetensors_file_is_refused(saved: Path) -> None:
    saved.write_bytes(save(load(saved.read_bytes())))  # the tensors without our header
    with pytest.raises(ValueError, match="path: expected a whole file of a compressed cache"):
        kvc.CompressedCache.load(saved, FULL)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_other(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache = kvc.CompressedCache(FULL)
    with pytest.raises(OSError, match="no space left"):
        cache.save(saved)
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_the_file_is_plain_safetensors_with_a_json_header(saved: Path) -> None:
    data = saved.read_bytes()
    header = json.loads(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]["hf_kvcompress"])
    assert header["format"] == 1 and header["codecs"] == {"eqrot4": 1} and header["dtype"] == "float32"
    assert header["settings"]["keys"] == "eqrot4" and header["model"]["model_type"] == "llama"
    assert len(data) < 2 * kvc.CompressedCache.load(saved, FULL).nbytes


def test_generate_goes_on_from_a_file(tmp_path: Path) -> None:
    model = tiny_llama(eos_token_id=None)
    text = torch.randint(0, 256, (2, 70))
    with kvc.enable(model):
        cache = kvc.SnapKVCache(model.config, budget=120, window_size=8)
        first = model.generate(text, past_key_values=cache, max_new_tokens=60, do_sample=False)
        cache.save(tmp_path / "cache")
        expected = model.generate(first, past_key_values=cache, max_new_tokens=60, do_sample=False)
        loaded = kvc.SnapKVCache.load(tmp_path / "cache", model.config)
        assert torch.equal(model.generate(first, past_key_values=loaded, max_new_tokens=60, do_sample=False), expected)


# -- nothing is forgotten ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", KINDS, ids=lambda factory: factory.name)
def test_every_attribute_has_its_place(factory: Factory) -> None:
    """A new attribute of what is stored must be held or remade: this fails until it is named in snapshots.py."""
    cache = factory(FULL)
    feed_in_parts(cache, random_pairs(2, LENGTH), [60] + [1] * 30, _mask(LENGTH))
    for layer in cache.layers:
        assert set(vars(layer)) <= {*snapshots.LAYER_REMADE, *snapshots.OF_LAYER}
        waiting: list[Any] = [layer.storage]
        while waiting:
            item = waiting.pop()
            if isinstance(item, list | tuple):
                waiting += item
            elif type(item) in snapshots.HELD:
                named = {*snapshots.HELD[type(item)], *snapshots.REMADE.get(type(item), ())}
                assert set(vars(item)) <= named, type(item).__name__
                waiting += [getattr(item, name) for name in snapshots.HELD[type(item)]]
            else:
                plain = (dict, int, float, str, torch.Tensor, type(None), snapshots.Slab)
                assert isinstance(item, plain), type(item).__name__
    assert isinstance(layer, CompressedLayer) and {blocks.Block, host_tier.HostBlock} <= set(snapshots.HELD)
