"""Quantize, evict or both at equal bytes: KL on a real model, over the bytes of the layers with full attention.

    python eval/equal_bytes.py --text novel.txt --windows 2 --json results/equal_bytes.json

Bytes are those of every tensor that the layers with full attention hold after the scored text, metadata included; the
ratio is to transformers' DynamicCache. Eviction is given the budget whose bytes meet the target; a codec alone has the
bits it has, so of the codecs the one that comes closest without more bytes than the target stands in the table.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import common
import torch
from transformers import DynamicCache

import hf_kvcompress as kvc
from hf_kvcompress.scoring import Score, score

STEP = 32
TOLERANCE = 0.03
ALONE = ("int8", "eqrot4", "eqrot4/eqrot3", "eqrot3", "eqrot3/eqrot2", "eqrot2")
SHARED = {"sliding": "exact", "page_size": 32}


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(policies="h2o,tova")
    parser.add_argument("--text", action="append", help="a UTF-8 file, `prose` or `code`; may be repeated")
    parser.add_argument("--windows", type=int, default=1, help="of each text, evenly spread, without overlap")
    parser.add_argument("--prompt-tokens", type=int, default=4608)
    parser.add_argument("--score-tokens", type=int, default=257)
    parser.add_argument("--ratios", default="2,4,8,16")
    parser.add_argument(
        "--both",
        default="eqrot4/eqrot3,eqrot3/eqrot2,eqrot2",
        help="codecs, or keys/values, that are joined with eviction",
    )
    return parser.parse_args()


class Window:
    """One text: its prompt, read once, and the uncompressed score."""

    def __init__(self, model: Any, ids: torch.Tensor, prompt_tokens: int):
        ids = ids.to(model.device)
        self.model, self.full = model, common.full_layers(model.config)
        self.prompt = common.Prompt(model, ids[:, :prompt_tokens])
        self.following = ids[:, prompt_tokens - 1 :]
        self.base = self.run({})
        self.whole = common.bytes_of(self.base.cache, self.full)

    def make(self, settings: dict[str, Any]) -> Any:
        config = self.model.config
        return kvc.CompressedCache(config, **{**SHARED, **settings}) if settings else DynamicCache(config=config)

    def run(self, settings: dict[str, Any]) -> Score:
        base = self.base if settings else None
        return score(self.model, self.following, lambda: self.prompt.into(self.make(settings)), 1, STEP, reference=base)

    def ratio(self, cache: Any) -> float:
        return self.whole / common.bytes_of(cache, self.full)

    def budgets(self, settings: dict[str, Any], ratios: list[float]) -> dict[float, int]:
        """Tokens whose bytes are 1 / ratio of the whole, where there are so many and a layer can hold to it.

        Bytes grow evenly with tokens, so two caches say it. They only read the prompt: under a budget in tokens a
        cache that has reached it stays there.
        """

        def measured(tokens: int) -> int:
            return common.bytes_of(self.prompt.into(self.make({**settings, "budget": tokens})), self.full)

        few, many = 256, self.prompt.ids.shape[1] // 2
        low, high = measured(few), measured(many)
        least = kvc.LayerConfig(page_size=SHARED["page_size"]).least_budget
        tokens = {ratio: round(few + (self.whole / ratio - low) * (many - few) / (high - low)) for ratio in ratios}
        return {ratio: own for ratio, own in tokens.items() if least <= own < self.prompt.ids.shape[1]}


def codecs_of(name: str) -> dict[str, str]:
    """Settings for one codec, or for `keys/values`."""
    keys, _, values = name.partition("/")
    return {"keys": keys, "values": values or keys}


def rows_of(window: Window, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way of compressing, at every ratio that it reaches."""
    rows: list[dict[str, Any]] = []

    def add(kind: str, name: str, target: float, settings: dict[str, Any]) -> None:
        begun = time.perf_counter()
        got = window.run(settings)
        row = {"kind": kind, "cache": name, "target": target, "ratio": window.ratio(got.cache)}
        row |= {"tokens": settings.get("budget"), "kl": got.mean_kl, "nll": got.nll.mean().item()}
        rows.append({**row, "top1": got.top1_agreement, "seconds": time.perf_counter() - begun})
        print(f"  {kind:8} {name:22} {target:>4}x {rows[-1]['ratio']:6.2f} {rows[-1]['kl']:.4f}", flush=True)

    for pair in ALONE:
        add("quantize", pair, 0, codecs_of(pair))
    ways = [("evict", "identity")] + [("both", codec) for codec in args.both.split(",") if codec]
    for name in common.names(args):
        for kind, codec in ways:
            own = {**common.policy_settings(name, None, args.learned), **codecs_of(codec)}
            for ratio, tokens in window.budgets(own, [float(ratio) for ratio in args.ratios.split(",")]).items():
                add(kind, f"{codec} + {name}" if kind == "both" else name, ratio, {**own, "budget": tokens})
    return rows


