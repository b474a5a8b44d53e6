"""Decode speed of one attention layer on CPU: update + attention for a new token, against transformers' own caches.

    python eval/bench_decode.py --tokens 4096 16384 65536 --json docs/bench_decode.json

A layer of Llama-8B's shape (32 query heads, 8 key-value heads, head size 128) in bf16. Every figure is a median over
steps; a ratio is of a step to DynamicCache's step taken right after it. "extra" is the most memory that a step takes
above what is held before it, as a part of the layer's uncompressed keys and values.
"""

from __future__ import annotations

import argparse
import functools
import json
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
from hf_kvcompress.calibrating import calibration_of_keys
from hf_kvcompress.environment import devices, versions

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


@functools.cache
def calibration() -> kvc.Calibration:
    """For the codecs that need one: of keys like those drawn here."""
    keys = draw(512, torch.Generator().manual_seed(2))[1].float()
    return calibration_of_keys(model_config(), keys[0].flatten(0, 1))


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
            makers[name] = lambda name=name: kvc.CompressedCache(model_config(), codec=name, calibration=calibration())
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


class Runner:
    """One cache with a stored prompt, and the steps it takes."""

    def __init__(self, make: Callable[[], transformers.Cache], tokens: int):
        generator = torch.Generator().manual_seed(0)
        self.module, self.cache = Module(), make()
        queries, keys, values = draw(tokens, generator)
        started = time.perf_counter()
        self.cache.update(keys, values, 0)
        if isinstance(self.cache, kvc.CompressedCache):
            self.cache.layers[0].observe_queries(queries[:, :, -64:], DIM**-0.5)
            self.cache.commit()
        self.prompt_seconds = time.perf_counter() - started

    def seconds(self, token: tuple[torch.Tensor, ...]) -> float:
        started = time.perf_counter()
        step(self.cache, self.module, *token)
        return time.perf_counter() - started


def bench(base: Runner, make: Callable[[], transformers.Cache], tokens: int, steps: int) -> dict[str, object]:
    """Steps of a cache and of DynamicCache in turn, so that a machine whose speed drifts does not favour either."""
    runner = Runner(make, tokens)
    fresh = draw(steps + 4, torch.Generator().manual_seed(1))
    one = [tuple(x[:, :, i : i + 1] for x in fresh) for i in range(steps + 4)]
    for token in one[:3]:
        base.seconds(token), runner.seconds(token)
    pairs = [(runner.seconds(token), base.seconds(token)) for token in one[3:-1]]
    uncompressed = (tokens + steps) * HEADS * DIM * 2 * 2
    extra = extra_memory(lambda: step(runner.cache, runner.module, *one[-1]))
    ratios = statistics.quantiles([ours / theirs for ours, theirs in pairs], n=4)
    return {
        "step_ms": statistics.median(ours for ours, _ in pairs) * 1e3,
        "dynamic_ms": statistics.median(theirs for _, theirs in pairs) * 1e3,
        "ratio": ratios[1],
        "ratio_quartiles": [ratios[0], ratios[2]],
        "store_prompt_ms": runner.prompt_seconds * 1e3,
        "extra_memory_part": extra / uncompressed,
        "bits": kvc.tensor_bytes(runner.cache) * 8 / (uncompressed / 2),
    }


def markdown(results: list[dict]) -> str:
    """Ratio (quartiles) by cache and length, with the bits and extra memory of the longest."""
    lengths = sorted({row["tokens"] for row in results})
    lines = ["| cache | bits | " + " | ".join(f"{n:,} tokens" for n in lengths) + " | extra memory |"]
    lines.append("| --- " * (len(lengths) + 3) + "|")
    for name in dict.fromkeys(row["cache"] for row in results):
        rows = {row["tokens"]: row for row in results if row["cache"] == name}
        cells = ["{ratio:.2f} ({ratio_quartiles[0]:.2f}-{ratio_quartiles[1]:.2f})".format(**rows[n]) for n in lengths]
        last = rows[lengths[-1]]
        lines.append(f"| {name} | {last['bits']:.2f} | {' | '.join(cells)} | {last['extra_memory_part']:.1%} |")
    dynamic = [statistics.median(row["dynamic_ms"] for row in results if row["tokens"] == n) for n in lengths]
    lines.append("| DynamicCache, ms a step | 16.00 | " + " | ".join(f"{ms:.1f}" for ms in dynamic) + " | 100% |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--caches", nargs="+", default=["quanto4", *kvc.PRESETS, *kvc.codec_names()])
    parser.add_argument("--markdown", action="store_true", help="also print the ratios as a Markdown table")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: list[dict] = []
    header = ("tokens", 7), ("cache", 14), ("step ms", 9), ("Dynamic", 9), ("ratio", 7), ("quartiles", 13), ("extra", 7)
    print(" ".join(f"{name:>{width}}" for name, width in (*header, ("bits", 6), ("prompt ms", 9))))
    makers = make_caches(options.caches)
    with torch.inference_mode():
        for tokens in options.tokens:
            base = Runner(make_caches(["DynamicCache"])["DynamicCache"], tokens)
            for name, make in makers.items():
                row = {"tokens": tokens, "cache": name, **bench(base, make, tokens, options.steps)}
                results.append(row)
                low, high = row["ratio_quartiles"]
                print(
                    f"{tokens:7} {name:>14} {row['step_ms']:9.2f} {row['dynamic_ms']:9.2f} {row['ratio']:7.3f} "
                    f"{f'{low:.3f}-{high:.3f}':>13} {row['extra_memory_part']:7.1%} {row['bits']:6.2f} "
                    f"{row['store_prompt_ms']:9.1f}",
                    flush=True,
                )
    if options.markdown:
        print(markdown(results))
    if options.json:
        report = {"versions": versions(), "devices": devices(), "settings": vars(options), "results": results}
        options.json.write_text(json.dumps(report, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
