"""A monitor changes nothing: not what is generated, not the cache, not the model."""

import copy
import pickle
import threading

import pytest
import torch
from transformers import AttentionInterface

import hf_kvcompress as kvc
from hf_kvcompress import watching
from hf_kvcompress.monitoring import model_hook, tap

from .helpers import PROMPT, SMALL, compressed, generate, model, plain, prompt

CACHES = {
    "DynamicCache": plain,
    **{
        preset: lambda m, preset=preset: kvc.CompressedCache(m.config, preset=preset)
        for preset in ("near-lossless", "balanced", "tiny")
    },
    "kivi2": lambda m: compressed(m, codec="kivi2"),
    "H2OCache": lambda m: kvc.H2OCache(m.config, **SMALL, heavy_ratio=0.2, recent_ratio=0.3),
    "SnapKV": lambda m: compressed(m, policy="snapkv", budget=48),
    "StreamingLLM": lambda m: kvc.StreamingLLMCache(m.config, **SMALL, budget=64),
    "HierarchicalCache": lambda m: kvc.HierarchicalCache(
        m.config, **SMALL, levels=("identity", "int8", "int4", "cpu"), shares=(0.3, 0.2, 0.2), min_length=32
    ),
    "CPACCache": lambda m: kvc.CPACCache(m.config, **SMALL),
    "PagedCache": lambda m: kvc.PagedCache(m.config, **SMALL),
}
NEEDS_QUERIES = ("H2OCache", "SnapKV", "HierarchicalCache")
WAYS = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 0.9}}
CASES = [(n, e) for n in CACHES for e in (True, False) if e or n not in NEEDS_QUERIES]


@pytest.fixture(scope="module")
def llama():
    return model()


@pytest.mark.filterwarnings("ignore:importance")
@pytest.mark.parametrize(("name", "enabled"), CASES, ids=[f"{n}-{'enabled' if e else 'sdpa'}" for n, e in CASES])
def test_generation_is_bit_identical(llama, name, enabled, every_pass):
    if enabled:
        kvc.enable(llama)
    try:
        for options in WAYS.values():
            alone, cache = CACHES[name](llama), CACHES[name](llama)
            expected = generate(llama, alone, **options)
            with kvc.monitor(cache, model=llama) as seen:
                assert torch.equal(generate(llama, cache, **options), expected)
            assert type(cache) is type(alone) and set(vars(cache)) == set(vars(alone))
            assert [event["kind"] for event in seen.recording.events] == ["looks at"], seen.recording.events
            assert len(seen.recording.steps) == 16 and seen.recording.masses
    finally:
        kvc.disable(llama)


@pytest.mark.parametrize("way", ["beams", "prompt_lookup", "padded"])
def test_other_ways_of_generating(llama, way, every_pass):
    options = {"beams": {"num_beams": 3}, "prompt_lookup": {"prompt_lookup_num_tokens": 3}, "padded": {}}[way]
    if way == "padded":
        ids = torch.cat([prompt(), prompt(seed=5)])
        mask = torch.ones_like(ids)
        mask[0, :30] = 0
        options = {"ids": ids, "attention_mask": mask}
    elif way == "prompt_lookup":
        options["ids"] = prompt(40).repeat(1, 3)
    with kvc.enable(llama):
        expected = generate(llama, compressed(llama), **options)
        cache = compressed(llama)
        with kvc.monitor(cache) as seen:
            assert torch.equal(generate(llama, cache, **options), expected)
    kinds = {event["kind"] for event in seen.recording.events}
    assert "error" not in kinds
    assert {"beams": "rows", "prompt_lookup": "crop", "padded": "looks at"}[way] in kinds


def test_hybrid_sliding_model(every_pass):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, sliding_window=32, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    gemma = Gemma3ForCausalLM(config).eval()
    for make in (plain, compressed):
        with kvc.enable(gemma):
            expected = generate(gemma, make(gemma))
            cache = make(gemma)
            with kvc.monitor(cache, layers=2) as seen:
                assert torch.equal(generate(gemma, cache), expected)
        looked_at = next(event for event in seen.recording.events if event["kind"] == "looks at")["layers"]
        assert sorted(int(layer) % 2 for layer in looked_at) == [0, 1], "one of each kind"
        for series in seen.recording.masses.values():
            for mass in series:
                assert float(mass.mass.sum()) == pytest.approx(1, abs=1e-4)
                if mass.layer % 2 == 0:  # a query sees 32 positions, in five pages of 8 at most
                    assert int((mass.mass > 0).sum()) <= 32 // seen.recording.page_size + 1


