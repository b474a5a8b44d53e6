"""Perplexity and KL against the part of the tokens that stays, for every policy and its bounds, on a real model.

    python eval/policies.py --text novel.txt --text code --windows 2 --json results/policies.json

Every policy has the same protections (4 sinks, 32 exact tokens, a quarter of the budget for the newest), so only the
score differs. "full" evicts in the layers with full attention and leaves sliding ones alone; "all" evicts in the window
of sliding layers as well, to the same part of it. The named classes follow with what their papers set. Random and
recency ("streaming") are the bounds below, the oracle the one above: it knows the attention that is still to come.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import torch
from transformers import DynamicCache

import hf_kvcompress as kvc
from hf_kvcompress.scoring import Score, score

STEP = 32  # tokens of a scored forward
SINKS, EXACT = 4, 32
SAME = {"sink_length": SINKS, "residual_length": EXACT, "recent": 0.25}
#: what the papers set, where it is not what every row has
NAMED: dict[str, Callable[[Any, float, int], kvc.CompressedCache]] = {
    "H2OCache (.1 heavy, .4 recent)": lambda config, part, tokens: kvc.H2OCache(config, max_tokens=0, codec="identity"),
    "StreamingLLMCache": lambda c, part, tokens: kvc.StreamingLLMCache(c, round(part * tokens), codec="identity"),
    "SnapKVCache": lambda config, part, tokens: kvc.SnapKVCache(config, part, codec="identity"),
    "PyramidKVCache": lambda config, part, tokens: kvc.PyramidKVCache(config, part, codec="identity"),
    "AdaKVCache": lambda config, part, tokens: kvc.AdaKVCache(config, part, codec="identity"),
    "TOVACache": lambda config, part, tokens: kvc.TOVACache(config, part, codec="identity"),
    "ExpectedAttentionCache": lambda config, part, tokens: kvc.ExpectedAttentionCache(config, part, codec="identity"),
    "KeyDiffCache": lambda config, part, tokens: kvc.KeyDiffCache(config, part, codec="identity"),
    "RKVCache": lambda config, part, tokens: kvc.RKVCache(config, part, codec="identity"),
    "RandomCache": lambda config, part, tokens: kvc.RandomCache(config, part, codec="identity"),
}
#: variations on one score
VARIED = {
    "h2o, merged values": {"policy": "h2o", "merge": True},
    "snapkv, merged values": {"policy": "snapkv", "merge": True},
    "snapkv, chunks of 8": {"policy": "snapkv", "chunk_size": 8},
    "random, 10 % at both ends": {"policy": "random", "boundary": 0.1},
}


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--text", action="append", help="a UTF-8 file, `prose` or `code`; may be repeated")
    parser.add_argument("--windows", type=int, default=2, help="of each text, evenly spread, without overlap")
    parser.add_argument("--prompt-tokens", type=int, default=2047)
    parser.add_argument("--score-tokens", type=int, default=257, help="fed after the prompt; all but one are scored")
    parser.add_argument("--fractions", default="1.0,0.5,0.25,0.1", help="parts of the tokens that stay")
    parser.add_argument("--scopes", default="full,all", help="layers that evict")
    parser.add_argument("--named", type=float, default=0.25, help="part that the named classes keep; 0 leaves them out")
    parser.add_argument("--codec", default="identity")
    parser.add_argument("--page-size", type=int, default=8, help="32, the default of a cache, needs 100 tokens a layer")
    return parser.parse_args()


def budgets(config: Any, scope: str, part: float, page: int) -> dict[str, Any]:
    """Settings that keep a part of the tokens: of those seen, and in sliding layers of the window."""
    if scope == "full":
        return {"budget": part, "sliding": "exact"}
    text, full = config.get_text_config(decoder=True), common.full_layers(config)
    sliding = [index for index in range(text.num_hidden_layers) if index not in full]
    least = kvc.LayerConfig(page_size=page, sink_length=SINKS, residual_length=EXACT).least_budget
    own = max(round(part * ((text.sliding_window or 1) - 1)), least)
    layers = {index: {"budget": own} for index in sliding} if part < 1 else {}
    return {"budget": part, "sliding": "evict", "layers": layers}


def entrants(args: argparse.Namespace, config: Any, future: Any) -> Iterator[tuple[str, str, float, Callable]]:
    """Name, scope, part and maker of every cache."""
    same = {**SAME, "codec": args.codec, "page_size": args.page_size}

    def maker(settings: dict[str, Any]) -> Callable[[], kvc.CompressedCache]:
        return lambda: kvc.CompressedCache(config, **{**same, **settings})

    for scope in args.scopes.split(","):
        for part in map(float, args.fractions.split(",")):
            for name in common.names(args):
                own = common.policy_settings(name, future, args.learned)
                yield name, scope, part, maker({**own, **budgets(config, scope, part, args.page_size)})
    if args.named:
        for name, named in NAMED.items():
            part = 0.5 if "H2O" in name else args.named  # its two ratios say how much it keeps
            yield name, "named", part, lambda named=named, part=part: named(config, part, args.prompt_tokens)
        for name, varied in VARIED.items():
            yield name, "varied", args.named, maker({**varied, **budgets(config, "full", args.named, args.page_size)})


def measure(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cache on one window."""
    ids = ids.to(model.device)
    prompt = common.Prompt(model, ids[:, : args.prompt_tokens])
    following = ids[:, args.prompt_tokens - 1 :]
    future = prompt.future([following[:, 1:-1]], STEP) if common.ORACLE in common.names(args) else None
    full = common.full_layers(model.config)

    def run(make: Callable[[], Any], base: Score | None = None) -> Score:
        return score(model, following, lambda: prompt.into(make()), 1, STEP, reference=base)

    base = run(lambda: DynamicCache(config=model.config))
    whole = common.bytes_of(base.cache, full)
    rows = [{"policy": "uncompressed", "scope": "", "part": 1.0, "nll": base.nll.mean().item(), "kl": 0.0, "top1": 1.0}]
    with kvc.enable(model):
        for name, scope, part, make in entrants(args, model.config, future):
            begun = time.perf_counter()
            got = run(make, base)
            rows.append(
                {
                    "policy": name,
                    "scope": scope,
                    "part": part,
                    "nll": got.nll.mean().item(),
                    "kl": got.mean_kl,
                    "top1": got.top1_agreement,
                    "bytes_part": common.bytes_of(got.cache, full) / whole,
                    "seconds": time.perf_counter() - begun,
                }
            )
    return rows


