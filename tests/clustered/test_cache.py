"""The cache as a whole: equal to its codec where nothing repeats, smaller where something does, right in between."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

import hf_kvcompress as kvc
from hf_kvcompress.clustered.tracker import PageSimilarityTracker

from ..calibrated import calibration_of
from ..conformance.factories import SMALL
from ..conformance.state import FULL, decoded, equal, feed, feed_in_parts, held_bytes, random_pairs

torch.manual_seed(0)
#: heads large enough for differences to pay
MODEL = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.2,
    )
).eval()


def cpac(config=None, **settings):
    return kvc.CPACCache(config, **{**SMALL, "codec": "int4", **settings})


def random_ids(rows: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def repeating(rows: int = 1) -> torch.Tensor:
    """Ids `[rows, 200]`: 96 tokens, 7 others, the 96 again; every row has texts of its own."""
    text = random_ids(rows, 200, seed=3)
    text[:, 103:199] = text[:, :96]
    return text


def read_prompt(cache, ids, model=None):
    model = model or MODEL
    with kvc.enable(model), torch.no_grad():
        model(ids, past_key_values=cache)
    cache.commit()
    return cache


def shares(cache) -> int:
    return cache.get_compression_stats()["compressed_blocks"]


# -- nothing repeats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["eqrot4", "int8", "kivi2", "turbo3"])
def test_random_text_gives_the_logits_and_bytes_of_the_codec(codec):
    ids, caches, logits = random_ids(2, 150, seed=9), [], []
    for make in (kvc.CompressedCache, kvc.CPACCache):
        cache = make(MODEL.config, **{**SMALL, "codec": codec})
        with kvc.enable(MODEL), torch.no_grad():
            parts = [MODEL(part, past_key_values=cache).logits for part in ids.split([120, 20, 1, 9], dim=1)]
        caches.append(cache)
        logits.append(torch.cat(parts, dim=1))
    assert torch.equal(*logits)
    plain, own = caches
    assert shares(own) == 0
    stores = [layer.storage.pages for layer in own.layers]
    hashes = sum(t.nbytes for pages in stores for table in pages.hashes.values() for t in table.values())
    assert own.nbytes == plain.nbytes + stores[0].index.nbytes + hashes == held_bytes(own)


# -- something repeats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["int8", "int4", "eqrot4", "kivi4"])
def test_a_repeated_text_takes_less_at_no_more_error(codec):
    ids = repeating()
    dense, (plain, own) = (
        kvc.CompressedCache(MODEL.config, **{**SMALL, "codec": "identity"}),
        (make(MODEL.config, **{**SMALL, "codec": codec}) for make in (kvc.CompressedCache, kvc.CPACCache)),
    )
    exact, without, shared = (decoded(read_prompt(cache, ids)) for cache in (dense, plain, own))
    assert shares(own) > 10 and own.nbytes < plain.nbytes
    assert own.nbytes == held_bytes(own)
    for x, a, b in zip(exact, without, shared, strict=True):
        for role in (0, 1):
            assert (b[role] - x[role]).norm() <= 1.02 * (a[role] - x[role]).norm()


@pytest.mark.parametrize("keys", ["pca4", "pca2"])
def test_codecs_that_must_know_positions_share_too(keys):
    """Pages that are packed before the rotation are read at their own places, spans of them at the members'."""
    ids, calibration = repeating(2), calibration_of(MODEL)
    settings = {**SMALL, "keys": keys, "values": "eqrot4", "calibration": calibration}
    plain = decoded(read_prompt(kvc.CompressedCache(MODEL.config, **settings), ids))
    cache = read_prompt(kvc.CPACCache(MODEL.config, **settings), ids)
    exact = decoded(read_prompt(cpac(MODEL.config, codec="identity"), ids))
    assert cache.layers[0].storage.pages.contents()["saved_by_role"]["key"] > 0
    for x, a, b in zip(exact, plain, decoded(cache), strict=True):
        for role in (0, 1):
            assert (b[role] - x[role]).norm() <= 1.02 * (a[role] - x[role]).norm()
    before = decoded(cache)
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert equal(decoded(cache), [(k[[1, 0]], v[[1, 0]]) for k, v in before])
    cache.crop(-60)
    assert equal(decoded(cache), [(k[[1, 0], :, :140], v[[1, 0], :, :140]) for k, v in before])


