"""Policies on the trained recall model: scores above Random, Oracle above all, pins and tiers keep what eviction loses.

Every share below is of 32 or more answers to fixed questions. A model that guesses gets 1 of 64, so that no margin here
is reached by accident: by chance two shares of 32 answers differ by a third once in hundreds of runs.
"""

import copy
from functools import cache

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_kvcompress as kvc
from hf_kvcompress.enable import watching
from hf_kvcompress.integrations.recall_model import load_recall_model, prefill, recall
from hf_kvcompress.integrations.recall_tasks import TASKS
from hf_kvcompress.scoring.oracle import FutureAttention, OraclePolicy, future_attention

SEEDS = range(4)
SETTINGS = {"codec": "identity", "page_size": 8, "residual_length": 8, "sink_length": 4, "recent": 0.25}


@cache
def model():
    return load_recall_model()


def oracle(task, seed):
    """A policy that knows what the questions of one context, with their right answers, attend to."""
    sample = task.make(seed)
    texts = [torch.cat([q, torch.tensor([a])], 1) for q, a in zip(sample.questions, sample.answers, strict=True)]
    full = prefill(model(), DynamicCache(config=model().config), sample, 32)
    return OraclePolicy(future_attention(model(), full, [torch.cat(texts, 1)] if task.sequential else texts, step=4))


@cache
def share(task, policy, budget, **settings):
    """Part of a task's answers that are right."""
    found = []
    with kvc.enable(model()):
        for seed in SEEDS:
            own = {**SETTINGS, **settings, "budget": budget}
            own["policy"] = oracle(TASKS[task], seed) if policy == "oracle" else policy
            found.append(
                recall(
                    model(), lambda own=own: kvc.CompressedCache(model().config, **own), TASKS[task], [seed], step=32
                )
            )
    return sum(found) / len(found)


# -- the model can do it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["filler", "mentioned", "dense", "near", "rule", "dormant"])
def test_the_full_cache_answers(task):
    assert share(task, "none", None) >= 0.95


# -- scores --------------------------------------------------------------------------------------------------------

#: policy, task, budget: where its score is made for; the margin is over Random on the same questions
SEPARATED = [
    ("h2o", "mentioned", 0.25),
    ("snapkv", "mentioned", 0.5),
    ("snapkv", "filler", 0.5),
    ("keydiff", "filler", 0.25),
    ("rkv", "filler", 0.25),
    ("rkv", "near", 0.25),
]


@pytest.mark.parametrize("policy, task, budget", SEPARATED)
def test_a_score_beats_a_random_choice(policy, task, budget):
    assert share(task, policy, budget) >= share(task, "random", budget) + 0.25


@pytest.mark.parametrize(
    "policy, task",
    [(policy, "dense") for policy in ("streaming", "h2o", "snapkv", "tova", "expected", "keydiff", "rkv")]
    + [("rkv", "near"), ("random", "filler")],
)
def test_nothing_is_above_the_oracle(policy, task):
    bound = share(task, "oracle", 0.25)
    assert bound >= 0.95  # it keeps what the questions need, so it is no vacuous bound
    assert share(task, policy, 0.25) <= bound
    assert share(task, "random", 0.25) <= bound - 0.4


def test_recency_loses_what_is_far_away():
    assert share("dormant", "streaming", 0.5) <= 0.1


@pytest.mark.parametrize("policy, options", [("snapkv", {"window_size": 4, "kernel_size": 1}), ("tova", {})])
def test_policies_that_look_at_queries_keep_what_the_prompt_asked_for(policy, options):
    """The context ends with a question: afterwards it can be asked again, while others find their tokens gone."""
    found = {True: [], False: []}
    with kvc.enable(model()):
        for seed in SEEDS:
            sample = TASKS["filler"].make(seed)
            pairs = list(zip(sample.questions, sample.answers, strict=True))[:3]
            for question, _ in pairs:
                settings = {**SETTINGS, "policy": policy, "policy_options": options, "budget": 0.25}
                held = kvc.CompressedCache(model().config, **settings)
                model()(torch.cat([sample.context, question], 1), past_key_values=held, logits_to_keep=1)
                for other, answer in pairs:
                    logits = model()(other, past_key_values=copy.deepcopy(held), logits_to_keep=1).logits
                    found[other is question].append(int(logits.argmax()) == answer[0])
    again, another = (sum(found[kind]) / len(found[kind]) for kind in (True, False))
    assert again >= another + 0.3


# -- what protects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["streaming", "random"])
def test_a_rule_at_the_start_is_lost_without_a_pin(policy):
    without, with_pin = (share("rule", policy, 0.25, sink_length=0, pin=pin) for pin in ((), ((0, 2),)))
    assert with_pin >= without + 0.2


@pytest.mark.parametrize("policy, tier", [("streaming", "cpu"), ("h2o", "int4")])
def test_a_dormant_needle_is_found_where_tokens_are_demoted(policy, tier):
    assert share("dormant", policy, 0.25) <= 0.6
    assert share("dormant", policy, 0.25, demote_to=tier) >= 0.9


# -- the oracle itself ---------------------------------------------------------------------------------------------


def tiny():
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval()


def test_future_attention_is_what_the_coming_queries_pay():
    made = tiny()
    ids = torch.randint(0, 50, (1, 40))
    before = DynamicCache(config=made.config)
    made(ids[:, :20], past_key_values=before)
    future = future_attention(made, before, [ids[:, 20:]], step=5)
    assert before.get_seq_length() == 20
    made.set_attn_implementation("eager")
    for layer, weights in enumerate(made(ids, output_attentions=True).attentions):
        for now in (0, 20, 21, 25, 26, 35, 36):
            first = -(-max(now - 20, 0) // 5) * 5 + 20  # of the first pass that begins there or later
            mass = weights[0, :, first:].sum(1).unflatten(0, (2, 2)).sum(1)
            torch.testing.assert_close(future.after(layer, now), mass, atol=1e-5, rtol=1e-5)


def test_texts_that_may_come_add_up():
    made = tiny()
    before = DynamicCache(config=made.config)
    made(torch.randint(0, 50, (1, 12)), past_key_values=before)
    texts = [torch.randint(0, 50, (1, 3)), torch.randint(0, 50, (1, 6))]
    both = future_attention(made, before, texts).after(1, 12)
    alone = [future_attention(made, before, [text]).after(1, 12) for text in texts]
    expected = alone[1].clone()
    expected[:, :15] += alone[0]
    torch.testing.assert_close(both, expected)


def test_a_watched_model_gets_its_attention_back():
    made = tiny()
    before = made.config._attn_implementation
    calls = []
    with pytest.raises(RuntimeError, match="stop"), watching(made, calls.append):
        made(torch.randint(0, 50, (1, 5)))
        raise RuntimeError("stop")
    assert made.config._attn_implementation == before
    assert [call.layer for call in calls] == [0, 1]
    made(torch.randint(0, 50, (1, 5)))
    assert len(calls) == 2


def test_the_oracle_refuses_what_it_did_not_see():
    made = tiny()
    with pytest.raises(ValueError, match="texts: expected"):
        future_attention(made, DynamicCache(config=made.config), [])
    with pytest.raises(ValueError, match="one row"), watching(made, FutureAttention()):
        made(torch.randint(0, 50, (2, 5)))
    with pytest.raises(ValueError, match="layer: expected one of"):
        FutureAttention().after(0, 0)