def summary(rows: list[dict[str, Any]], scope: str) -> str:
    """One line a policy and part: means over windows, and in how many windows it beats Random."""
    chosen = [row for row in rows if row["scope"] == scope]
    random = {
        (r["part"], r["text"], r["window"]): r["kl"]
        for r in rows
        if r["policy"] == "random" and r["scope"] == (scope if scope == "all" else "full")
    }
    lines = []
    for part in sorted({row["part"] for row in chosen}, reverse=True):
        for name in dict.fromkeys(row["policy"] for row in chosen if row["part"] == part):
            own = [row for row in chosen if row["policy"] == name and row["part"] == part]
            against = [(row["kl"], random.get((part, row["text"], row["window"]))) for row in own]
            better = sum(kl < bound for kl, bound in against if bound is not None)
            known = sum(bound is not None for _, bound in against)
            lines.append(
                (
                    f"{part:.0%}",
                    name,
                    f"{common.perplexity(own):.2f}",
                    common.spread(row["kl"] for row in own),
                    common.spread((row["top1"] for row in own), ".3f"),
                    f"{better}/{known}" if known and name != "random" and part < 1 else "",
                    "" if name == common.ORACLE else f"{sum(row['bytes_part'] for row in own) / len(own):.3f}",
                )
            )
    header = ("kept", "policy", "PPL", "KL", "top-1", "windows better than Random", "bytes, full layers")
    return common.table(header, lines)


def main() -> None:
    args = arguments()
    model, tokenizer = common.load(args)
    rows: list[dict[str, Any]] = []
    length = args.prompt_tokens + args.score_tokens
    for text, window, ids in common.windows(args.text or ["prose", "code"], tokenizer, args.windows, length):
        begun = time.process_time()
        rows += [{"text": text, "window": window, **row} for row in measure(model, ids, args)]
        print(f"{text} {window}: {time.process_time() - begun:.0f} s", flush=True)
        common.write_report(args, rows=rows)
    exact = [row for row in rows if row["policy"] == "uncompressed"]
    print(f"\nuncompressed: PPL {common.perplexity(exact):.2f}, {len(exact)} windows")
    for scope in dict.fromkeys(row["scope"] for row in rows if row["scope"]):
        print(f"\n{scope}\n\n{summary(rows, scope)}")


if __name__ == "__main__":
    main()
