"""What strategies cost beside the plain codec: storing 1,000 tokens, sealing a page, a decode step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_kvcompress as kvc
from hf_kvcompress.attention import kvcompress_attention
from hf_kvcompress.calibrating import calibration_of_keys

from .attention import HEADS, QUERY_HEADS, Module
from .timing import Bench

CHUNK = 512  # tokens of a pass of the prompt
PLAIN = "eqrot4"


def makers(config: LlamaConfig, dim: int) -> dict[str, Callable[[], Cache]]:
    """An empty cache of each kind; the second one is what the strategies are held against."""
    calibration = calibration_of_keys(config, torch.randn(2048, dim, generator=torch.Generator().manual_seed(1)))
    return {
        "DynamicCache": lambda: DynamicCache(config=config),
        PLAIN: lambda: kvc.CompressedCache(config, codec=PLAIN),
        "CPACCache": lambda: kvc.CPACCache(config, codec=PLAIN),
        "HierarchicalCache": lambda: kvc.HierarchicalCache(config, ratio=0.25),
        "TransformCache": lambda: kvc.TransformCache(config, calibration=calibration, bits=2),
    }


def run(bench: Bench, seed: int = 0, lengths: tuple[int, ...] = (4096, 32768)) -> Iterator[dict[str, Any]]:
    """A row for each cache and length: one layer, keys and values drawn anew, so that no page is like another."""
    dim = 64 if bench.dry else 128
    shape = {"hidden_size": QUERY_HEADS * dim, "num_attention_heads": QUERY_HEADS, "num_key_value_heads": HEADS}
    config = LlamaConfig(**shape, num_hidden_layers=1)
    for tokens in (150,) if bench.dry else lengths:
        plain: dict[str, Any] = {}
        for name, make in makers(config, dim).items():
            if bench.seconds_left < 0:
                return
            row: dict[str, Any] = {"cache": name, "tokens": tokens}
            try:
                row |= measure(bench, make(), tokens, dim, seed)
            except RuntimeError as error:
                yield row | {"error": str(error)[:300]}
                continue
            plain = row if name == PLAIN else plain
            if plain:
                for what in ("store_ms_per_1000", "page_ms"):
                    row[f"{what}_more"] = row[what] - plain[what]
            yield row
            bench.free()


def measure(bench: Bench, cache: Cache, tokens: int, dim: int, seed: int) -> dict[str, Any]:
    """Milliseconds of storing 1,000 tokens, of a step, and of what a step that seals a page takes on top.

    The prompt comes in passes, each with its attention; the attention is the same in all caches that pack.
    """
    generator = torch.Generator(bench.device).manual_seed(seed)
    dtype = torch.float32 if bench.dry else torch.bfloat16
    attention = sdpa_attention_forward if isinstance(cache, DynamicCache) and not _ours(cache) else kvcompress_attention
    module = Module(0)

    def step(count: int) -> float:
        keys, values, queries = (
            torch.randn(1, heads, count, dim, generator=generator, device=bench.device, dtype=dtype)
            for heads in (HEADS, HEADS, QUERY_HEADS)
        )
        bench.wait()
        begin = _now(bench)
        handles = cache.update(keys, values, 0)
        attention(module, queries, *handles, None, scaling=dim**-0.5)
        if _ours(cache):
            cache.commit()
        bench.wait()
        return (_now(bench) - begin) * 1e3

    chunk = min(CHUNK, tokens)
    prompt = [step(chunk) for _ in range(0, tokens, chunk)]
    steps = [step(1) for _ in range(34 if bench.dry else 130)][2:]  # a page is sealed every 32 steps
    usual = statistics.median(steps)
    page = sum(steps) - usual * len(steps)
    return {
        "store_ms_per_1000": sum(prompt) / (len(prompt) * chunk) * 1000,
        "step_ms": usual,
        "page_ms": max(page, 0.0) / (len(steps) // 32),
    }


def _ours(cache: Cache) -> bool:
    return isinstance(cache, kvc.CompressedCache)


def _now(bench: Bench) -> float:
    """On a CPU the time that this process had, whoever else uses the machine."""
    return time.perf_counter() if bench.device.type == "cuda" else time.process_time()
