"""Decode speed of one attention layer on CPU: update + attention for a new token, against transformers' own caches.

    python eval/bench_decode.py --tokens 4096 16384 65536 --json docs/bench_decode.json

A layer of Llama-8B's shape (32 query heads, 8 key-value heads, head size 128) in bf16. Every figure is a median over
steps; ratios are to DynamicCache in the same run. "extra" is the most memory that a step takes above what is held
before it, as a part of the layer's uncompressed keys and values.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_kvcompress as kvc
from hf_kvcompress.attention import kvcompress_attention

QUERY_HEADS, HEADS, DIM = 32, 8, 128


class Module(torch.nn.Module):
    """What an attention function reads from the module that calls it."""

    num_key_value_groups = QUERY_HEADS // HEADS
    is_causal = True
    layer_idx = 0


def model_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=QUERY_HEADS * DIM, num_attention_heads=QUERY_HEADS, num_key_value_heads=HEADS, num_hidden_layers=1
    )


def make_caches(names: list[str]) -> dict[str, Callable[[], transformers.Cache]]:
    """A factory a name: DynamicCache, quanto4, a preset or a codec."""
    makers: dict[str, Callable[[], transformers.Cache]] = {}
    for name in names:
        if name == "DynamicCache":
            makers[name] = lambda: DynamicCache(config=model_config())
        elif name == "quanto4":
            makers[name] = lambda: QuantizedCache("quanto", model_config(), nbits=4)
        elif name in kvc.PRESETS:
            makers[name] = lambda name=name: kvc.CompressedCache(model_config(), preset=name)
        else:
            makers[name] = lambda name=name: kvc.CompressedCache(model_config(), codec=name)
    return makers


def draw(tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values with channels of unequal mean and spread, as real keys have."""
    spread = torch.rand(1, HEADS, 1, DIM, generator=generator) * 4 + 0.2
    mean = torch.randn(1, HEADS, 1, DIM, generator=generator) * 3
    keys = torch.randn(1, HEADS, tokens, DIM, generator=generator) * spread + mean
    values = torch.randn(1, HEADS, tokens, DIM, generator=generator)
    queries = torch.randn(1, QUERY_HEADS, tokens, DIM, generator=generator)
    return queries.bfloat16(), keys.bfloat16(), values.bfloat16()


def step(cache, module, queries, keys, values) -> torch.Tensor:
    k, v = cache.update(keys, values, 0)
    attention = kvcompress_attention if isinstance(cache, kvc.CompressedCache) else sdpa_attention_forward
    return attention(module, queries, k, v, None, scaling=DIM**-0.5)[0]


def extra_memory(run: Callable[[], object]) -> int:
    """Most bytes allocated at once above what was there before `run`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def bench(make, tokens: int, steps: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    module, cache = Module(), make()
    queries, keys, values = draw(tokens, generator)
    started = time.perf_counter()
    k, v = cache.update(keys, values, 0)
    if isinstance(cache, kvc.CompressedCache):
        cache.layers[0].observe_queries(queries[:, :, -64:])
        cache.commit()
    prefill = time.perf_counter() - started
    del k, v, queries, keys, values
    times = []
    fresh = draw(steps + 2, generator)
    one = [tuple(x[:, :, i : i + 1] for x in fresh) for i in range(steps + 2)]
    for q, key, value in one[2:]:
        started = time.perf_counter()
        step(cache, module, q, key, value)
        times.append(time.perf_counter() - started)
    uncompressed = (tokens + steps) * HEADS * DIM * 2 * 2
    extra = extra_memory(lambda: step(cache, module, *one[0]))
    held = kvc.tensor_bytes(cache)
    quartiles = statistics.quantiles(times, n=4)
    return {
        "step_ms": statistics.median(times) * 1e3,
        "step_ms_quartiles": [quartiles[0] * 1e3, quartiles[2] * 1e3],
        "store_prompt_ms": prefill * 1e3,
        "extra_memory_part": extra / uncompressed,
        "bits": held * 8 / (uncompressed / 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--caches", nargs="+", default=["DynamicCache", "quanto4", *kvc.PRESETS, *kvc.codec_names()])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: list[dict] = []
    print(f"{'tokens':>7} {'cache':>14} {'step ms':>9} {'/ Dynamic':>9} {'extra':>7} {'bits':>6} {'prompt ms':>9}")
    with torch.inference_mode():
        for tokens in options.tokens:
            base = None
            for name, make in make_caches(options.caches).items():
                row = {"tokens": tokens, "cache": name, **bench(make, tokens, options.steps)}
                base = row["step_ms"] if name == "DynamicCache" else base
                row["ratio"] = row["step_ms"] / base if base else float("nan")
                results.append(row)
                print(
                    f"{tokens:7} {name:>14} {row['step_ms']:9.2f} {row['ratio']:9.3f} {row['extra_memory_part']:7.1%} "
                    f"{row['bits']:6.2f} {row['store_prompt_ms']:9.1f}",
                    flush=True,
                )
    if options.json:
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        options.json.write_text(
            json.dumps({"versions": versions, "settings": vars(options), "results": results}, default=str, indent=1)
        )


if __name__ == "__main__":
    main()
