"""Masks are evaluated at the positions that are stored: rarer ones here, the usual ones in the conformance suite."""

from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_kvcompress as kvc

SMALL = {"codec": "identity", "page_size": 8, "residual_length": 8, "sink_length": 2}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def steps(model, cache, ids, masks, lengths):
    """Logits of a text fed in pieces of the given lengths, each with the mask that `masks(seen)` gives."""
    out, seen = [], 0
    with torch.inference_mode():
        for length in lengths:
            chunk, seen = ids[:, seen : seen + length], seen + length
            out.append(model(chunk, attention_mask=masks(seen, length), past_key_values=cache).logits)
    return torch.cat(out, 1)


def compare(model, ids, masks, lengths, where=None):
    expected = steps(model, DynamicCache(config=model.config), ids, masks, lengths)
    with kvc.enable(model):
        cache = kvc.CompressedCache(model.config, **SMALL)
        got = steps(model, cache, ids, masks, lengths)
    difference = (got - expected).abs().amax(-1)
    assert float((difference if where is None else difference[where]).max()) < 1e-5
    return cache


IDS = torch.randint(2, 60, (2, 48), generator=torch.Generator().manual_seed(1))
LENGTHS = (23, 1, 1, 14, 1, 8)


def test_padding_between_prefix_and_suffix(model):
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[0, 15:21] = 0
    mask[1, 23:30] = 0
    cache = compare(model, IDS, lambda seen, _: mask[:, :seen], LENGTHS, mask.bool())
    assert cache.layers[0].storage.positions.counts == [42, 41], "padding takes no slot"


def test_a_prompt_that_is_padding_only_for_a_while(model):
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[0, :30] = 0
    cache = compare(model, IDS, lambda seen, _: mask[:, :seen], (10, 10, 10, 10, 1, 7), mask.bool())
    assert cache.layers[0].storage.positions.counts == [18, 48]


def test_old_tokens_hidden_later(model):
    def masks(seen, _):
        mask = torch.ones(2, seen, dtype=torch.long)
        if seen > 30:
            mask[1, 3:9] = 0
        return mask

    compare(model, IDS, masks, LENGTHS)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_4d_mask_of_the_users_own(model, kind):
    allowed = torch.rand(2, 1, 48, 48, generator=torch.Generator().manual_seed(2)) < 0.7
    allowed = (allowed & torch.ones(48, 48, dtype=torch.bool).tril()) | torch.eye(48, dtype=torch.bool)

    def masks(seen, length):
        own = allowed[:, :, seen - length : seen, :seen]
        return own if kind == "boolean" else torch.where(own, 0.0, torch.finfo(torch.float32).min)

    compare(model, IDS, masks, LENGTHS)


def test_a_function_that_only_works_index_by_index(model):
    """Such functions are mapped over single indices, as transformers does."""
    from transformers.masking_utils import create_causal_mask

    blocks = torch.tensor([0] * 10 + [1] * 20 + [2] * 18)

    def same_block(batch, head, query, key):
        return blocks[query] == blocks[key]

    def masks(seen, length):
        embeds = torch.zeros(2, length, 32)
        past = cache_of[0]
        return create_causal_mask(model.config, embeds, None, past_key_values=past, and_mask_function=same_block)

    def run(cache):
        cache_of[:] = [cache]
        return steps(model, cache, IDS, masks, LENGTHS)

    cache_of: list = []
    expected = run(DynamicCache(config=model.config))
    with kvc.enable(model):
        got = run(kvc.CompressedCache(model.config, **SMALL))
    assert float((got - expected).abs().max()) < 1e-5


def test_many_queries_are_taken_in_blocks(model, monkeypatch):
    monkeypatch.setattr("hf_kvcompress.packed_attention.SCORES", 2 * 4 * 2048 * 5)
    mask = torch.ones(2, 48, dtype=torch.long)
    compare(model, IDS, lambda seen, _: mask[:, :seen], (20, 28))


@pytest.mark.parametrize("enabled", [False, True])
def test_a_compiled_model_gives_the_same(model, enabled):
    """The cache breaks the graph and is left as it is; only the backend of the rest is compiled."""
    prompt = IDS[:1, :30]
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    context = kvc.enable(model) if enabled else nullcontext()
    plain = model.forward
    with context:
        try:
            model.forward = torch.compile(plain, backend="eager")
            cache = kvc.CompressedCache(model.config, **SMALL)
            got = model.generate(prompt, max_new_tokens=6, do_sample=False, past_key_values=cache)
        finally:
            model.forward = plain
            torch._dynamo.reset()
    assert torch.equal(got, expected) and cache.stats()["compressed_pages"] > 0


def test_gradients_flow_through_a_first_pass(model):
    with kvc.enable(model), torch.enable_grad():
        embeds = torch.randn(1, 12, 32, requires_grad=True)
        model(inputs_embeds=embeds, past_key_values=kvc.CompressedCache(model.config)).logits.sum().backward()
    assert float(embeds.grad.abs().sum()) > 0
