"""A hit equals reading the prefix: prompts equal to, shorter than, longer than and parting from what is known."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.prefix import hashing
from hf_kvcompress.prefix.cache import PrefixCache

from ..conformance.helpers import BY_NAME, KVCOMPRESS, attention
from ..conformance.prompts import text_ids
from ..tiny_model import byte_tokenizer
from .helpers import SMALL, TOLERANCE, by_itself, by_store, llama, prefix_cache, rest, text

PREFIX = text(100)  # six blocks of 16 and a rest


@pytest.mark.parametrize("enabled", [False, True], ids=["sdpa", "kvcompress"])
@pytest.mark.parametrize("codec", ["identity", "int4", "kivi2", "eqrot3"])
def test_a_hit_equals_reading_the_prefix_bit_for_bit(codec: str, enabled: bool) -> None:
    store = prefix_cache(codec=codec, remember=False)
    with kvc.enable(llama()) if enabled else torch.no_grad():
        store.add_prefix(PREFIX)
        for seed, length in ((1, 1), (2, 30), (3, 77)):
            ids = PREFIX + text(length, seed)
            got, reused = by_store(store, ids)
            assert reused == 96
            assert torch.equal(got, by_itself(store, ids, [96]))
    assert store.store.stats.hits == 3


def test_remembered_prompts_are_entries_themselves() -> None:
    store = prefix_cache(codec="eqrot4")
    store.add_prefix(PREFIX)
    ids = PREFIX + text(50, 1)
    first, reused = by_store(store, ids)
    assert reused == 96
    again, reused = by_store(store, ids)
    assert reused == 144 and torch.equal(first, again)
    assert torch.equal(first, by_itself(store, ids, [96, 144]))
    assert [(entry.tokens, entry.hits) for entry in store.store.entries()] == [(144, 1), (96, 2)]


def test_sealed_pages_are_held_once() -> None:
    """A prompt that goes on from a prefix adds its own pages and window, not the prefix's pages."""
    store = prefix_cache(codec="identity")
    long = text(1600)
    store.add_prefix(long)
    alone = store.nbytes
    for seed in range(4):
        by_store(store, long + text(40, seed), steps=0)
    assert len(store) == 5 and store.nbytes < 1.3 * alone


