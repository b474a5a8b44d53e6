"""Attention by page is what the model really pays, whatever the cache does with its tokens."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

import hf_kvcompress as kvc
from hf_kvcompress.enable import watching
from hf_kvcompress.scoring.oracle import attention_weights

from .helpers import PROMPT, SMALL, compressed, generate, model, plain, prompt

PAGE = 8


@pytest.fixture(scope="module")
def llama():
    return model()


def by_page(weights, page=PAGE):
    """Weights `[Hq, T]` of four query heads over two key-value heads -> mass `[2, pages]`."""
    heads = weights.unflatten(0, (2, 2)).mean(1)
    pages = -(-heads.shape[1] // page)
    return torch.nn.functional.pad(heads, (0, pages * page - heads.shape[1])).unflatten(1, (pages, page)).sum(2)


def true_masses(own, tokens):
    """What each pass's newest query pays without compression, by layer and positions seen."""
    found = {}

    def watch(call):
        weights = attention_weights(call)[:, -1]
        found[call.layer, weights.shape[1]] = by_page(weights)

    with watching(own, watch):
        generate(own, plain(own), tokens)
    return found


@pytest.mark.parametrize(
    "kind", ["dynamic-sdpa", "dynamic-enabled", "identity-sdpa", "identity-enabled", "h2o-unlimited"]
)
def test_masses_are_the_model_s_own(llama, kind, every_pass):
    expected = true_masses(llama, 12)
    if kind.startswith("dynamic"):
        cache = plain(llama)
    elif kind.startswith("identity"):
        cache = compressed(llama, codec="identity")
    else:
        cache = compressed(llama, codec="identity", policy="h2o", budget=4096)
    if not kind.endswith("sdpa"):
        kvc.enable(llama)
    with kvc.monitor(cache, model=llama, page_size=PAGE) as seen:
        generate(llama, cache, 12)
    kvc.disable(llama)
    number = 0
    for (layer, head), series in seen.recording.masses.items():
        for own in series:
            torch.testing.assert_close(own.mass, expected[layer, own.seen][head], atol=2e-4, rtol=0)
            assert int(own.held.sum()) == own.seen
            number += 1
    assert number >= 2 * 10, "one layer a pass, two heads of it"


def test_packed_masses_are_near(llama, every_pass):
    expected = true_masses(llama, 8)
    cache = compressed(llama, codec="int8")
    with kvc.enable(llama), kvc.monitor(cache, page_size=PAGE) as seen:
        generate(llama, cache, 8)
    first = seen.recording.masses[0, 0][0]
    assert float((first.mass - expected[0, first.seen][0]).abs().max()) < 0.02


def test_evicted_tokens_are_counted_out(llama, every_pass):
    cache = compressed(llama, policy="streaming", codec="identity", budget=48)
    with kvc.enable(llama), kvc.monitor(cache, page_size=PAGE) as seen:
        generate(llama, cache, 12)
    last = seen.recording.masses[0, 0][-1]
    assert len(last.mass) == -(-last.seen // PAGE), "pages stand for positions, also of tokens that are gone"
    assert int(last.held.sum()) <= 48 + 2 * PAGE < last.seen
    assert last.held[0] == 2 and not last.held[2:6].any(), "the sinks are there, what follows them is not"
    assert not last.mass[2:6].any() and float(last.mass.sum()) == pytest.approx(1, abs=1e-4)
    step = seen.recording.steps[-1]
    assert step["tokens_held"] < step["seen"] and step["tokens_evicted"] > 0


@pytest.mark.filterwarnings("ignore:importance")
def test_host_memory_is_not_read_for_a_monitor(llama, every_pass):
    def make():
        return compressed(llama, policy="snapkv", budget=48, demote_to="cpu", codec="identity")

    alone, cache = make(), make()
    with kvc.enable(llama):
        generate(llama, alone)
        with kvc.monitor(cache) as seen:
            generate(llama, cache)
    assert "host memory" in " ".join(seen.report().notes())
    for a, b in zip(alone.layers, cache.layers, strict=True):
        for x, y in zip(a.storage.tensors(), b.storage.tensors(), strict=True):
            assert torch.equal(x, y), "what is hot there, and all else, is as without a monitor"


def test_padding_gets_nothing(llama, every_pass):
    ids = torch.cat([prompt(40), prompt(40, seed=5)])
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    for cache in (compressed(llama), plain(llama)):
        with kvc.enable(llama), kvc.monitor(cache, page_size=PAGE) as seen:
            generate(llama, cache, 4, ids=ids, attention_mask=mask)
        for own in seen.recording.masses[0, 0]:
            assert not own.mass[:2].any() and float(own.mass.sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2"])
def test_sink_logits_and_soft_caps(kind, every_pass):
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 64, "initializer_range": 0.3}
    if kind == "gpt_oss":
        own = GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)).eval()
        for layer in own.model.layers:
            layer.self_attn.sinks.data.fill_(20.0)
    else:
        own = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_logit_softcapping=1.0)).eval()
    expected = true_masses(own, 8)
    for cache in (kvc.CompressedCache(own.config, **SMALL, codec="identity"), plain(own)):
        with kvc.enable(own), kvc.monitor(cache, page_size=PAGE) as seen:
            generate(own, cache, 8)
        full = [mass for lane, series in seen.recording.masses.items() if lane[0] == 1 for mass in series]
        assert full
        for mass in full:
            torch.testing.assert_close(mass.mass, expected[1, mass.seen][mass.head], atol=2e-4, rtol=0)
            total = float(mass.mass.sum())
            assert total < 0.99 if kind == "gpt_oss" else total == pytest.approx(1, abs=1e-4)


def test_without_queries_pages_are_described_and_the_report_says_so(llama, every_pass):
    cache = plain(llama)
    with kvc.monitor(cache, page_size=PAGE) as seen:
        generate(llama, cache)
    assert not seen.recording.masses
    assert "Attention was not visible" in repr(seen) and "not visible" in seen._repr_html_()
    pages = seen.recording.pages[0, 0]
    assert sorted(pages) == list(range((PROMPT + 15) // PAGE)), "every whole page, once"
    keys = cache.layers[0].keys[0, 0, : PAGE * len(pages)].unflatten(0, (-1, PAGE))
    norms = torch.stack([pages[number]["key_norm"] for number in sorted(pages)])
    torch.testing.assert_close(norms, keys.flatten(1).norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["identity", "paged", "lanes"])
def test_page_features_are_those_of_the_tokens(llama, name, every_pass):
    make = {
        "identity": lambda: compressed(llama, codec="identity"),
        "paged": lambda: kvc.PagedCache(llama.config, **SMALL, codec="identity"),
        "lanes": lambda: compressed(llama, codec="identity", policy="h2o", budget=4096),
    }[name]
    reference, cache = plain(llama), make()
    with kvc.enable(llama):
        generate(llama, reference)
        with kvc.monitor(cache, page_size=PAGE) as seen:
            generate(llama, cache)
    for (layer, head), pages in seen.recording.pages.items():
        assert sorted(pages) == list(range((PROMPT + 15) // PAGE))
        values = reference.layers[layer].values[0, head, : PAGE * len(pages)].unflatten(0, (-1, PAGE))
        norms = torch.stack([pages[number]["value_norm"] for number in sorted(pages)])
        torch.testing.assert_close(norms, values.flatten(1).norm(dim=1), rtol=1e-4, atol=0)