def test_keys_are_found_before_their_rotation_only():
    found = {}
    for frame in ("unrotated", "rotated"):
        pages = read_prompt(cpac(MODEL.config, frame=frame), repeating()).layers[0].storage.pages
        found[frame] = pages.contents()["saved_by_role"]
    assert found["unrotated"]["key"] > 1000 > 0 >= found["rotated"]["key"]
    assert found["rotated"]["value"] > 1000


def test_shared_pages_attend_like_what_they_decode_to():
    ids, more = repeating(2), random_ids(2, 12, seed=8)
    logits = []
    for enabled in (True, False):
        # what matters is known by attention under `enable` and by the values' size otherwise
        cache, model = cpac(MODEL.config, use_importance_weighting=False), MODEL
        with torch.no_grad():
            if enabled:
                with kvc.enable(model):
                    model(ids, past_key_values=cache)
                    logits.append(model(more, past_key_values=cache).logits)
            else:
                model(ids, past_key_values=cache)
                logits.append(model(more, past_key_values=cache).logits)
        assert shares(cache) > 0
    assert (logits[0] - logits[1]).abs().max() <= 1e-4


def test_rows_with_one_prefix_hold_it_once():
    ids = random_ids(1, 120, seed=5).repeat(6, 1)
    ids[:, 90:] = random_ids(6, 30, seed=6)
    sizes = {}
    for make in (kvc.CompressedCache, kvc.CPACCache):
        sizes[make] = read_prompt(make(MODEL.config, **{**SMALL, "codec": "int4", "residual_length": 1}), ids)
    own = sizes[kvc.CPACCache]
    found = own.get_compression_stats()
    assert found["references"] >= 5 * 10 * 2 * MODEL.config.num_hidden_layers  # pages of 8 in 88 tokens, 5 rows
    assert own.nbytes < 0.75 * sizes[kvc.CompressedCache].nbytes
    for plain, shared in zip(decoded(sizes[kvc.CompressedCache]), decoded(own), strict=True):
        for a, b in zip(plain, shared, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)  # no statistics in int4: the same codes


def test_generation_goes_on_as_without_sharing():
    ids = repeating()
    with kvc.enable(MODEL):
        texts = [
            MODEL.generate(ids, past_key_values=cache, max_new_tokens=24, min_new_tokens=24, do_sample=False)
            for cache in (cpac(MODEL.config, codec="int8"), kvc.CompressedCache(MODEL.config, codec="int8"))
        ]
    assert texts[0].shape == texts[1].shape
    assert (texts[0] == texts[1]).float().mean() > 0.95


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_and_row_operations_keep_shared_pages(copied):
    cache = read_prompt(cpac(MODEL.config), repeating(3))
    before = decoded(cache)
    other = copied(cache)
    assert equal(decoded(other), before) and other.nbytes == cache.nbytes
    other.batch_select_indices(torch.tensor([2, 0]))
    assert equal(decoded(other), [(k[[2, 0]], v[[2, 0]]) for k, v in before])
    other.batch_repeat_interleave(2)
    assert equal(decoded(other), [(k[[2, 2, 0, 0]], v[[2, 2, 0, 0]]) for k, v in before])
    other.crop(-60)
    assert equal(decoded(other), [(k[[2, 2, 0, 0], :, :140], v[[2, 2, 0, 0], :, :140]) for k, v in before])
    assert other.nbytes == held_bytes(other) and equal(decoded(cache), before)
    read_prompt(other, random_ids(4, 40, seed=2))
    assert other.get_seq_length() == 180


def test_the_newest_pages_must_come_out_better():
    pairs = random_pairs(1, 150)
    pairs = [(k, torch.cat([v[:, :, :75], v[:, :, :75]], 2)) for k, v in pairs]
    found = []
    for importance in (True, False):
        cache = cpac(codec="eqrot4", frame="rotated", use_importance_weighting=importance)
        feed(cache, pairs)
        found.append(cache.get_compression_stats())
    assert found[0]["differences_by_bits"] != found[1]["differences_by_bits"]
    assert found[0]["nbytes"] > found[1]["nbytes"]


