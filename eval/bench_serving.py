"""What prefixes and paging save: time to the first token, entries in a GB, hit rates of traces.

    python eval/bench_serving.py --json results/serving.json
    python eval/bench_serving.py --model NAME --parts ttft

Without `--model` a random Llama serves (times and bytes do not depend on what the weights say). Traces need no model:
they run through the store with entries of equal size.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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


ZIPF = [1 / (rank + 1) for rank in range(120)]
SHIFT = 40  # patterns by which fashion moves on, four times a trace


def traces(length: int, seed: int = 0) -> dict[str, list[int]]:
    """Which prefix each request begins with: the three kinds that users ask about, and one with much that is unique.

    The policies' parameters were chosen on seeds from 100 on.
    """
    draw = random.Random(seed)
    common = []
    for step in range(length):  # some patterns are in fashion, and fashions change
        common.append(_fashion(step, length) + draw.choices(range(120), ZIPF)[0])
    return {
        "system prompts": draw.choices(range(24), ZIPF[:24], k=length),
        "common patterns": common,
        "random": [draw.randrange(400) for _ in range(length)],
        "half unique": [which if draw.random() < 0.5 else 1000 + step for step, which in enumerate(common)],
    }


def _fashion(step: int, length: int) -> int:
    """The pattern that is asked for most."""
    return SHIFT * (1 + step // (length // 4))


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


def knowing_hits(trace: list[int], room: int) -> float:
    """Keeps what is asked for most in the common trace, which it is told: only the future would tell it more."""
    held: set[int] = set()
    hits = 0
    for step, which in enumerate(trace):
        first = _fashion(step, len(trace))
        hits += which in held
        held.add(which)
        if len(held) > room:
            held.remove(min(held, key=lambda one: ZIPF[one - first] if 0 <= one - first < len(ZIPF) else 0.0))
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


def hit_rates(length: int, room: int, seeds: int) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over seeds, by trace and policy."""
    expected = {"system prompts": 0.95, "common patterns": 0.78, "random": 0.12}
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        for name, trace in traces(length, seed).items():
            rates = {policy: store_hits(trace, policy, room) for policy in ("lru", "lfu", "adaptive")}
            rates["optimal"] = optimal_hits(trace, room)
            if name == "common patterns":
                rates["knows what is popular"] = knowing_hits(trace, room)
            for policy, rate in rates.items():
                found.setdefault(name, {}).setdefault(policy, []).append(rate)
    return {
        name: {policy: {"mean": mean(rates), "deviation": pstdev(rates)} for policy, rates in own.items()}
        | {"users_expect": expected.get(name)}
        for name, own in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--parts", nargs="+", default=["ttft", "traces"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=8, help="traces of each kind")
    parser.add_argument("--room", type=int, default=48, help="prefixes that the store of the traces holds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(options).items()}, "versions": versions()}
    report["devices"] = devices()
    with torch.no_grad():
        if "traces" in options.parts:
            report["hit_rates"] = hit_rates(options.requests, options.room, options.seeds)
        if "ttft" in options.parts:
            model = AutoModelForCausalLM.from_pretrained(options.model) if options.model else random_llama()
            report["first_token"] = first_token(model, options.repeats)
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
