"""A prompt that was read once and is shown to caches: they hold what they would hold had the model read it to them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, LlamaConfig, Qwen3NextConfig

from hf_kvcompress.harness.specs import CacheSpec
from hf_kvcompress.measure import tensor_bytes
from hf_kvcompress.scoring import decode, score
from hf_kvcompress.scoring.replay import Prompt

SMALL = dict(
    vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, initializer_range=0.3, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "sliding": Gemma3TextConfig(**SMALL, sliding_window=48, layer_types=["sliding_attention", "full_attention"] * 2),
}
SPECS = (
    "balanced", "tiny", "int8/int4", "kivi4:group_size=32", "turbo2", "CPACCache", "HierarchicalCache:ratio=0.25",
    "h2o:budget=0.5,codec=int8,sliding=evict", "snapkv:budget=0.25", "TOVACache:budget=104",
    "rkv:budget=0.5,merge=true",
    "expected:budget=0.5,demote_to=eqrot2", "keydiff:budget=0.25,head_budget=adaptive", "random:budget=0.25",
    "balanced:quality_guard=0.05",
)  # fmt: skip
PROMPT, TOTAL = 150, 182


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return model_of(CONFIGS[request.param])


@pytest.fixture(scope="module")
def ids():
    return torch.randint(200, (1, TOTAL), generator=torch.Generator().manual_seed(1))


def both(model, ids, entrant):
    """Scores of a cache that the model prefilled, and of one that was shown the prompt; and what each then decodes."""
    prompt = Prompt(model, ids[:, : PROMPT + 1])
    found = []
    with entrant.around(model):
        for make, held in ((entrant.make, False), (lambda: prompt.through(entrant.make), True)):
            own = score(model, ids, make, PROMPT, 8, prefilled=held)
            tokens = decode(model, ids[:, :PROMPT], prompt.last, make, 6, prefilled=held).tokens
            found.append((own, tokens))
    return prompt, *found


@pytest.mark.parametrize("spec", SPECS)
def test_a_cache_that_was_shown_a_prompt_is_one_that_read_it(model, ids, spec):
    prompt, read, shown = both(model, ids, CacheSpec.parse(spec).entrant(model.config))
    assert prompt.is_whole
    torch.testing.assert_close(shown[0].nll, read[0].nll, atol=1e-5, rtol=1e-5)
    assert shown[1] == read[1] and shown[0].cache.nbytes == read[0].cache.nbytes
    assert shown[0].cache.get_seq_length() == read[0].cache.get_seq_length() == TOTAL - 1


def test_an_uncompressed_one_equals_to_the_last_bit(model, ids):
    _, read, shown = both(model, ids, CacheSpec("none").entrant(model.config))
    assert torch.equal(shown[0].nll, read[0].nll) and shown[1] == read[1]
    assert tensor_bytes(shown[0].cache) == tensor_bytes(read[0].cache)


class RoundsAtOnce(DynamicCache):
    """The prompt's own queries see rounded keys already: their outputs differ from the uncompressed model's."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return super().update(key_states.round(decimals=0), value_states, layer_idx, *args, **kwargs)


def test_a_cache_that_changes_the_prompt_itself_is_prefilled_by_the_model(model, ids):
    made = []

    class Entrant:
        around = CacheSpec("none").entrant(model.config).around

        @staticmethod
        def make():
            made.append(RoundsAtOnce(config=model.config))
            return made[-1]

    prompt, read, shown = both(model, ids, Entrant)
    assert prompt.is_whole and torch.equal(shown[0].nll, read[0].nll)
    deep = prompt.into(RoundsAtOnce(config=model.config)).layers[3].keys
    assert not torch.equal(deep, shown[0].cache.layers[3].keys[:, :, : deep.shape[2]]), "calls would not do here"


def test_a_model_that_keeps_more_than_keys_and_values_reads_the_prompt_itself(ids):
    own = {**SMALL, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    config = Qwen3NextConfig(
        **own, linear_value_head_dim=8, num_experts=0, layer_types=["linear_attention", "full_attention"] * 2
    )
    model = model_of(config)
    prompt, read, shown = both(model, ids, CacheSpec.parse("int8").entrant(model.config))
    assert not prompt.is_whole
    torch.testing.assert_close(shown[0].nll, read[0].nll, atol=1e-5, rtol=1e-5)
