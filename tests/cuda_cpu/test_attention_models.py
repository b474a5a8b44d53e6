"""Models that generate with emulated attention kernels: the text must be that of the torch backend."""

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

import hf_kvcompress as kvc
from hf_kvcompress.ops import kernels

from ..tiny_model import tiny_llama
from .attention_helpers import emulate, kernel_of

SETTINGS = dict(residual_length=8, page_size=16, sink_length=2)


def padded(batch, length):
    """Prompts of different lengths, padded on the left."""
    torch.manual_seed(3)
    ids = torch.randint(0, 250, (batch, length))
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 11 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def texts(model, inputs, monkeypatch, make, **settings):
    """Logits of greedy decoding without kernels and with them, and the emulator that ran them."""
    found, emulator = [], emulate()
    monkeypatch.delenv("HF_KVCOMPRESS_BACKEND", raising=False)
    for launcher in (None, emulator):
        with kernels.emulate(launcher), kvc.enable(model), torch.no_grad():
            torch.manual_seed(0)
            out = model.generate(
                **inputs,
                past_key_values=make(),
                max_new_tokens=20,
                min_new_tokens=20,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
                **settings,
            )
        found.append((out.sequences, torch.stack(out.logits)))
    return found, emulator


def same(found, tolerance=2e-3):
    (tokens, logits), (own_tokens, own_logits) = found
    assert torch.equal(tokens, own_tokens)
    torch.testing.assert_close(own_logits, logits, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(head_dim=64)


@pytest.mark.parametrize("rows", [1, 3])
def test_llama(rows, llama, poisoned, monkeypatch):
    """A padded batch goes through masks, a single row through none."""
    found, emulator = texts(llama, padded(rows, 70), monkeypatch, lambda: kvc.CompressedCache(**SETTINGS))
    same(found)
    assert kernel_of(emulator) == "attention_mma"


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "keydiff"])
def test_evicted_tokens(policy, llama, poisoned, monkeypatch):
    def make():
        return kvc.CompressedCache(policy=policy, budget=60, head_budget="adaptive", **SETTINGS)

    found, emulator = texts(llama, padded(2, 100), monkeypatch, make)
    same(found)
    assert kernel_of(emulator) == "attention_mma"


def test_a_tail_with_another_codec(llama, poisoned, monkeypatch):
    def make():
        return kvc.CompressedCache(policy="h2o", budget=60, demote_to="int2", demote_budget=40, **SETTINGS)

    found, emulator = texts(llama, padded(1, 120), monkeypatch, make)
    same(found)
    codecs = {macros["VALUE_CODEC"] for macros in emulator.macros if "VALUE_CODEC" in macros}
    assert codecs == {54, 22}


def test_drafts(llama, poisoned, monkeypatch):
    """Prompt lookup reads several queries at once and takes some back."""
    inputs = {"input_ids": torch.randint(0, 250, (1, 9)).repeat(1, 6)}
    same(texts(llama, inputs, monkeypatch, lambda: kvc.CompressedCache(**SETTINGS), prompt_lookup_num_tokens=4)[0])


def test_sliding_windows_and_a_soft_cap(poisoned, monkeypatch):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"],
        attn_logit_softcapping=5.0,
        initializer_range=0.3,
    )
    model = Gemma3ForCausalLM(config).eval()
    same(texts(model, padded(2, 90), monkeypatch, lambda: kvc.CompressedCache(model.config, **SETTINGS))[0])


def test_other_caches_run_no_kernels(llama, poisoned, monkeypatch):
    _, emulator = texts(llama, padded(1, 30), monkeypatch, DynamicCache)
    assert not any(name.startswith("attention") for name in emulator.launches)
