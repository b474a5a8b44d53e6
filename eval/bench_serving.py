"""What prefixes and paging save: time to the first token, entries in a GB, hit rates of traces, engine throughput.

    python eval/bench_serving.py --json results/serving.json
    python eval/bench_serving.py --model NAME --parts ttft entries engine

Without `--model` a random Llama serves (times and bytes do not depend on what the weights say). Traces need no model:
they run through the store with entries of equal size.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_kvcompress as kvc
from hf_kvcompress.config import CacheConfig
from hf_kvcompress.environment import devices, versions
from hf_kvcompress.prefix.ranking import Ranking
from hf_kvcompress.prefix.store import PrefixStore
from hf_kvcompress.prefix.tree import Origin
from hf_kvcompress.snapshots import Snapshot

PREFIX, BLOCK, GB = 2048, 16, 2**30
CODECS = ("identity", "int8", "eqrot4", "eqrot3")


def random_llama() -> Any:
    """40 million parameters, keys and values of 8 layers, 4 heads of 64."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
    more = dict(num_key_value_heads=4, head_dim=64, vocab_size=8192, max_position_embeddings=8192, eos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(**sizes, **more)).eval()


def ids_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, 8000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def asked(store: Any, prefix: list[int], seed: int) -> float:
    """Seconds from a prompt of the prefix and 32 tokens more to the logits of its first new token."""
    prompt, started = prefix + ids_of(32, seed), time.perf_counter()
    cache, have = store.open(prompt)
    store.reader.forward(prompt[have:], cache)
    return time.perf_counter() - started


# -- time to the first token, entries in a GB --------------------------------------------------------------------------


def first_token(model: Any, repeats: int) -> dict[str, Any]:
    """Seconds from a prompt to its first token: 2,048 known tokens and 32 new ones."""
    prefix, found = ids_of(PREFIX, 0), {}
    with kvc.enable(model), tempfile.TemporaryDirectory() as folder:
        for codec in CODECS:
            store = kvc.PrefixCache(model=model, cache={"codec": codec}, disk=f"{folder}/{codec}", remember=False)

            cold = [asked(store, prefix, seed) for seed in range(repeats)]  # nothing is known yet
            store.add_prefix(prefix)
            warm = [asked(store, prefix, seed) for seed in range(repeats)]
            disk = []
            for seed in range(repeats):
                again = kvc.PrefixCache(model=model, cache={"codec": codec}, disk=f"{folder}/{codec}", remember=False)
                disk.append(asked(again, prefix, seed))
            found[codec] = {"none": min(cold), "memory": min(warm), "disk": min(disk), "entry_bytes": store.nbytes}
            found[codec]["entries_per_gb"] = GB // store.nbytes
    return found


# -- hit rates ---------------------------------------------------------------------------------------------------------