def best(rows: list[dict[str, Any]], ratios: list[float]) -> str:
    """The best of each kind at each ratio, by mean KL over windows."""
    lines = []
    for ratio in ratios:
        cells = [f"{ratio:g}x"]
        for kind in ("quantize", "evict", "both"):
            if kind == "quantize":
                near = {r["cache"]: r["ratio"] for r in rows if r["kind"] == kind}
                fit = [name for name, own in near.items() if own >= ratio * (1 - TOLERANCE)]
                name = min(fit, key=near.__getitem__) if fit else None
                own = [r for r in rows if r["cache"] == name and r["kind"] == kind]
            else:
                chosen = [r for r in rows if r["kind"] == kind and r["target"] == ratio]
                by_name = {r["cache"]: [x for x in chosen if x["cache"] == r["cache"]] for r in chosen}
                own = min(by_name.values(), key=lambda own: sum(r["kl"] for r in own) / len(own), default=[])
                name = own[0]["cache"] if own else None
            reached = sum(r["ratio"] for r in own) / len(own) if own else 0.0
            cells.append(f"{common.spread(r['kl'] for r in own)} ({name}, {reached:.2f}x)" if own else "")
        lines.append(cells)
    return common.table(("bytes", "quantize only", "evict only", "both"), lines)


def whole_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for key in dict.fromkeys((r["kind"], r["cache"], r["target"]) for r in rows):
        own = [r for r in rows if (r["kind"], r["cache"], r["target"]) == key]
        reached = sum(r["ratio"] for r in own) / len(own)
        tokens = {r["tokens"] for r in own if r["tokens"]}
        kept = f"{min(tokens)}-{max(tokens)}" if len(tokens) > 1 else "".join(map(str, tokens)) or "all"
        kl = common.spread(r["kl"] for r in own)
        lines.append((key[0], key[1], f"{reached:.2f}", kept, kl, f"{common.perplexity(own):.2f}"))
    return common.table(("", "cache", "ratio", "tokens a head", "KL", "PPL"), lines)


def main() -> None:
    args = arguments()
    model, tokenizer = common.load(args)
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    rows: list[dict[str, Any]] = []
    length = args.prompt_tokens + args.score_tokens
    with kvc.enable(model):
        for text, index, ids in common.windows(args.text or ["prose", "code"], tokenizer, args.windows, length):
            print(f"{text} {index}", flush=True)
            rows += [
                {"text": text, "window": index, **row} for row in rows_of(Window(model, ids, args.prompt_tokens), args)
            ]
            common.write_report(args, rows=rows)
    off = [row for row in rows if row["target"] and abs(row["ratio"] / row["target"] - 1) > TOLERANCE]
    print(f"\n{whole_table(rows)}\n\n{best(rows, ratios)}")
    for row in off:
        print(f"not within {TOLERANCE:.0%}: {row['cache']} at {row['target']:g}x has {row['ratio']:.2f}x")


if __name__ == "__main__":
    main()
