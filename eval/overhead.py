"""What structured strategies cost on one core beside their codec, without a model.

    OMP_NUM_THREADS=1 python eval/overhead.py --json results/overhead.json
    OMP_NUM_THREADS=1 python eval/overhead.py --parts layer --tokens 1024

Times are processor time of this process, and both sides of a ratio are measured in turn, so other work on the machine
blurs them little. Layer: what `bench_gpu.py` measures on a GPU, 1,000 tokens, a page and a step of one layer of
Llama-8B's shape. Storing: 2,048 tokens of a layer at once, and 512 more by 32 (pages sealed, levels held to their
parts). Reading: attention of a decode step, and of 31 queries, over pages that are shared. Short: a text of 112 tokens
beside transformers' `DynamicCache`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_gpu import COLUMNS, table
from gpu import overhead
from gpu.timing import Bench
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_kvcompress as kvc
from hf_kvcompress.attention import kvcompress_attention
from hf_kvcompress.measure import tensor_bytes

HEADS, DIM, PAGE = 8, 128, 32
PROMPT, STEPS = 2048, 512
CONFIG = LlamaConfig(num_hidden_layers=1, hidden_size=1024, num_attention_heads=HEADS, num_key_value_heads=HEADS)
Pair = tuple[torch.Tensor, torch.Tensor]


class Attention(torch.nn.Module):
    """What the attention asks of its module."""

    num_key_value_groups, is_causal = 1, True


def seconds(run: Callable[[], Any]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def random_pair(rows: int, tokens: int, seed: int = 0) -> Pair:
    keys, values = torch.randn(2, rows, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))
    return keys, values


def template(rows: int = 6, tokens: int = 640, common: int = 600) -> Pair:
    """Rows with their first tokens in common."""
    pair = random_pair(rows, tokens)
    for x in pair:
        x[:, :, :common] = x[:1, :, :common]
    return pair


def repeated(rows: int = 1, tokens: int = 2048, share: float = 0.45) -> Pair:
    """A part of the text once more at its end, the same before the rotation of the keys."""
    size, turn = int(share * tokens), kvc.CPACCache(CONFIG)._rotary(0)
    assert turn is not None
    keys, values = random_pair(rows, tokens)
    for x in (keys, values):
        x[:, :, -size:] = x[:, :, 10 : 10 + size]
    return turn.apply(keys, torch.arange(tokens)), values


# -- one layer ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def layer(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Every strategy beside its codec on drawn numbers, medians; the last letters of a column are its unit."""
    bench = Bench(torch.device("cpu"), False, time.perf_counter() + 3600)
    found = [list(overhead.run(bench, seed, (tokens,))) for seed in range(rounds)]
    times = ("_ms", "_1000", "_more")
    return [
        {key: statistics.median(row[key] for row in same) if key.endswith(times) else same[0][key] for key in same[0]}
        for same in zip(*found, strict=True)
    ]


# -- storing -----------------------------------------------------------------------------------------------------------


def storing(name: str, make: Callable[[], Any], base: Callable[[], Any], pair: Pair, rounds: int = 2) -> dict[str, Any]:
    """Time above the base's, a page of a row, head and role, and 1,000 tokens of a layer of 8 heads."""
    found: dict[str, dict[str, list[float]]] = {"prompt": {"base": [], "own": []}, "steps": {"base": [], "own": []}}
    for _ in range(rounds):
        for label, maker in (("base", base), ("own", make)):
            cache = maker()
            found["prompt"][label].append(seconds(lambda cache=cache: (cache.update(*first(pair), 0), cache.commit())))
            found["steps"][label].append(seconds(lambda cache=cache: steps(cache, pair)))
    row: dict[str, Any] = {"strategy": name}
    for part, tokens in (("prompt", PROMPT), ("steps", STEPS)):
        extra = min(found[part]["own"]) - min(found[part]["base"])
        row[f"{part} ms a 1,000 tokens"] = 1e6 * extra / tokens
        row[f"{part} us a page"] = 1e6 * extra / (tokens / PAGE * HEADS * 2)
        row[f"{part} times the codec"] = min(found[part]["own"]) / min(found[part]["base"])
    return row


def first(pair: Pair) -> list[torch.Tensor]:
    return [x[:, :, :PROMPT] for x in pair]