def test_clusters_keep_to_their_size():
    pairs = [(k, v[:, :, :40].repeat(1, 1, 8, 1)) for k, v in random_pairs(1, 320, dim=128)]
    sizes = {}
    for most in (2, 8):
        cache = cpac(codec="eqrot4", frame="rotated", max_cluster_size=most)
        feed(cache, pairs)
        cache.commit()
        for slab in cache.layers[0].storage.pages.slabs:
            for group in slab.pools["value"].groups:
                counts = group.base[:, 0].bincount()
                sizes[most] = max(sizes.get(most, 0), int(counts.max()) + 1)
    assert sizes[2] == 2 < sizes[8] <= 8


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings",
    [
        ("config", {}),
        ("policy", {"policy": "h2o", "budget": 128, "frame": "rotated"}),
        ("memory_limit", {"memory_limit": -1, "frame": "rotated"}),
        ("pressure", {"pressure": 0.5, "frame": "rotated"}),
        ("tracker", {"tracker": "mine", "frame": "rotated"}),
        ("similarity_threshold", {"similarity_threshold": 2, "frame": "rotated"}),
        ("frame", {"frame": "rotate"}),
    ],
)
def test_bad_arguments_are_named(name, settings):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        kvc.CPACCache(**settings)


def test_an_unknown_rotation_is_an_error_that_names_the_way_out():
    with pytest.raises(ValueError, match="frame='rotated'"):
        kvc.CPACCache(GPT2Config(n_layer=2))
    assert kvc.CPACCache(GPT2Config(n_layer=2), frame="rotated").get_seq_length() == 0


def test_pressure_raises_the_level_and_a_limit_in_bytes_is_pressure():
    felt = [0.1, 0.95]
    cache = cpac(FULL, pressure=lambda: felt.pop(0), compression_level=1)
    feed_in_parts(cache, random_pairs(1, 60), [30, 30])
    assert cache.level == 3
    small = cpac(FULL, memory_limit="2KB")
    feed_in_parts(small, random_pairs(1, 60), [30, 30])
    assert small.level == 3
    unlimited = cpac(FULL, adaptive_compression=False, memory_limit=1)
    feed_in_parts(unlimited, random_pairs(1, 60), [30, 30])
    assert unlimited.level == 2


def test_reports_have_what_they_promise():
    class Own(PageSimilarityTracker):
        asked = 0

        def compute_page_features(self, pages):
            Own.asked += 1
            return super().compute_page_features(pages)

    cache = read_prompt(cpac(MODEL.config, tracker=Own()), repeating())
    stats = cache.get_compression_stats()
    assert {"compressed_blocks", "compression_ratio", "memory_saved_mb"} <= set(stats)
    assert stats["compression_ratio"] == cache.stats()["compression_ratio"]
    assert 0 < stats["saved_against_codec_mb"] < stats["memory_saved_mb"]
    found = cache.analyze_compression_opportunities()
    assert sum(found["against"].values()) == found["pages"] == stats["compressed_blocks"] + stats["plain_blocks"]
    assert found["potential_memory_savings_mb"] >= 0 and "pairs_above_threshold" in repr(found)
    assert Own.asked > 0 and len(found["layers"]) == 2 * len(cache.layers)


def test_pages_shared_in_inference_mode_go_on_outside_of_it():
    cache, ids = cpac(MODEL.config), repeating()
    with kvc.enable(MODEL):
        with torch.inference_mode():
            MODEL(ids[:, :150], past_key_values=cache)
        with torch.no_grad():
            for token in ids[:, 150:].split(1, dim=1):
                MODEL(token, past_key_values=cache)
    assert shares(cache) > 0
    cache.crop(-40)
    cache.reorder_cache(torch.tensor([0]))
    assert cache.get_seq_length() == 160


def test_decoding_finds_repeats_too():
    ids, sizes = repeating(), []
    for parts in ([200], [110] + [1] * 90):
        cache = cpac(MODEL.config, use_importance_weighting=False)
        for part in ids.split(parts, dim=1):
            read_prompt(cache, part)
        sizes.append(shares(cache))
    assert sizes[1] >= 0.7 * sizes[0] > 0
