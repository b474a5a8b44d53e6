"""What CPAC saves and loses: on prose, mixed text, a document that occurs twice, and rows with one template.

    python eval/cpac.py --text novel.txt --dtype bfloat16 --json results/cpac.json

Every part is measured beside the plain codec. Ratios are against the model's dtype, over all layers and, where a model
has windows, over its full layers alone; KL and perplexity are against a cache that loses nothing.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import bytes_of, full_layers, load, parser, table, write_report

import hf_kvcompress as kvc
from hf_kvcompress.clustered.store import ClusteredPages
from hf_kvcompress.layer import CompressedLayer
from hf_kvcompress.scoring import read_text, score, standard_text

PARTS = ("prose", "mixed", "repeated", "template", "depth")
HEADER = ("cache", "ratio", "full layers", "pages shared", "KL", "dPPL %", "prefill s", "ms a step")


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--text", action="append", help="UTF-8 files of prose; by default the package's own")
    made.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    made.add_argument("--codecs", default="eqrot4,eqrot3", help="comma-separated; each plain and under CPAC")
    made.add_argument("--levels", default="2,3", help="compression levels of CPAC")
    made.add_argument("--offset", type=int, default=5000, help="token of the text that the first part begins at")
    made.add_argument("--document", type=int, default=1000, help="tokens of the repeated document")
    made.add_argument("--rows", type=int, default=8, help="rows with one template")
    made.add_argument("--template", type=int, default=600, help="tokens of the template")
    return made.parse_args()


@dataclass
class Contender:
    """A cache by name."""

    name: str
    make: Callable[[], Any]


def contenders(config: Any, args: argparse.Namespace) -> list[Contender]:
    found = []
    for codec in args.codecs.split(","):
        found.append(Contender(codec, lambda codec=codec: kvc.CompressedCache(config, codec=codec)))
        for level in map(int, args.levels.split(",")):
            make = lambda codec=codec, level=level: kvc.CPACCache(config, codec=codec, compression_level=level)  # noqa: E731
            found.append(Contender(f"CPAC {codec} level {level}", make))
    return found


def measured(cache: Any, config: Any) -> dict[str, Any]:
    """Ratios, over all layers and the full ones, and the share of pages that are not plain."""
    stats, full = cache.stats(), full_layers(config)
    own = [layer for layer in stats.layers if layer.layer in full]
    row = {
        "ratio": stats["compression_ratio"],
        "full_ratio": sum(layer.bytes_uncompressed for layer in own) / bytes_of(cache, full),
        "shared": 0.0,
    }
    if isinstance(cache, kvc.CPACCache):
        found = cache.get_compression_stats()
        pages = found["compressed_blocks"] + found["plain_blocks"]
        row |= {"shared": found["compressed_blocks"] / max(pages, 1), "by_bits": found["differences_by_bits"]}
    return row


def line(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    numbers = (f"{row['ratio']:.2f}", f"{row['full_ratio']:.2f}", f"{row['shared']:.0%}", f"{row['kl']:.4f}")
    return (name, *numbers, f"{row['dppl']:+.2f}", f"{row['prefill']:.1f}", f"{row['step_ms']:.0f}")


def one_row(model: Any, ids: torch.Tensor, prompt: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Score the tokens behind a prompt through every cache."""
    config, rows = model.config, []
    with kvc.enable(model):
        base = score(model, ids, lambda: kvc.CompressedCache(config, codec="identity"), prompt)
        for entrant in contenders(config, args):
            got = score(model, ids, entrant.make, prompt, reference=base)
            change = 100 * (got.perplexity / base.perplexity - 1)
            steps = math.ceil((ids.shape[1] - 1 - prompt) / 32)
            times = {"prefill": got.prefill_seconds, "step_ms": 1000 * got.feed_seconds / steps}
            rows.append(
                {"cache": entrant.name, **measured(got.cache, config), "kl": got.mean_kl, "dppl": change, **times}
            )
            print(line(entrant.name, rows[-1]), flush=True)
    return rows