def test_nothing_stays_hooked(llama):
    before = {module.config._attn_implementation for module in llama.modules() if hasattr(module, "config")}
    cache = plain(llama)
    with pytest.raises(ZeroDivisionError):
        with kvc.monitor(cache, model=llama) as seen:
            generate(llama, cache, 8)
            assert tap._taps and watching._watchers and type(cache) is not type(plain(llama))
            raise ZeroDivisionError("within")
    assert not tap._taps and not watching._watchers and not model_hook._watched
    assert type(cache) is type(plain(llama)) and "update" not in vars(cache)
    assert {module.config._attn_implementation for module in llama.modules() if hasattr(module, "config")} == before
    assert not any(thread.name == "kvcompress-monitor" for thread in threading.enumerate())
    assert seen.recording.steps[-1]["seen"] == PROMPT + 7, "the data is whole"
    assert seen.recording.events[-1] == {"kind": "stopped", "step": 8, "error": "ZeroDivisionError: within"}
    assert AttentionInterface._global_mapping["sdpa"] is not model_hook._shown_sdpa
    generate(llama, plain(llama), 2)  # and the model still runs


def test_entering_fails_cleanly(llama, tmp_path):
    (tmp_path / "something").write_text("here")
    cache = plain(llama)
    with pytest.raises(ValueError, match="output_dir: expected an empty folder"):
        kvc.monitor(cache, output_dir=tmp_path).__enter__()
    assert not tap._taps and not any(t.name == "kvcompress-monitor" for t in threading.enumerate())


def test_an_error_of_the_monitor_is_told_and_ends_only_the_monitor(llama, monkeypatch, every_pass):
    from hf_kvcompress.monitoring import session

    def fails(*arguments):
        raise RuntimeError("no look")

    monkeypatch.setattr(session, "logits_of", fails)
    expected = generate(llama, plain(llama))
    cache = plain(llama)
    with kvc.monitor(cache, model=llama) as seen:
        assert torch.equal(generate(llama, cache), expected)
    assert "RuntimeError: no look" in " ".join(seen.report().notes())


@pytest.mark.parametrize("name", ["DynamicCache", "balanced", "H2OCache", "CPACCache", "PagedCache"])
def test_copies_and_pickles_are_not_watched(llama, name, every_pass):
    with kvc.enable(llama):
        cache = CACHES[name](llama)
        with kvc.monitor(cache) as seen:
            generate(llama, cache, 8)
            copied = copy.deepcopy(cache)
            assert type(copied) is type(CACHES[name](llama))
            steps = seen.step
            following = torch.tensor([[5]])
            expected = llama(following, past_key_values=copied).logits
            assert seen.step == steps, "the copy is not watched"
            if name == "balanced":  # caches that hold generators of the host are not pickled by themselves either
                loaded = pickle.loads(pickle.dumps(cache))
                assert type(loaded) is kvc.CompressedCache
                assert torch.equal(llama(following, past_key_values=loaded).logits, expected)
            assert torch.equal(llama(following, past_key_values=cache).logits, expected)
            assert seen.step == steps + 1
    assert type(copied) is type(cache)


def test_two_monitors_and_two_caches(llama, every_pass):
    first, second = compressed(llama), plain(llama)
    with kvc.enable(llama), kvc.monitor(first) as a, kvc.monitor(first, layers=(1,), heads=(0,)) as b:
        with kvc.monitor(second) as c:
            generate(llama, first, 6)
            generate(llama, second, 4)
        llama(torch.tensor([[5]]), past_key_values=second)  # not watched any more
        assert type(first) is not kvc.CompressedCache
    assert type(first) is kvc.CompressedCache
    assert a.step == b.step and a.recording.steps[-1]["seen"] == b.recording.steps[-1]["seen"]
    assert set(b.recording.masses) == {(1, 0)} and set(a.recording.masses) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert c.recording.steps[-1]["seen"] == PROMPT + 4 - 1
    own, other = a.recording.masses[1, 0], b.recording.masses[1, 0]
    at = {mass.step: mass.mass for mass in other}
    assert all(torch.equal(mass.mass, at[mass.step]) for mass in own)


def test_another_cache_s_attention_is_not_taken_for_one_s_own(llama, every_pass):
    watched, other = compressed(llama), compressed(llama)
    with kvc.monitor(watched) as seen:
        generate(llama, watched, 4)  # under sdpa: nobody sees its queries, though they are waited for
        with kvc.enable(llama):
            generate(llama, other, 4)
    assert not seen.recording.masses


def test_generation_in_another_thread(llama, every_pass):
    cache = compressed(llama)
    with kvc.enable(llama), kvc.monitor(cache) as seen:

        def run():
            with torch.no_grad():
                generate(llama, cache, 6)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert seen.recording.masses and seen.recording.steps[-1]["seen"] == PROMPT + 5


def test_a_monitor_is_used_once(llama):
    seen = kvc.monitor(plain(llama))
    with seen:
        pass
    assert repr(seen) == "Nothing was captured yet."
    with pytest.raises(RuntimeError, match="expected a new monitor"), seen:
        pass