@pytest.mark.parametrize("codec", ["identity", "eqrot4"])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 31, 32, 33, 95, 96, 97, 100])
def test_prompts_no_longer_than_the_prefix(codec: str, length: int) -> None:
    """At least the last token is read anew, for its logits."""
    store = prefix_cache(codec=codec)
    store.add_prefix(PREFIX)
    ids = PREFIX[:length]
    got, reused = by_store(store, ids)
    assert reused == (min(length // 16 * 16, length - 1) if length >= 16 else 0)
    if codec == "identity":
        assert (got - by_itself(store, ids, [])).abs().max() <= TOLERANCE
        return
    cache = store.reader.new_cache()
    llama()(torch.tensor([PREFIX[:96]]), past_key_values=cache)
    cache.crop(reused - 96)
    if reused < 96 and reused:  # cropped, like a cache that read the prefix and went back
        expected = rest(llama(), cache, ids, reused)
        # a single token behind a page goes through another product in the model than several do
        assert (got - expected).abs().max() <= (TOLERANCE if length in (17, 33) else 0)


@pytest.mark.parametrize("at", [1, 15, 16, 17, 50, 64, 95])
def test_prompts_that_part_inside_the_prefix(at: int) -> None:
    store = prefix_cache()
    store.add_prefix(PREFIX)
    for seed in (1, 2, 3):
        ids = [*PREFIX[:at], (PREFIX[at] + seed) % 256, *text(60, seed)]
        got, reused = by_store(store, ids)
        assert reused == at // 16 * 16
        assert (got - by_itself(store, ids, [])).abs().max() <= TOLERANCE
    shared = {entry.tokens for entry in store.store.entries()}
    assert (at // 16 * 16 in shared) or at < 16  # the place where they part has become an entry


def test_where_prompts_part_is_found_without_being_told() -> None:
    """The third prompt with the same system text goes on from an entry of just that text."""
    store = prefix_cache(codec="eqrot4", partial=False)
    system = text(160)
    prompts = [system + text(60, seed) for seed in range(1, 5)]
    reused = [by_store(store, ids, steps=0)[1] for ids in prompts]
    assert reused == [0, 0, 160, 160]
    assert torch.equal(by_store(store, prompts[3])[0], by_itself(store, prompts[3], [160, 208]))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("gemma3", {"codec": "int4"}),
        ("gemma3", {"codec": "int4", "sliding": "exact"}),
        ("mistral", {"codec": "eqrot4"}),
        ("qwen3_next", {"codec": "int4"}),
        ("falcon_h1", {"codec": "identity"}),
        ("deepseek_v3", {"codec": "int8"}),
        ("gemma3n", {"codec": "int4"}),
        ("llama", {"codec": "eqrot4", "policy": "h2o", "budget": 40}),
        ("gemma3", {"codec": "int4", "policy": "snapkv", "budget": 40, "head_budget": "adaptive"}),
        ("llama", {"codec": "identity", "policy": "h2o", "budget": 40, "demote_to": "int2"}),
    ],
    ids=str,
)
def test_sliding_recurrent_and_evicting_caches(name: str, settings: dict[str, Any]) -> None:
    """They cannot go back, so only entries that end before the prompts part are used."""
    entry = BY_NAME[name]
    ids = text_ids(1, 150)[0].tolist()
    with attention(entry, KVCOMPRESS) as model:
        store = PrefixCache(1, model=model, cache={**SMALL, **settings})
        store.add_prefix(ids[:100])
        got, reused = by_store(store, ids)
        assert reused == 96 and torch.equal(got, by_itself(store, ids, [96, 144]))
        other = [*ids[:70], *text_ids(1, 62, 3)[0].tolist()]
        crops = name == "deepseek_v3"  # all tokens are there, so the entry of 96 goes back to 64
        got, reused = by_store(store, other)
        assert reused == (64 if crops else 0)
        if not crops:
            assert torch.equal(got, by_itself(store, other, [64, 128]))
        assert by_store(store, other)[1] == 128
        got, reused = by_store(store, ids[:96])  # the prompt is the prefix
        assert reused == (95 if crops else 64)
        if not crops:
            assert torch.equal(got, by_itself(store, ids[:96], [64, 80]))


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"salt": "tenant"},
        {"revision": "abc"},
        {"cache": {"codec": "int4"}},
        {"cache": {"residual_length": 16}},
        {"cache": {"layers": {1: {"codec": "int4"}}}},
    ],
    ids=str,
)
def test_other_settings_share_nothing(change: dict[str, Any]) -> None:
    assert prefix_cache(**change).reader.origin.root != prefix_cache().reader.origin.root


def test_other_models_dtypes_and_rope_share_nothing() -> None:
    from ..tiny_model import tiny_llama

    roots = {prefix_cache(model).reader.origin.root for model in (
        llama(), tiny_llama(rope_theta=5e5), tiny_llama().bfloat16(), tiny_llama(num_hidden_layers=3),
    )}  # fmt: skip
    assert len(roots) == 4
    store = prefix_cache()
    store.add_prefix(PREFIX)
    store.bind(tiny_llama(eos_token_id=None, rope_theta=5e5).requires_grad_(False))
    ids = PREFIX + text(20, 1)
    got, reused = by_store(store, ids)
    assert reused == 0 and (got - by_itself(store, ids, [])).abs().max() <= TOLERANCE
    store.bind(llama())
    assert by_store(store, ids)[1] == 96