def traces(length: int, seed: int = 0) -> dict[str, list[int]]:
    """Which prefix each request begins with. The three kinds that users ask about."""
    draw = random.Random(seed)
    zipf = [1 / (rank + 1) for rank in range(400)]
    common, base = [], 0
    for step in range(length):  # some patterns are in fashion, and fashions change
        base = base + 40 if step % (length // 4) == 0 else base
        common.append(base + draw.choices(range(120), zipf[:120])[0])
    return {
        "system prompts": draw.choices(range(24), zipf[:24], k=length),
        "common patterns": common,
        "random": [draw.randrange(400) for _ in range(length)],
    }


def store_hits(trace: list[int], policy: str, room: int) -> float:
    """Hit rate of the store with room for `room` prefixes."""
    now = [0.0]
    entry = Snapshot([], {"page": torch.zeros(4096, dtype=torch.uint8)})
    size = entry.nbytes + 8 * BLOCK
    store = PrefixStore(room * size, Ranking(policy, half_life=len(trace) / 8), BLOCK, clock=lambda: now[0])
    origin = Origin("root", CacheConfig(), None)
    hits = 0
    for which in trace:
        now[0] += 1
        tokens = tuple([which] * BLOCK)
        lease = store.lease("root", (*tokens, 1), partial=False)
        hits += lease.node is not None
        store.release(lease)
        if lease.node is None:
            store.release(store.put(tokens, Snapshot([], dict(entry.tensors)), origin, None, 1.0, False))
    return hits / len(trace)


def optimal_hits(trace: list[int], room: int) -> float:
    """Belady: what is used again last goes first. No policy without foresight does better."""
    later: dict[int, list[int]] = {}
    for at, which in enumerate(trace):
        later.setdefault(which, []).append(at)
    held: set[int] = set()
    hits = 0
    for which in trace:
        later[which].pop(0)
        hits += which in held
        held.add(which)
        if len(held) > room:
            held.remove(max(held, key=lambda one: later[one][0] if later[one] else len(trace)))
    return hits / len(trace)


def hit_rates(length: int, room: int) -> dict[str, dict[str, float]]:
    expected = {"system prompts": 0.95, "common patterns": 0.78, "random": 0.12}
    found = {}
    for name, trace in traces(length).items():
        rates = {policy: store_hits(trace, policy, room) for policy in ("lru", "lfu", "adaptive")}
        found[name] = {**rates, "optimal": optimal_hits(trace, room), "users_expect": expected[name]}
    return found


# -- the engine --------------------------------------------------------------------------------------------------------


def static_batches(model: Any, prompts: list[list[int]], new: int, memory: int, token_bytes: int) -> dict[str, float]:
    """`generate` with a DynamicCache, in padded batches as large as the memory allows."""
    order = sorted(prompts, key=len)
    made, peak, started = 0, 0, time.perf_counter()
    while order:
        size = 1
        while size < len(order) and (size + 1) * (len(order[-size - 1]) + new) * token_bytes <= memory:
            if (size + 1) * (len(order[-1]) + new) * token_bytes > memory:
                break
            size += 1
        rows, order = order[-size:], order[:-size]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        cache = DynamicCache(config=model.config)
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False)
        made, peak = made + size * new, max(peak, kvc.tensor_bytes(cache))
    seconds = time.perf_counter() - started
    return {"tokens_per_second": made / seconds, "seconds": seconds, "peak_bytes": peak}


def engine_runs(model: Any, prompts: list[list[int]], new: int, memory: int) -> dict[str, dict[str, float]]:
    layers = model.config.num_hidden_layers
    token_bytes = 2 * layers * model.config.num_key_value_heads * model.config.head_dim * model.dtype.itemsize
    found = {"DynamicCache batches": static_batches(model, prompts, new, memory, token_bytes)}
    steps: dict[str, dict[str, Any]] = {
        "paging": {"codec": "identity"},
        "+ prefix": {"codec": "identity", "prefix_cache": True},
        "+ compression": {"codec": "eqrot4", "prefix_cache": True},
    }
    for name, options in steps.items():
        engine = kvc.PagedAttentionEngine(model, memory_gb=memory / GB, max_batch=64, **options)
        engine.generate(prompts, max_tokens=new)
        report = engine.report()
        wanted = ("tokens_per_second", "seconds", "peak_bytes", "first_token_seconds", "token_seconds", "preemptions")
        found[name] = {key: report[key] for key in wanted}
    try:  # transformers' own continuous batching
        started = time.perf_counter()
        config = model.generation_config.__class__(max_new_tokens=new, do_sample=False, eos_token_id=-1)
        out = model.generate_batch(inputs=prompts, generation_config=config)
        made = sum(len(own.generated_tokens) for own in out.values())
        found["generate_batch"] = {"tokens_per_second": made / (time.perf_counter() - started)}
    except Exception as error:
        found["generate_batch"] = {"error": f"{type(error).__name__}: {error}"[:200]}  # type: ignore[dict-item]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--parts", nargs="+", default=["ttft", "traces", "engine"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--room", type=int, default=48, help="prefixes that the store of the traces holds")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--system", type=int, default=512, help="tokens that the engine's prompts have in common")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--memory-mb", type=float, default=40.0, help="of the caches in the engine's part")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(options).items()}, "versions": versions()}
    report["devices"] = devices()
    with torch.no_grad():
        if "traces" in options.parts:
            report["hit_rates"] = hit_rates(options.requests, options.room)
        if {"ttft", "engine"} & set(options.parts):
            model = AutoModelForCausalLM.from_pretrained(options.model) if options.model else random_llama()
            if "ttft" in options.parts:
                report["first_token"] = first_token(model, options.repeats)
            if "engine" in options.parts:
                system = ids_of(options.system, 1)
                prompts = [system + ids_of(16 + 13 * (i % 7), i + 2) for i in range(options.prompts)]
                memory = int(options.memory_mb * 2**20)
                report["engine"] = engine_runs(model, prompts, options.new, memory)
                speeds = [own.get("tokens_per_second", 0.0) for own in report["engine"].values()]
                report["gains"] = [b / a for a, b in pairwise(speeds) if a]
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
