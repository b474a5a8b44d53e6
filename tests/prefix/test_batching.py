"""Many questions behind one prefix in one batch give what each gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.prefix.batching import pad_between, prompts_of
from hf_kvcompress.prefix.cache import PrefixCache

from ..conformance.helpers import BY_NAME, KVCOMPRESS, attention
from ..conformance.prompts import text_ids
from .helpers import SMALL, llama, prefix_cache, text

QUESTIONS = [text(3, 1), text(29, 2), text(1, 3), text(16, 4)]


def _alone(store: PrefixCache, prefix_id: str, questions: list[list[int]], **options: Any) -> torch.Tensor:
    return torch.cat([store.generate_with_prefix(prefix_id, own, **options) for own in questions])


#: under sdpa padding keeps its slots, so rows differ by what a lossy codec rounds
WAYS = [("identity", False), *((codec, True) for codec in ("identity", "int4", "kivi2", "eqrot3"))]


@pytest.mark.parametrize("codec, enabled", WAYS, ids=str)
@pytest.mark.parametrize("length", [100, 96, 20])
def test_a_batch_equals_one_by_one(length: int, codec: str, enabled: bool) -> None:
    store = prefix_cache(codec=codec, remember=False)
    options = {"max_tokens": 20, "do_sample": False}
    with kvc.enable(llama()) if enabled else torch.no_grad():
        prefix_id = store.add_prefix(text(length))
        batch = store.generate_with_prefix(prefix_id, QUESTIONS, **options)
        assert torch.equal(batch, _alone(store, prefix_id, QUESTIONS, **options))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("gemma3", {"codec": "int4"}),
        ("mistral", {"codec": "identity"}),
        ("deepseek_v3", {"codec": "int8"}),
        ("llama", {"codec": "int4", "policy": "h2o", "budget": 40}),
        ("gemma3", {"codec": "int4", "policy": "snapkv", "budget": 40, "head_budget": "adaptive"}),
    ],
    ids=str,
)
def test_sliding_and_evicting_caches(name: str, settings: dict[str, Any]) -> None:
    questions = [text_ids(1, length, length)[0].tolist() for length in (5, 23, 11)]
    with attention(BY_NAME[name], KVCOMPRESS) as model:
        store = PrefixCache(1, model=model, cache={**SMALL, **settings}, remember=False)
        prefix_id = store.add_prefix(text_ids(1, 70)[0].tolist())
        options = {"max_tokens": 15, "do_sample": False}
        batch = store.generate_with_prefix(prefix_id, questions, **options)
        assert torch.equal(batch, _alone(store, prefix_id, questions, **options))


def test_padding_stands_between_prefix_and_suffix() -> None:
    ids, mask = pad_between([7, 8], [[1], [2, 3, 4]], pad=0)
    assert ids.tolist() == [[7, 8, 0, 0, 1], [7, 8, 2, 3, 4]]
    assert mask.tolist() == [[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert prompts_of([[1], [2, 3]]) == ([[1], [2, 3]], True) and prompts_of([1, 2]) == ([[1, 2]], False)
    assert prompts_of("a") == (["a"], False) and prompts_of(["a"]) == (["a"], True)


def test_one_prefix_is_read_once_for_a_batch() -> None:
    store = prefix_cache()
    prefix_id = store.add_prefix(text(100))
    store.generate_with_prefix(prefix_id, QUESTIONS, max_tokens=2, do_sample=False)
    assert store.store.stats.tokens_reused == 96 and len(store) == 1
