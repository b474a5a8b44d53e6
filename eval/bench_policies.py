"""What policies cost and save in time: their capture during a prefill, and decode steps under a budget.

    OMP_NUM_THREADS=1 python eval/bench_policies.py --json results/bench_policies.json

"prefill" runs a real model over a long prompt: H2O's attention mass and SnapKV's queries are collected, nothing is
evicted, against DynamicCache under sdpa. "decode" runs steps of one Llama-8B-shaped layer that holds a quarter of its
tokens, eviction rounds included. Every run of a cache is followed by one of DynamicCache, and ratios are of such pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from bench_decode import DIM, HEADS, QUERY_HEADS, Module, draw, model_config
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_kvcompress as kvc
from hf_kvcompress.attention import kvcompress_attention
from hf_kvcompress.scoring import standard_text, tokenize


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(policies="h2o,snapkv,tova,keydiff,streaming,rkv,expected,random")
    parser.add_argument("--parts", default="prefill,decode")
    parser.add_argument("--prefill-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of prefills")
    parser.add_argument("--decode-tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=128, help="pairs of decode steps")
    parser.add_argument("--codecs", default="identity,eqrot4")
    return parser.parse_args()


# -- prefill -------------------------------------------------------------------------------------------------------


def prefills(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of a whole prefill, as a ratio to DynamicCache's under sdpa right before it."""
    model, tokenizer = common.load(args)
    ids = tokenize(tokenizer, standard_text(), args.prefill_tokens, model.device)
    config, more = model.config, 2 * args.prefill_tokens
    entrants: dict[str, Callable[[], Any]] = {
        "no policy": lambda: kvc.CompressedCache(config, codec="identity"),
        "H2OCache, captures": lambda: kvc.H2OCache(config, max_tokens=more, codec="identity"),
        "H2OCache, evicts half": lambda: kvc.H2OCache(config, max_tokens=0, codec="identity"),
        "H2OCache eqrot4, captures": lambda: kvc.H2OCache(config, max_tokens=more, codec="eqrot4"),
        "SnapKVCache, captures": lambda: kvc.SnapKVCache(config, 1.0, codec="identity"),
        "SnapKVCache, evicts": lambda: kvc.SnapKVCache(config, 0.25, codec="identity"),
    }

    def seconds(cache: Any) -> float:
        begun = time.perf_counter()
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begun

    rows = []
    with torch.inference_mode():
        model(ids[:, :1024], past_key_values=DynamicCache(config=config), logits_to_keep=1)
        for name, make in entrants.items():
            pairs = []
            for _ in range(args.repeats):
                plain = seconds(DynamicCache(config=config))
                with kvc.enable(model):
                    pairs.append((seconds(make()), plain))
            ratios = [ours / plain for ours, plain in pairs]
            rows.append({"cache": name, "seconds": pairs, "ratio": statistics.median(ratios), "ratios": ratios})
            print(f"{name:28} {rows[-1]['ratio']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})", flush=True)
    return rows


# -- decode --------------------------------------------------------------------------------------------------------


class Layer:
    """One cache of one layer with a stored prompt, and the steps it takes."""

    def __init__(self, cache: Any, tokens: int):
        self.cache, self.module = cache, Module()
        self.attention = kvcompress_attention if isinstance(cache, kvc.CompressedCache) else sdpa_attention_forward
        queries, keys, values = draw(tokens, torch.Generator().manual_seed(0))
        if not isinstance(cache, kvc.CompressedCache) or cache.settings.default.eviction is None:
            cache.update(keys, values, 0)
            if isinstance(cache, kvc.CompressedCache):
                cache.layers[0].observe_queries(queries, DIM**-0.5)
                cache.commit()
            return
        # in pieces, through the attention: the policy sees its queries, and every piece has an eviction round
        for start in range(0, tokens, 1024):
            own = slice(start, start + 1024)
            k, v = cache.update(keys[:, :, own], values[:, :, own], 0)
            kvcompress_attention(self.module, queries[:, :, own], k, v, None, scaling=DIM**-0.5)

    def step(self, token: tuple[torch.Tensor, ...]) -> float:
        queries, keys, values = token
        begun = time.perf_counter()
        k, v = self.cache.update(keys, values, 0)
        self.attention(self.module, queries, k, v, None, scaling=DIM**-0.5)
        return time.perf_counter() - begun


def decodes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Mean time of a decode step, eviction rounds included, and its ratio to DynamicCache's steps taken in turn."""
    config, tokens = model_config(), args.decode_tokens
    rows = []
    warm_up = 4
    fresh = draw(args.steps + warm_up, torch.Generator().manual_seed(1))
    steps = [tuple(x[:, :, i : i + 1] for x in fresh) for i in range(args.steps + warm_up)]
    whole = tokens * HEADS * DIM * 4
    with torch.inference_mode():
        for name in ["none", *common.names(args)]:
            for codec in args.codecs.split(","):
                own = (
                    {}
                    if name == "none"
                    else {**common.policy_settings(name, None, args.learned), "budget": tokens // 4}
                )
                ours = Layer(kvc.CompressedCache(config, codec=codec, **own), tokens)
                base = Layer(DynamicCache(config=config), tokens)
                pairs = [(ours.step(token), base.step(token)) for token in steps][warm_up:]
                mean, plain = (statistics.fmean(pair[i] for pair in pairs) for i in range(2))
                rows.append(
                    {
                        "policy": name,
                        "codec": codec,
                        "mean_ms": mean * 1e3,
                        "dynamic_ms": plain * 1e3,
                        "faster": plain / mean,
                        "median_faster": statistics.median(p / m for m, p in pairs),
                        "slowest_ms": max(m for m, _ in pairs) * 1e3,
                        "bytes_part": kvc.tensor_bytes(ours.cache) / whole,
                    }
                )
                print(
                    "{policy:10} {codec:9} {mean_ms:7.2f} ms, DynamicCache {dynamic_ms:7.2f} ms, {faster:5.2f} x "
                    "(median {median_faster:.2f}), slowest {slowest_ms:.1f} ms, bytes {bytes_part:.3f}".format(
                        **rows[-1]
                    ),
                    flush=True,
                )
    return rows


def main() -> None:
    args = arguments()
    parts: dict[str, Any] = {}
    if "prefill" in args.parts:
        parts["prefill"] = prefills(args)
    if "decode" in args.parts:
        parts["decode"] = decodes(args)
    common.write_report(args, query_heads=QUERY_HEADS, **parts)


if __name__ == "__main__":
    main()