def steps(cache: Any, pair: Pair) -> None:
    for start in range(PROMPT, PROMPT + STEPS, PAGE):
        cache.update(*(x[:, :, start : start + PAGE] for x in pair), 0)
        cache.commit()


# -- reading -----------------------------------------------------------------------------------------------------------


def reading(name: str, pair: Pair, queries: int, rounds: int = 5) -> dict[str, Any]:
    """Attention over shared pages beside the codec's, the median of ratios taken in turn."""
    caches = [kind(CONFIG) for kind in (kvc.CompressedCache, kvc.CPACCache)]
    for cache in caches:
        cache.update(*pair, 0)
        cache.commit()
        cache.activate_past_recording()
    own = caches[1].get_compression_stats()
    rows, ratios = pair[0].shape[0], []
    for _ in range(rounds):
        took = []
        for cache in caches:
            new = torch.randn(3, rows, HEADS, queries, DIM)
            handles = cache.update(new[0], new[1], 0)
            took.append(seconds(partial(kvcompress_attention, Attention(), new[2], *handles, None)))
            cache.crop(-queries)
        ratios.append(took[1] / took[0])
    pages = own["compressed_blocks"] + own["plain_blocks"]
    return {"content": name, "queries": queries, "shared": own["compressed_blocks"] / pages} | {
        "times the codec": statistics.median(ratios)
    }


# -- short texts -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def short(rounds: int = 5) -> dict[str, Any]:
    """A small model that reads 64 tokens and goes on for 48, with the levels of a `HierarchicalCache` and without."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_key_value_heads=2, **sizes)).eval()
    ids = torch.randint(0, 1000, (1, 64))
    makers = {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "own": lambda: kvc.HierarchicalCache(model.config),
    }
    ratios, held = [], {}
    with kvc.enable(model):
        for _ in range(rounds):
            took = {}
            for name, make in makers.items():
                cache = make()
                took[name] = seconds(
                    lambda cache=cache: model.generate(
                        ids, past_key_values=cache, max_new_tokens=48, min_new_tokens=48, do_sample=False
                    )
                )
                held[name] = tensor_bytes(cache.layers)
            ratios.append(took["own"] / took["DynamicCache"])
    return {
        "tokens": 64 + 48,
        "times DynamicCache": statistics.median(ratios),
        "bytes of DynamicCache": held["DynamicCache"],
        "bytes": held["own"],
    }


def storing_rows() -> list[dict[str, Any]]:
    """CPAC with and without content that repeats, tiers with and without exact copies."""
    random, twice = random_pair(1, PROMPT + STEPS), repeated(tokens=PROMPT + STEPS)
    plain = lambda: kvc.CompressedCache(CONFIG)  # noqa: E731
    tiers = lambda: kvc.HierarchicalCache(CONFIG, weights={"magnitude": 1})  # noqa: E731
    kept = lambda: kvc.HierarchicalCache(CONFIG, weights={"magnitude": 1}, keep_exact="64MB")  # noqa: E731
    return [
        storing("CPAC, nothing repeats", lambda: kvc.CPACCache(CONFIG), plain, random),
        storing("CPAC, 45 % repeats", lambda: kvc.CPACCache(CONFIG), plain, twice),
        storing("HierarchicalCache", tiers, plain, random),
        storing("HierarchicalCache, keep_exact", kept, plain, random),
    ]


def reading_rows() -> list[dict[str, Any]]:
    """Rows of one template, and a text of which a part comes twice."""
    contents = {"six rows, one template": template(), "45 % twice": repeated()}
    return [reading(name, pair, queries) for name, pair in contents.items() for queries in (1, 31)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("layer", "storing", "reading", "short")
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt of the part layer")
    parser.add_argument("--repeat", type=int, default=1, help="of the part layer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "importance")
    found: dict[str, list[dict[str, Any]]] = {}
    if "layer" in args.parts:
        found["layer"] = layer(args.tokens, args.repeat)
        print(table(found["layer"], COLUMNS["overhead"]))
    others: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "storing": storing_rows,
        "reading": reading_rows,
        "short": lambda: [short()],
    }
    for name, run in others.items():
        if name in args.parts:
            found[name] = run()
            for row in found[name]:
                print("  ".join(f"{k}: {v:.2f}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
