"""Tokens a second at one memory limit: batches with a DynamicCache, paging, + prefix, + compression, `generate_batch`.

    python eval/bench_engine.py --json results/engine.json
    python eval/bench_engine.py --model NAME --memory-mb 4000

Requests have prompts and answers of unequal length, and a part of them begins with one system text. Nobody knows
beforehand how long an answer gets, only the most that it may have; "known lengths" is told, to see what that is worth.
Memory is everything that holds keys and values: the pool, exact windows and the prefix store, or the batch's cache.
Without `--model` a random Llama serves. The ways run in turns, and the medians are told with the least and the most.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_serving import ids_of, random_llama
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

import hf_kvcompress as kvc
from hf_kvcompress.environment import devices, versions

GB, MB = 2**30, 2**20


@dataclass(frozen=True)
class Request:
    """A prompt and the tokens that its answer will have."""

    prompt: list[int]
    new: int


def requests(count: int, system: int, part: float, most_prompt: int, most_new: int, seed: int) -> list[Request]:
    """Lengths are log-normal, as those of chats are; `part` of the prompts begin with `system` common tokens."""
    draw, common = random.Random(seed), ids_of(system, 1)
    found = []
    for number in range(count):
        own = min(max(int(draw.lognormvariate(4.2, 0.8)), 8), most_prompt)
        new = min(max(int(draw.lognormvariate(4.0, 0.8)), 4), most_new)
        found.append(Request((common if draw.random() < part else []) + ids_of(own, number + 2), new))
    return found


class Ends(StoppingCriteria):
    """Every row ends behind its own number of tokens, as if it had met its end token."""

    def __init__(self, start: int, new: list[int]):
        self.ends = torch.tensor(new) + start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids.shape[1] >= self.ends).to(input_ids.device)


def token_bytes(model: Any) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize


def in_batches(model: Any, asked: list[Request], memory: int, reserve: int | None) -> dict[str, Any]:
    """`generate` with a DynamicCache, in the order of arrival, in the largest padded batches that surely fit.

    With `reserve` every row has room for so many new tokens; without, the lengths are known and rows are sorted.
    """
    room = memory // token_bytes(model)
    waiting = list(enumerate(asked))
    if reserve is None:
        waiting.sort(key=lambda own: len(own[1].prompt) + own[1].new)
    answers: list[list[int]] = [[] for _ in asked]
    peak = batches = 0
    while waiting:
        size = 1
        while size < len(waiting):
            rows = [own for _, own in waiting[: size + 1]]
            longest = max(len(own.prompt) for own in rows) + (reserve or max(own.new for own in rows))
            if (size + 1) * longest > room:
                break
            size += 1
        batch, waiting = waiting[:size], waiting[size:]
        width = max(len(own.prompt) for _, own in batch)
        ids = torch.tensor([[0] * (width - len(own.prompt)) + own.prompt for _, own in batch])
        mask = torch.tensor([[0] * (width - len(own.prompt)) + [1] * len(own.prompt) for _, own in batch])
        cache, new = DynamicCache(config=model.config), [own.new for _, own in batch]
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            past_key_values=cache,
            max_new_tokens=max(new),
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Ends(width, new)]),
        )
        for (number, own), row in zip(batch, out[:, width:].tolist(), strict=True):
            answers[number] = row[: own.new]
        peak, batches = max(peak, kvc.tensor_bytes(cache)), batches + 1
    return {"answers": answers, "peak_bytes": peak, "rows": len(asked) / batches}


def by_engine(model: Any, asked: list[Request], memory: int, rows: int, store: int, **options: Any) -> dict[str, Any]:
    """The engine with a pool, windows of `rows` rows and a prefix store of `store` bytes within the memory."""
    if store:
        options["prefix_cache"] = kvc.PrefixCache(store / GB, remember=False)
    engine = kvc.PagedAttentionEngine(
        model, memory_gb=(memory - store) / GB, max_batch=rows, residual_length=options.pop("residual", 32), **options
    )
    answers = engine.generate([own.prompt for own in asked], max_tokens=[own.new for own in asked])
    held = engine.stats.peak_bytes + (0 if engine.prefixes is None else engine.prefixes.nbytes)
    report = engine.report()
    told = {name: report[name] for name in ("preemptions", "first_token_seconds", "token_seconds", "rows_a_step")}
    return {"answers": answers, "peak_bytes": held, "rows": told.pop("rows_a_step"), **told}


def by_transformers(model: Any, asked: list[Request]) -> dict[str, Any]:
    """transformers' continuous batching; it takes one limit for all, so the longest answers are asked for and cut."""
    config = GenerationConfig(max_new_tokens=max(own.new for own in asked), do_sample=False, eos_token_id=-1)
    out = model.generate_batch(inputs=[own.prompt for own in asked], generation_config=config)
    found = sorted(out.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
    answers = [own.generated_tokens[: request.new] for (_, own), request in zip(found, asked, strict=True)]
    return {"answers": answers}


def one_by_one(model: Any, asked: list[Request]) -> list[list[int]]:
    """What the answers are, by `generate` with a prompt at a time."""
    found = []
    for own in asked:
        ids = torch.tensor([own.prompt], device=model.device)
        out = model.generate(ids, max_new_tokens=own.new, do_sample=False, pad_token_id=0)
        found.append(out[0, len(own.prompt) :].tolist())
    return found


def equal_tokens(answers: list[list[int]], expected: list[list[int]]) -> float:
    """Part of the answers that are the same, token by token."""
    return sum(a == b for a, b in zip(answers, expected, strict=True)) / len(expected)


def measure(ways: dict[str, Callable[[], dict[str, Any]]], repeats: int, useful: int) -> dict[str, dict[str, Any]]:
    """Every way `repeats` times, in turns."""
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found[name] = way()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, own in seconds.items():
        for kind, times in zip(("wall", "cpu"), zip(*own, strict=True), strict=True):
            speeds = sorted(useful / time for time in times)
            found[name][f"tokens_per_{kind}_second"] = statistics.median(speeds)
            found[name][f"spread_{kind}"] = [speeds[0], speeds[-1]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--system", type=int, default=256, help="tokens of the system text")
    parser.add_argument("--part", type=float, default=0.7, help="of the prompts that begin with it")
    parser.add_argument("--most-prompt", type=int, default=384, help="tokens of a prompt's own at most")
    parser.add_argument("--most-new", type=int, default=256, help="tokens of an answer at most")
    parser.add_argument("--limit", type=int, default=512, help="tokens that an answer might have had, for all one knew")
    parser.add_argument("--memory-mb", type=float, default=48.0)
    parser.add_argument("--rows", type=int, nargs=3, default=[10, 16, 22], help="of the engine's three ways at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model) if options.model else random_llama()
    asked = requests(
        options.requests, options.system, options.part, options.most_prompt, options.most_new, options.seed
    )
    memory, useful, token = int(options.memory_mb * MB), sum(own.new for own in asked), token_bytes(model)
    store = int(1.3 * options.system * token)
    small = int(store / 3)

    def engine(rows: int, size: int, **settings: Any) -> Callable[[], dict[str, Any]]:
        return lambda: by_engine(model, asked, memory, rows, size, **settings)

    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "DynamicCache batches": lambda: in_batches(model, asked, memory, options.limit),
        "DynamicCache, known lengths": lambda: in_batches(model, asked, memory, None),
        "paging": engine(options.rows[0], 0, codec="identity", residual=1),
        "+ prefix": engine(options.rows[1], store, codec="identity", residual=1),
        "+ compression": engine(options.rows[2], small, codec="eqrot4"),
        "generate_batch": lambda: by_transformers(model, asked),
    }
    ways = {name: way for name, way in ways.items() if options.ways is None or name in options.ways}
    report: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(options).items()}, "versions": versions()}
    report["devices"] = devices()
    lengths = [len(own.prompt) for own in asked]
    report["requests"] = {"prompt_tokens": sum(lengths), "longest_prompt": max(lengths), "new_tokens": useful}
    with torch.no_grad():
        if "generate_batch" in ways:
            try:
                by_transformers(model, asked[:2])
            except Exception as error:
                del ways["generate_batch"]
                report["generate_batch"] = f"{type(error).__name__}: {error}"[:300]
        expected = one_by_one(model, asked)
        found = measure(ways, options.repeats, useful)
    for own in found.values():
        own["equal_answers"] = equal_tokens(own.pop("answers"), expected)
    report["ways"] = found
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