def test_forced_collisions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash of a few bits, texts fall together; tokens are compared, so answers stay right."""
    monkeypatch.setattr(hashing, "digest", lambda data: str(sum(data) % 2))
    store = prefix_cache()
    for seed in range(12):
        ids = text(70, seed)
        got, _ = by_store(store, ids)
        assert (got - by_itself(store, ids, [])).abs().max() <= TOLERANCE
        assert by_store(store, ids)[0].shape == got.shape
    assert store.stats()["collisions"] > 0


# -- generating --------------------------------------------------------------------------------------------------------


def test_texts_in_and_out() -> None:
    store = PrefixCache(1, model=llama(), tokenizer=byte_tokenizer(), cache=SMALL)
    prefix_id = store.add_prefix("You are a helpful assistant who answers in few words. " * 2)
    one = store.generate_with_prefix(prefix_id, "What is a cache?", max_tokens=8, do_sample=False)
    assert isinstance(one, str)
    assert store.generate_with_prefix(prefix_id, "What is a cache?", max_tokens=8, do_sample=False) == one
    many = store.generate_with_prefix(prefix_id, ["Why?", "What is a cache?"], max_tokens=8, do_sample=False)
    assert isinstance(many, list) and len(many) == 2
    ids = store.prefix_tokens(prefix_id)
    assert byte_tokenizer().decode(ids).startswith("You are")
    with pytest.raises(ValueError, match="prefix_id: expected what add_prefix returned, got 'x'"):
        store.generate_with_prefix("x", "Why?")
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        store.generate_with_prefix(prefix_id, ["Why?", ""])


def test_generation_equals_generate_with_the_whole_prompt() -> None:
    store = prefix_cache()
    prefix_id = store.add_prefix(PREFIX)
    for seed in range(4):
        ids = [*PREFIX, *text(1 + 9 * seed, seed)]
        got = store.generate_with_prefix(prefix_id, ids[100:], max_tokens=12, do_sample=False)
        expected = llama().generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[:, len(ids) :]
        assert torch.equal(got, expected)


def test_a_prefix_that_was_evicted_is_read_again() -> None:
    store = prefix_cache()
    prefix_id = store.add_prefix(PREFIX)
    before = store.generate_with_prefix(prefix_id, text(9, 1), max_tokens=8, do_sample=False)
    store.store.clear()
    assert len(store) == 0 and store.nbytes == 0
    assert torch.equal(store.generate_with_prefix(prefix_id, text(9, 1), max_tokens=8, do_sample=False), before)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_read_nothing_torn() -> None:
    """Eight threads ask for prompts that share beginnings, in a store that must evict all the time."""
    prompts = [text(64, seed % 3) + text(40, seed) for seed in range(9)]
    model = llama()
    expected = [model(torch.tensor([ids])).logits[0, -1] for ids in prompts]
    size = prefix_cache()
    by_store(size, prompts[0])
    store = prefix_cache(max_cache_size_gb=4 * size.nbytes / 2**30)
    wrong: list[Any] = []

    def work(number: int) -> None:
        try:
            with torch.no_grad():
                for turn in range(12):
                    which = (number * 5 + turn * 7) % len(prompts)
                    cache, have = store.open(prompts[which])
                    logits = model(torch.tensor([prompts[which][have:]]), past_key_values=cache).logits[0, -1]
                    if (logits - expected[which]).abs().max() > TOLERANCE:
                        wrong.append(which)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.nbytes <= store.store.max_bytes
    assert store.store.stats.hits + store.store.stats.misses == 96 and store.store.stats.evictions > 0
    assert not any(node.users for node in store.store.tree.nodes())


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    for options, message in (
        ({"max_cache_size_gb": 0}, "max_cache_size_gb: expected a number above 0"),
        ({"eviction_policy": "fifo"}, "eviction_policy: expected one of lru, lfu, adaptive"),
        ({"block_size": 0}, "block_size: expected a whole number"),
        ({"remote": "nosuch://x"}, "tier: expected a path, a redis:// URL or one that fsspec knows"),
    ):
        with pytest.raises(ValueError, match=message):
            PrefixCache(**options)
    with pytest.raises(ValueError, match=r"model: expected a model, by PrefixCache\(model=...\) or bind"):
        PrefixCache().reader.new_cache()
    store = prefix_cache()
    with pytest.raises(ValueError, match="prefix: expected at least one token"):
        store.add_prefix([])
    with pytest.raises(ValueError, match="prompt: expected token ids, as there is no tokenizer"):
        store.add_prefix("text")
    with pytest.raises(ValueError, match="priority: expected one of low, normal, high"):
        store.warm_cache([PREFIX], priority="urgent")
    with pytest.raises(ValueError, match="model: expected a decoder"):
        PrefixCache(model=BY_NAME["t5"].model)
