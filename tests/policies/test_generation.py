"""`generate` with caches that evict: every way of generating, turns, drafts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import hf_kvcompress as kvc

from ..conformance.factories import EVICTING_FEW, KVCOMPRESS, SMALL, TIGHT, Factory
from ..conformance.generation import MODES, NEW_TOKENS, generate
from ..conformance.helpers import BY_NAME, TOLERANCE, assert_same, attention, maker
from ..conformance.prompts import prompt, text_ids
from ..conformance.state import held
from ..conformance.zoo import VOCAB, Entry

LLAMA = BY_NAME["llama"]
few_caches = pytest.mark.parametrize("factory", EVICTING_FEW, ids=lambda factory: factory.name)
DRAFTED = ("prompt_lookup", "assistant")


def cases() -> list:
    """Every way of generating with some caches, drafts with all; under plain attentions where that is possible."""
    found = []
    for factory in EVICTING_FEW:
        for mode in MODES if factory.name in ("h2o-eqrot4", "adaptive") else DRAFTED:
            for name in (KVCOMPRESS, "sdpa"):
                if factory.runs_under(name, mode):
                    found.append(pytest.param(factory, mode, name, id=f"{factory.name}-{mode}-{name}"))
    return found


@pytest.mark.parametrize("factory, mode, attention_name", cases())
def test_valid_output_within_the_budget(factory: Factory, mode: str, attention_name: str) -> None:
    """Which tokens are evicted when depends on how tokens come, so the text need not be that of plain greedy decoding.

    It must be that of the logits that are reported, finite, as long as asked for, and the cache within its budget.
    """
    made = []
    make = maker(LLAMA, factory)
    with attention(LLAMA, attention_name) as model:
        out = MODES[mode](LLAMA, model, lambda: made.append(make()) or made[-1])
    assert out.logits.isfinite().all() and 0 <= int(out.tokens.min()) and int(out.tokens.max()) < VOCAB
    if mode in ("greedy", *DRAFTED):
        assert out.tokens[:, -NEW_TOKENS:].tolist() == out.logits.argmax(-1).T.tolist()
    cache = made[-1]
    for layer in cache.layers:
        layer.commit()
        limit = layer.storage.evictor.tokens(layer.seen)
        assert max(layer.storage.tokens_stored()) <= limit


@pytest.mark.parametrize("factory", [f for f in EVICTING_FEW if f.runs_under("sdpa")], ids=lambda factory: factory.name)
@pytest.mark.parametrize("mode", ["prompt_lookup", "assistant", "prefill_chunks", "second_turn", "chunk_loop"])
def test_a_single_row_under_sdpa_is_as_under_ours(factory: Factory, mode: str) -> None:
    """Policies that want no queries; with a codec that goes through the same numbers either way."""
    outcomes = []
    for name in ("sdpa", KVCOMPRESS):
        with attention(LLAMA, name) as model:
            outcomes.append(MODES[mode](LLAMA, model, maker(LLAMA, factory, codec="identity")))
    assert_same(outcomes[0], outcomes[1], tolerance=1e-4)


@few_caches
def test_drafts_behind_a_prompt_longer_than_a_draft_may_be(factory: Factory) -> None:
    ids = text_ids(1, 120, seed=9)
    with attention(LLAMA, KVCOMPRESS) as model:
        cache = factory(model.config)
        out = generate(LLAMA, model, {"input_ids": ids}, cache, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
    assert out.tokens.shape == (1, 120 + NEW_TOKENS) and out.logits.isfinite().all()
    assert cache.get_seq_length() == 120 + NEW_TOKENS - 1


# -- turns -------------------------------------------------------------------------------------------------------------


@few_caches
def test_two_questions_on_one_cache(factory: Factory) -> None:
    """Only the new tokens are fed, at the positions where the text goes on, however many old ones are left."""
    lengths: list[int] = []
    with attention(LLAMA, KVCOMPRESS) as model:
        cache = factory(model.config)
        update = cache.update

        def counting(keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any) -> Any:
            if layer == 0:
                lengths.append(keys.shape[2])
            return update(keys, values, layer, *args)

        cache.update = counting
        ids, expected = text_ids(1, 60, seed=1), []
        for question in range(3):
            ids = torch.cat([ids, text_ids(1, 9, seed=question + 5)], dim=1)
            ids = generate(LLAMA, model, {"input_ids": ids}, cache, max_new_tokens=5).tokens
            expected += [69 if question == 0 else 10, 1, 1, 1, 1]  # the last token of a turn is fed in the next
    assert lengths == expected
    assert cache.get_seq_length() == ids.shape[1] - 1
    for layer in held(cache):
        for head in range(len(layer.positions)):
            own = layer.of_head(head)
            assert own == sorted(set(own)) and own[:2] == [0, 1]
            assert own[-8:] == list(range(ids.shape[1] - 9, ids.shape[1] - 1))


def test_a_pyramid_is_asked_several_tokens_at_once() -> None:
    """A mask of one length cannot serve layers that hold different numbers of tokens."""
    cache = kvc.PyramidKVCache(LLAMA.model.config, budget=50, window_size=8, beta=4, codec="identity", **SMALL)
    with attention(LLAMA, KVCOMPRESS) as model:
        model(text_ids(1, 120), past_key_values=cache)
        counts = [layer.counts for layer in held(cache)]
        assert counts[0][0] > counts[1][0] > counts[2][0]
        assert model(text_ids(1, 15, seed=3), past_key_values=cache).logits.isfinite().all()
        assert model(text_ids(1, 3, seed=4)[:, :1], past_key_values=cache).logits.isfinite().all()


def test_caches_of_other_kinds_beside_one_that_evicts() -> None:
    """Nothing is left on the model: an uncompressed cache gives what it gives without ours."""
    ids, more = text_ids(2, 60), text_ids(2, 10, seed=1)
    with attention(LLAMA, KVCOMPRESS) as model:
        expected = DynamicCache(config=model.config)
        model(ids, past_key_values=expected)
        expected = model(more, past_key_values=expected).logits
        ours, other = EVICTING_FEW[1](model.config), DynamicCache(config=model.config)
        for part in (ids, more):
            model(part, past_key_values=ours)
            found = model(part, past_key_values=other).logits
    assert torch.equal(found, expected)


# -- what is refused ---------------------------------------------------------------------------------------------------

ASKS = "scores tokens with queries, which only the attention can hand over"
DIFFER = "heads or layers hold different tokens"
REFUSED = {
    "h2o": ({"policy": "h2o"}, ASKS),
    "snapkv": ({"policy": "snapkv"}, ASKS),
    "tova": ({"policy": "tova"}, ASKS),
    "expected": ({"policy": "expected"}, ASKS),
    "rkv": ({"policy": "rkv"}, ASKS),
    "unlimited": ({"policy": "h2o", "budget": None}, ASKS),
    "adaptive": ({"policy": "keydiff", "head_budget": "adaptive"}, DIFFER),
    "pyramid": ({"policy": "streaming", "budget": 40, "layer_budget": "pyramid:2"}, DIFFER),
    "demoting": ({"policy": "random", "demote_to": "int2"}, DIFFER),
}


@pytest.mark.parametrize("attention_name", ["sdpa", "eager"])
@pytest.mark.parametrize("settings, why", REFUSED.values(), ids=list(REFUSED))
def test_plain_attention_is_refused_with_a_way_out(settings: dict, why: str, attention_name: str) -> None:
    with attention(LLAMA, attention_name) as model:
        cache = kvc.CompressedCache(model.config, **{**SMALL, "budget": TIGHT, **settings})
        with pytest.raises(RuntimeError, match=rf"layer 0: .*{why}\. Call `hf_kvcompress.enable\(model\)` first"):
            model.generate(text_ids(1, 50), past_key_values=cache, max_new_tokens=3)


@pytest.mark.parametrize("entry, rows", [(LLAMA, 2), (BY_NAME["gemma3"], 1)], ids=["batch", "sliding"])
def test_what_a_plain_attention_cannot_see_is_refused(entry: Entry, rows: int) -> None:
    with attention(entry, "sdpa") as model:
        cache = kvc.CompressedCache(model.config, policy="streaming", budget=TIGHT, sliding="evict", **SMALL)
        with pytest.raises(RuntimeError, match=r"Call `hf_kvcompress.enable\(model\)` first"):
            model(text_ids(rows, 50), past_key_values=cache)


@pytest.mark.parametrize("policy", ["streaming", "keydiff", "random"])
@pytest.mark.parametrize("attention_name", ["sdpa", "eager"])
def test_policies_that_want_no_queries_evict_under_a_plain_attention(policy: str, attention_name: str) -> None:
    cache, text = kvc.CompressedCache(LLAMA.model.config, codec="identity", policy=policy, budget=40, **SMALL), []
    other = kvc.CompressedCache(LLAMA.model.config, codec="identity", policy=policy, budget=40, **SMALL)
    for size in (50, 1, 1, 20, 1, 30, 1):
        ids = text_ids(1, 50, seed=len(text))[:, :size]
        with attention(LLAMA, attention_name) as model:
            text.append(model(ids, past_key_values=cache).logits)
        with attention(LLAMA, KVCOMPRESS) as model:
            expected = model(ids, past_key_values=other).logits
        assert (text[-1] - expected).abs().max().item() <= 10 * TOLERANCE
    assert [layer.positions.tolist() for layer in held(cache)] == [layer.positions.tolist() for layer in held(other)]
    assert max(held(cache)[0].counts) <= 40


def test_the_tokens_of_an_encoder_are_not_evicted_by_a_plain_attention() -> None:
    """It cannot tell them from the decoder's own; `enable` can, and leaves them whole."""
    entry = BY_NAME["whisper"]
    with attention(entry, "sdpa") as model:
        inputs = prompt(entry, (37,))
        parts = (kvc.CompressedCache(model.config, policy="streaming", budget=TIGHT, **SMALL) for _ in range(2))
        with pytest.raises(RuntimeError, match=r"encoder's text.*Call `hf_kvcompress.enable\(model\)` first"):
            model.generate(**inputs, past_key_values=EncoderDecoderCache(*parts), max_new_tokens=3)


def test_a_model_that_expands_what_it_caches_says_so() -> None:
    """Its attention is ours, so the way out cannot be to enable it."""
    with attention(BY_NAME["deepseek_v3"], KVCOMPRESS) as model:
        cache = kvc.CompressedCache(model.config, policy="h2o", budget=TIGHT, **SMALL)
        with pytest.raises(RuntimeError, match=r"layer 0: .*expands what it caches.*needs no queries") as error:
            model.generate(text_ids(1, 50), past_key_values=cache, max_new_tokens=3)
        assert "enable" not in str(error.value)
