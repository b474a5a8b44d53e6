"""The engine gives what `generate` gives one by one: in any order, under preemption, with prefix hits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcompress.paging.engine import PagedAttentionEngine
from hf_kvcompress.paging.pool import BlockPool
from hf_kvcompress.paging.sequences import Sampling
from hf_kvcompress.prefix.cache import PrefixCache

from ..conformance.helpers import BY_NAME
from ..conformance.prompts import text_ids
from ..prefix.helpers import llama, text
from ..tiny_model import byte_tokenizer

SYSTEM = text(70, 50)
PROMPTS = [SYSTEM + text(3 + 29 * i, i) if i % 2 else text(9 + 40 * i, i) for i in range(6)]
NEW = 24


@functools.cache
def expected(number: int, tokens: int = NEW) -> list[int]:
    ids = torch.tensor([PROMPTS[number]])
    return llama().generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :].tolist()


def engine(**options: Any) -> PagedAttentionEngine:
    options = {"codec": "identity", "residual_length": 16, "memory_gb": 0.01, **options}
    return PagedAttentionEngine(options.pop("model", llama()), options.pop("tokenizer", None), **options)


def assert_right(served: PagedAttentionEngine, order: list[int], tokens: int = NEW) -> None:
    got = served.generate([PROMPTS[number] for number in order], max_tokens=tokens)
    assert got == [expected(number, tokens) for number in order]
    while served.resident.drop_oldest():
        pass
    assert served.pool.used_blocks == 0


@pytest.mark.parametrize("options", [{}, {"max_batch": 2}, {"prefill": 16}, {"block_size": 8}], ids=str)
def test_a_batch_gives_what_generate_gives(options: dict[str, Any]) -> None:
    assert_right(engine(**options), list(range(6)))


@settings(max_examples=8)
@given(
    order=st.permutations(range(6)),
    batch=st.integers(1, 5),
    prefix=st.booleans(),
    preemption=st.sampled_from(["offload", "recompute"]),
    blocks=st.integers(60, 140),
)
def test_any_order_batch_and_pool(order: list[int], batch: int, prefix: bool, preemption: str, blocks: int) -> None:
    pool = BlockPool("kv", blocks, 8192)
    served = engine(pool=pool, max_batch=batch, prefix_cache=prefix or None, preemption=preemption)
    assert_right(served, order[:4])


@pytest.mark.parametrize("preemption", ["offload", "recompute"])
def test_preempted_sequences_go_on(preemption: str) -> None:
    """Short prompts are admitted together and grow until the pool is full."""
    pool = BlockPool("kv", 34, 8192)
    served = engine(pool=pool, preemption=preemption)
    got = served.generate([PROMPTS[number] for number in (0, 2, 1)], max_tokens=150)
    assert served.stats.preemptions > 0
    assert got == [expected(number, 150) for number in (0, 2, 1)]
    assert pool.used_blocks == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "deepseek_v3", "gemma3n"])
def test_compressed_rows_equal_the_rows_alone(name: str) -> None:
    """Lossy pages, sliding windows, shared layers: a sequence gets the same beside others as alone."""
    model = BY_NAME[name].model
    prompts = [text_ids(1, length, length)[0].tolist() for length in (61, 23, 97)]
    served = engine(model=model, codec="int4", block_size=8, residual_length=8)
    alone = [served.generate([ids], max_tokens=20)[0] for ids in prompts]
    assert served.generate(prompts, max_tokens=20) == alone
    assert engine(model=model, codec="int4", block_size=8, residual_length=8, max_batch=2).generate(
        prompts[::-1], max_tokens=20
    ) == alone[::-1]  # fmt: skip


def test_prefixes_are_read_once_and_their_blocks_shared() -> None:
    prompts = [SYSTEM * 12 + text(5 + i, i) for i in range(5)]
    served = engine(prefix_cache=PrefixCache(1, block_size=16))
    assert served.prefixes is not None
    got = served.generate(prompts, max_tokens=8)
    stats = served.prefixes.store.stats
    assert stats.hits == 4 and stats.tokens_reused >= 4 * 832
    without = engine()
    assert got == without.generate(prompts, max_tokens=8)
    assert served.stats.peak_bytes < 0.45 * without.stats.peak_bytes  # the prefix itself is counted, too
    again = served.generate(prompts, max_tokens=8)
    assert again == got and stats.hits == 9


def test_tokens_stream_as_they_come() -> None:
    served = engine(tokenizer=byte_tokenizer())
    pieces = list(served.stream(PROMPTS[:3], max_tokens=6))
    assert [piece.prompt for piece in pieces[:1]] == [0] and len(pieces) == 18
    for number in range(3):
        own = [piece for piece in pieces if piece.prompt == number]
        assert [piece.token for piece in own] == expected(number)[:6]
        assert [piece.last for piece in own] == [False] * 5 + [True]
        assert all(isinstance(piece.text, str) for piece in own)
    started = served.stream(PROMPTS[:2], max_tokens=6)
    next(started)
    with pytest.raises(RuntimeError, match="engine: it is serving other prompts"):
        next(served.stream(PROMPTS[:1]))
    started.close()
    assert served.generate(PROMPTS[:1], max_tokens=6) == [expected(0)[:6]]


def test_end_tokens_texts_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    stop = expected(0)[3]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [stop, 999]
    try:
        assert engine().generate(PROMPTS[:1], max_tokens=9) == [expected(0)[: expected(0).index(stop) + 1]]
    finally:
        model.generation_config.eos_token_id = before
    served = engine(tokenizer=byte_tokenizer(), codec="int4")
    answers = served.generate(["What is a cache? " * 20, "Why? " * 50], max_tokens=5, progress=True)
    assert all(isinstance(answer, str) for answer in answers) and "2/2" in capsys.readouterr().err
    report = served.report()
    assert report["generated_tokens"] == 10 and report["tokens_per_second"] > 0
    assert 0 < report["first_token_seconds"] <= report["first_token_seconds_p95"]
    assert report["memory_savings"] == served.memory_savings == 1 - report["peak_bytes"] / report["peak_dense_bytes"]
    assert served.memory_savings > 0.2


def test_sampling_does_not_depend_on_the_batch() -> None:
    options = {"max_tokens": 12, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 5}
    together = engine().generate(PROMPTS[:4], **options)
    assert together == engine(max_batch=2).generate(PROMPTS[:4], **options)
    assert together != engine().generate(PROMPTS[:4], max_tokens=12)
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 5.0, 4.0, -1.0])
    assert {Sampling(1.0, top_k=1).choose(logits, generator) for _ in range(9)} == {1}
    assert {Sampling(1.0, top_p=0.5).choose(logits, generator) for _ in range(9)} == {1}
    assert {Sampling(5.0, top_k=2).choose(logits, generator) for _ in range(60)} == {1, 2}


def test_bad_arguments_are_named() -> None:
    for options, message in (
        ({"block_size": 12}, "block_size: expected one of 8, 16, 32, 64, 128"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization: expected a part above 0"),
        ({"max_batch": 0}, "max_batch: expected a whole number"),
        ({"preemption": "kill"}, "preemption: expected one of offload, recompute"),
        ({"policy": "h2o", "budget": 100}, "policy: expected none"),
        ({"model": BY_NAME["qwen3_next"].model}, "model: expected one whose layers all have keys and values"),
        ({"memory_gb": 1e9}, "size_gb: expected at most"),
    ):
        with pytest.raises(ValueError, match=message):
            engine(**options)
    with pytest.raises(ValueError, match=r"prompts: expected what 20 blocks can hold, got 'one that takes \d+ blocks"):
        engine(pool=BlockPool("kv", 20, 8192)).generate([text(400)])
    for prompts, message in (([[]], "prompts: expected at least one token"), (["a"], "prompts: expected token ids")):
        with pytest.raises(ValueError, match=message):
            engine().generate(prompts)
    for name, value in (("temperature", -1), ("top_p", 0), ("top_k", -1)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            engine().generate(PROMPTS[:1], **{name: value})
    with pytest.raises(ValueError, match="max_tokens: expected"):
        engine().generate(PROMPTS[:1], max_tokens=0)
