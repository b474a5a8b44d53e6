"""What is captured is what the model caches, before any window takes it away, and cut into pages."""

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from hf_kvcompress.analysis.capture import capture
from hf_kvcompress.analysis.prompts import Prompt
from hf_kvcompress.analysis.views import views

from ..tiny_model import byte_tokenizer, tiny_llama

HOW = {"max_tokens": 0, "prompt_tokens": None, "temperature": 0.0, "seed": 0, "page_size": 16, "sinks": 4}


def read(model, *prompts, tokenizer=None, **changes):
    own = [Prompt(f"p{i}", prompt) for i, prompt in enumerate(prompts)]
    return capture(model, tokenizer, own, **{**HOW, "memory": 1 << 30, **changes})


def random_ids(length, seed=0):
    return torch.randint(250, (1, length), generator=torch.Generator().manual_seed(seed))


def test_pages_hold_what_a_cache_holds():
    model, ids = tiny_llama(), random_ids(4 + 3 * 16 + 5)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    found = read(model, random_ids(30, seed=1), ids)
    assert [reading.pages for reading in found.readings] == [1, 3]
    assert found.owner.tolist() == [0, 1, 1, 1] and found.starts.tolist() == [4, 4, 20, 36]
    for layer, store in found.layers.items():
        for parts, expected in ((store.keys, cache.layers[layer].keys), (store.values, cache.layers[layer].values)):
            torch.testing.assert_close(parts[1], expected[0, :, 4:52].transpose(0, 1))


def test_keys_before_their_rotation_rotate_to_those_cached():
    found = read(tiny_llama(), random_ids(4 + 5 * 16))
    before, after, value = views(found, 1, seed=0)
    assert [view.kind for view in (before, after, value)] == ["key_before_rope", "key_after_rope", "value"]
    turned = found.layers[1].rotary.apply(before.tokens, found.positions)
    torch.testing.assert_close(turned, after.tokens, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before.tokens, after.tokens, atol=0.1)


def test_the_baseline_has_the_same_tokens_in_other_places():
    found = read(tiny_llama(), random_ids(4 + 8 * 16))
    before, after, value = views(found, 0, seed=3)
    for view in (before, value):
        order = [own.sum(-1).sort().values for own in (view.tokens, view.shuffled)]
        torch.testing.assert_close(*order)
        assert not torch.allclose(view.tokens, view.shuffled)
    turned = found.layers[0].rotary.apply(before.shuffled, found.positions)
    torch.testing.assert_close(turned, after.shuffled)
    assert torch.equal(before.shuffled, next(views(found, 0, seed=3)).shuffled)
    assert not torch.equal(before.shuffled, next(views(found, 0, seed=4)).shuffled)


def test_windows_take_nothing_away():
    config = Gemma3TextConfig(
        vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=24, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    found = read(model, random_ids(100), max_tokens=12)
    assert found.layers[0].shape.window == 24 and len(found.layers) == 2
    assert len(found.readings[0].ids) == 111, "nothing was made of the last new token"
    whole = DynamicCache()
    model(found.readings[0].ids[None], past_key_values=whole)
    torch.testing.assert_close(found.layers[0].keys[0], whole.layers[0].keys[0, :, 4:100].transpose(0, 1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_follows_the_seed(temperature):
    model, ids = tiny_llama(eos_token_id=None), random_ids(40)

    def tokens(seed):
        return read(model, ids, max_tokens=20, temperature=temperature, seed=seed).readings[0].ids.tolist()

    assert tokens(1) == tokens(1) and len(tokens(1)) == 59 and tokens(1)[:40] == ids[0].tolist()
    assert (tokens(1) == tokens(2)) == (temperature == 0)


def test_generation_ends_at_the_window_of_the_model():
    model = tiny_llama(max_position_embeddings=64, eos_token_id=None)
    assert len(read(model, random_ids(50), max_tokens=100).readings[0].ids) == 63
    assert len(read(model, random_ids(64), max_tokens=100).readings[0].ids) == 64


def test_long_prompts_are_read_in_chunks(monkeypatch):
    whole = read(tiny_llama(), random_ids(150))
    monkeypatch.setattr("hf_kvcompress.analysis.capture.CHUNK", 32)
    parts = read(tiny_llama(), random_ids(150))
    torch.testing.assert_close(parts.layers[1].keys[0], whole.layers[1].keys[0], atol=1e-4, rtol=1e-4)


def test_memory_is_bounded_by_a_sample_of_pages():
    model, page = tiny_llama(), 16 * 2 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, size, bytes
    found = read(model, random_ids(4 + 40 * 16), random_ids(4 + 3 * 16), memory=20 * page)
    assert [len(reading.kept) for reading in found.readings] == [10, 3]
    assert [reading.pages for reading in found.readings] == [40, 3]
    kept = found.readings[0].kept
    assert bool((kept.diff() > 0).all()) and int(kept.max()) < 40 and kept.tolist() != list(range(10))
    held = sum(t.numel() * t.element_size() for own in found.layers.values() for t in own.keys + own.values)
    assert held == 13 * page
    again = read(model, random_ids(4 + 40 * 16), random_ids(4 + 3 * 16), memory=20 * page)
    assert torch.equal(again.readings[0].kept, kept)


def test_an_unknown_rotation_is_left_out_with_the_reason():
    model = tiny_llama()
    model.config.model_type = "llama-of-tomorrow"
    found = read(model, random_ids(60))
    assert [view.kind for view in views(found, 0, 0)] == ["key_after_rope", "value"]
    assert "rotary pairing" in found.left_out["key_before_rope"]


@pytest.mark.parametrize(
    "changes, prompt, message",
    [
        ({}, random_ids(2049), "p0: expected at most 2,048 tokens, the model's window, got 2,049"),
        ({}, random_ids(19), "prompts: expected at least one of 20 tokens"),
        ({}, "a text", "tokenizer: expected the model's tokenizer"),
    ],
)
def test_prompts_that_do_not_fit(changes, prompt, message):
    with pytest.raises(ValueError, match=message):
        read(tiny_llama(), prompt, **changes)


def test_prompt_tokens_cut_what_is_too_long():
    found = read(tiny_llama(), random_ids(3000), prompt_tokens=100)
    assert len(found.readings[0].ids) == 100
    assert read(tiny_llama(), "text " * 20, tokenizer=byte_tokenizer()).readings[0].prompt_tokens == 100