@torch.inference_mode()
def template_rows(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows that share their first tokens and then differ, in text and in length; the last 32 tokens are scored."""
    config, tails, scored = model.config, [], 32
    begin = ids[:, : args.template]
    for row in range(args.rows):
        start = args.template + 200 * (row + 1)
        tails.append(ids[:, start : start + 40 + 7 * row % 29 + scored])
    longest = max(tail.shape[1] for tail in tails)
    batch = torch.zeros(args.rows, args.template + longest, dtype=torch.long, device=ids.device)
    mask = torch.zeros_like(batch)
    for row, tail in enumerate(tails):
        own = torch.cat([begin, tail], dim=1)
        batch[row, -own.shape[1] :], mask[row, -own.shape[1] :] = own[0], 1
    at, prompt = (mask.cumsum(1) - 1).clamp(min=0), batch.shape[1] - scored
    rows, base = [], None
    with kvc.enable(model):
        identity = Contender("identity", lambda: kvc.CompressedCache(config, codec="identity"))
        for entrant in [identity, *contenders(config, args)]:
            cache, begun = entrant.make(), time.perf_counter()
            given = {"past_key_values": cache, "use_cache": True}
            first = {"attention_mask": mask[:, :prompt], "position_ids": at[:, :prompt], "logits_to_keep": 1}
            model(batch[:, :prompt], **first, **given)
            prefill, begun = time.perf_counter() - begun, time.perf_counter()
            held = None if entrant is identity else measured(cache, config)
            logits = model(batch[:, prompt:], attention_mask=mask, position_ids=at[:, prompt:], **given).logits
            took = time.perf_counter() - begun
            log_probs = logits[:, :-1].float().log_softmax(-1)
            nll = -log_probs.gather(2, batch[:, prompt + 1 :, None]).mean().item()
            if held is None:
                base = log_probs, nll
                continue
            assert base is not None
            kl = (base[0].exp() * (base[0] - log_probs)).sum(-1).mean().item()
            change = 100 * (math.exp(nll - base[1]) - 1)
            rows.append(
                {"cache": entrant.name, **held, "kl": kl, "dppl": change, "prefill": prefill, "step_ms": 1e3 * took}
            )
            print(line(entrant.name, rows[-1]), flush=True)
    return rows


def by_depth(model: Any, ids: torch.Tensor, prompt: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bits that repeated pages take in each layer, if no layer had a window (what a window drops cannot be shared)."""

    def make() -> Any:
        cache = kvc.CPACCache(model.config, codec=args.codecs.split(",")[0], compression_level=3)
        for index, layer in enumerate(cache.layers):
            whole = CompressedLayer(layer.config, index)
            whole.context, whole.sharing = layer.context, layer.sharing
            cache.layers[index] = whole
        return cache

    cache = make()
    with kvc.enable(model), torch.inference_mode():
        model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = []
    for layer in cache.layers:
        pages: ClusteredPages = layer.storage.pages
        row: dict[str, Any] = {"layer": layer.index}
        for role in ("key", "value"):
            total = sum(pages.counts) // pages.page_size * pages.heads
            bits: dict[str, float] = {}
            for slab in pages.slabs:
                for group in slab.pools[role].groups if hasattr(slab, "pools") else ():
                    bits[str(group.nbits)] = bits.get(str(group.nbits), 0.0) + len(group.shift) / total
            row[role] = bits
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    args = arguments()
    parts = args.parts.split(",")
    results: dict[str, Any] = {}
    model, tokenizer = load(args)
    for path in args.text or [None]:
        text = standard_text("prose") if path is None else read_text(path)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = ids[:, args.offset if ids.shape[1] > 4 * args.offset else 0 :].to(model.device)
        results[str(path or "prose")] = of_text(model, tokenizer, ids, args, parts)
    for name, own in results.items():
        for part, rows in own.items():
            if part != "depth":
                print(f"\n{name}: {part}\n" + table(HEADER, [line(row["cache"], row) for row in rows]))
    write_report(args, results=results)


def of_text(
    model: Any, tokenizer: Any, ids: torch.Tensor, args: argparse.Namespace, parts: list[str]
) -> dict[str, list[dict[str, Any]]]:
    found = {}
    begin = torch.tensor([tokenizer("")["input_ids"]], dtype=torch.long, device=ids.device).view(1, -1)
    if "prose" in parts:
        print("prose", flush=True)
        found["prose"] = one_row(model, torch.cat([begin, ids[:, :2047]], dim=1), 1536, args)
    if "mixed" in parts:
        print("mixed", flush=True)
        code = tokenizer(standard_text("code"), add_special_tokens=False, return_tensors="pt")["input_ids"]
        text = torch.cat([begin, ids[:, :767], code.to(ids.device)[:, :1280]], dim=1)
        found["mixed"] = one_row(model, text, 1536, args)
    size = args.document
    document, bridge, after = ids[:, :size], ids[:, 3 * size : 3 * size + 233], ids[:, size : size + 257]
    twice = torch.cat([begin, document, bridge, document, after], dim=1)
    if "repeated" in parts:
        print("repeated", flush=True)
        found["repeated"] = one_row(model, twice, twice.shape[1] - 257, args)
    if "depth" in parts:
        print("depth", flush=True)
        found["depth"] = by_depth(model, twice, twice.shape[1] - 257, args)
    if "template" in parts:
        print("template", flush=True)
        found["template"] = template_rows(model, torch.cat([begin, ids], dim=1), args)
    return found


if __name__ == "__main__":
    main()
