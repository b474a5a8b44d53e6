"""Scores come from the cache: an exact cache scores the baseline, a broken one does not."""

import math

import pytest
import torch
from transformers import DynamicCache

from hf_kvcompress import CompressedCache, enable
from hf_kvcompress.scoring import decode, hide_passkey, score, standard_text, tokenize

from .tiny_model import byte_tokenizer, tiny_llama

PROMPT, TOTAL = 200, 264


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return tokenize(byte_tokenizer(), standard_text(), TOTAL)


class ShuffledKeys(DynamicCache):
    """Forgets the order of the keys that it was given before."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        layer.keys = layer.keys[:, :, torch.randperm(layer.keys.shape[2])]
        return keys, values


def test_score_of_the_same_cache_is_exactly_the_reference(model, ids):
    reference = score(model, ids, DynamicCache, PROMPT)
    again = score(model, ids, DynamicCache, PROMPT, reference=reference)
    assert again.mean_kl == 0.0
    assert again.top1_agreement == 1.0
    assert again.perplexity == reference.perplexity
    assert again.logits is None and reference.kl is None


def test_score_equals_the_loss_of_one_forward(model, ids):
    logits = model(input_ids=ids).logits[0, PROMPT:-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, PROMPT + 1 :])
    got = score(model, ids, DynamicCache, PROMPT)
    assert len(got.nll) == TOTAL - PROMPT - 1
    assert got.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("step, prefill_step", [(1, None), (7, None), (1000, None), (32, 64), (32, 199)])
def test_score_does_not_depend_on_the_steps(model, ids, step, prefill_step):
    reference = score(model, ids, DynamicCache, PROMPT)
    got = score(model, ids, DynamicCache, PROMPT, step, prefill_step, reference)
    assert abs(got.mean_kl) < 1e-7
    torch.testing.assert_close(got.nll, reference.nll, atol=1e-4, rtol=1e-5)


def test_score_of_an_identity_codec_is_the_reference(model, ids):
    reference = score(model, ids, DynamicCache, PROMPT)
    with enable(model):
        got = score(model, ids, lambda: CompressedCache(model.config, codec="identity"), PROMPT, reference=reference)
    assert abs(got.mean_kl) < 1e-7
    assert got.top1_agreement == 1.0


def test_score_catches_a_broken_cache(model, ids):
    reference = score(model, ids, DynamicCache, PROMPT)
    got = score(model, ids, ShuffledKeys, PROMPT, reference=reference)
    assert got.mean_kl > 1e-2
    assert got.top1_agreement < 1.0


def test_score_catches_fewer_bits(model, ids):
    reference = score(model, ids, DynamicCache, PROMPT)

    def kl(codec):
        def make():
            return CompressedCache(model.config, codec=codec, page_size=16)

        with enable(model):
            return score(model, ids, make, PROMPT, reference=reference).mean_kl

    assert 0 < kl("int8") < kl("int4") < kl("int2")


def test_score_reports_progress_and_uses_a_fresh_cache(model, ids):
    made, fed = [], []

    def make():
        made.append(DynamicCache())
        return made[-1]

    got = score(model, ids, make, PROMPT, step=32, on_tokens=fed.append)
    assert fed == [200, 32, 31]
    assert made == [got.cache] and got.cache.get_seq_length() == TOTAL - 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt_length": 0}, "prompt_length: expected 1 to 262 .* got 0"),
        ({"prompt_length": 263}, "prompt_length: expected 1 to 262 .* got 263"),
        ({"step": 0}, "step: expected at least 1, got 0"),
        ({"prefill_step": 0}, "prefill_step: expected at least 1 or None, got 0"),
        ({"input_ids": torch.zeros(2, 9, dtype=torch.long)}, r"input_ids: expected one row, \[1, T\], got \(2, 9\)"),
    ],
)
def test_score_names_a_bad_argument(model, ids, changes, message):
    with pytest.raises(ValueError, match=message):
        score(**{"model": model, "input_ids": ids, "make_cache": DynamicCache, "prompt_length": PROMPT, **changes})


def test_score_refuses_a_reference_of_another_text(model, ids):
    reference = score(model, ids[:, :250], DynamicCache, PROMPT)
    with pytest.raises(ValueError, match="reference: expected the logits of 63 positions, got 49 positions"):
        score(model, ids, DynamicCache, PROMPT, reference=reference)


def test_decode_equals_generate(model, ids):
    question = ids[:, PROMPT : PROMPT + 8]
    got = decode(model, ids[:, :PROMPT], question, DynamicCache, 12)
    whole = model.generate(ids[:, : PROMPT + 8], max_new_tokens=12, min_new_tokens=12, do_sample=False)
    # generate suppresses the end token, which this loop does not
    assert got.tokens == whole[0, PROMPT + 8 :].tolist() or 256 in got.tokens
    assert len(got.tokens) == 12 and len(got.step_seconds) == 11
    assert got.cache.get_seq_length() == PROMPT + 8 + 11
    assert got.prefill_rate > 0 and got.decode_rate > 0


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_passkey_stands_once_in_a_prompt_of_the_same_length(depth):
    tokenizer = byte_tokenizer()
    text = tokenize(tokenizer, standard_text(), 500)
    hidden = hide_passkey(tokenizer, text, depth, seed=3)
    prompt = tokenizer.decode(hidden.prompt[0])
    assert hidden.prompt.shape == (1, 500)
    assert prompt.count(hidden.key) == 2 and len(hidden.key) == 5
    sentence = prompt[hidden.position :]
    assert sentence.startswith(f"\n\nThe pass key is {hidden.key}.")
    assert prompt[: hidden.position] + sentence[500 - hidden.text_tokens :] == tokenizer.decode(
        text[0, : hidden.text_tokens]
    )
    assert tokenizer.decode(hidden.question[0]) == "\n\nThe pass key is"


def test_passkey_is_found_only_at_the_start_of_an_answer():
    tokenizer = byte_tokenizer()
    hidden = hide_passkey(tokenizer, tokenize(tokenizer, standard_text(), 300))
    assert hidden.found_in(f" {hidden.key}. Remember")
    assert hidden.found_in(" ".join(hidden.key))
    assert not hidden.found_in(f" 1{hidden.key}")
    assert not hidden.found_in("")


def test_passkey_names_a_bad_argument():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="depth: expected 0 to 1, got 1.5"):
        hide_passkey(tokenizer, torch.zeros(1, 500, dtype=torch.long), 1.5)
    with pytest.raises(ValueError, match="text_ids: expected more than .* tokens, got 10"):
        hide_passkey(tokenizer, torch.zeros(1, 10, dtype=torch.long))


@pytest.mark.parametrize("name", ["prose", "code"])
def test_standard_text_is_long(name):
    assert len(standard_text(name)) > 60_000


def test_standard_text_names_a_bad_argument():
    with pytest.raises(ValueError, match="name: expected 'prose' or 'code', got 'poem'"):
        standard_text("poem")
    with pytest.raises(ValueError, match="text: expected at least 100 tokens, got 5"):
        tokenize(byte_tokenizer(), "short", 100)
