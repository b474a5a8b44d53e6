"""What `kvc.analyze` finds in prose, code, a template, a repeated document, shuffled text and generated text.

python eval/redundancy.py --model NAME --text novel1.txt --text novel2.txt --dtype bfloat16 --json redundancy.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import load, parser, table, write_report

import hf_kvcompress as kvc
from hf_kvcompress.analysis import AnalysisReport, Prompt
from hf_kvcompress.analysis.tables import mean_of
from hf_kvcompress.analysis.views import NAMES
from hf_kvcompress.scoring import read_text, standard_text

CONTENTS = ("prose", "shuffled", "code", "template", "repeated", "greedy", "sampled")
THRESHOLDS = (0.7, 0.8, 0.9)
HEADER = ("content", "pages", "repeated text", *NAMES.values())
SAVINGS = ("content", "pages are shared by", "cosine", "alike", "estimate", "CPAC shared", "CPAC saved", "KL", "dPPL")


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--text", action="append", required=True, help="UTF-8 files of prose, one at least")
    made.add_argument("--contents", default=",".join(CONTENTS), help="comma-separated")
    made.add_argument("--length", type=int, default=2048, help="tokens of a passage")
    made.add_argument("--offset", type=int, default=5000, help="token of a text that its passage begins at")
    made.add_argument("--measured", type=int, default=2, help="prompts that caches are measured on")
    made.add_argument("--rows", type=int, default=6, help="prompts with one template of 600 tokens")
    made.add_argument("--folder", type=Path, help="write each report here")
    return made.parse_args()


def prompts_of(content: str, tokenizer: Any, args: argparse.Namespace) -> list[Prompt]:
    """Token ids with the tokenizer's special tokens before them."""
    begin = torch.tensor([tokenizer("")["input_ids"]], dtype=torch.long).view(1, -1)
    texts = [standard_text("code")] if content == "code" else [read_text(path) for path in args.text]
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
    starts = [0, 20_000] if content == "code" else [args.offset]
    passages = [own[:, start : start + args.length] for own in ids for start in starts]
    if content == "shuffled":
        draw = torch.Generator().manual_seed(0)
        passages = [own[:, torch.randperm(own.shape[1], generator=draw)] for own in passages]
    elif content == "template":
        first = ids[0][:, args.offset :]
        tails = [first[:, 800 + 250 * row :][:, : 200 + 7 * row] for row in range(args.rows)]
        passages = [torch.cat([first[:, :600], tail], dim=1) for tail in tails]
    elif content == "repeated":
        passages = [
            torch.cat([own[:, :1000], own[:, 3000:3233], own[:, :1000]], dim=1)
            for own in (whole[:, args.offset :] for whole in ids)
        ]
    elif content in ("greedy", "sampled"):
        passages = [own[:, :128] for own in passages]
    return [Prompt(f"{content} {i}", torch.cat([begin, own], dim=1)) for i, own in enumerate(passages, 1)]


def analysed(model: Any, tokenizer: Any, content: str, args: argparse.Namespace) -> AnalysisReport:
    how: dict[str, Any] = {"max_tokens": 0, "measured_prompts": args.measured}
    if content in ("greedy", "sampled"):
        how = {"max_tokens": 512, "temperature": 0.0 if content == "greedy" else 1.0, "measured_prompts": 0}
    return kvc.analyze(model, tokenizer, prompts_of(content, tokenizer, args), thresholds=THRESHOLDS, **how)


def lines(content: str, report: AnalysisReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Of the table of similarities, and of that of savings."""
    found = report.found
    cells = []
    for kind in NAMES:
        rows = [row for row in found["heads"] if row["kind"] == kind]
        near, chance = mean_of(rows, "nearest_within"), mean_of(rows, "nearest_within_shuffled")
        same = mean_of(rows, "repeated_within")
        cells.append(f"{near:.2f} ({chance:.2f})" + ("" if same is None else f", {same:.2f}"))
    text = found["text"]
    first = (content, str(text["pages"]), f"{text['repeated_within']:.0%}, {text['repeated_across']:.0%}", *cells)
    second = []
    for key, scope in (("alone", "within"), ("batch", "batch")):
        measured = {own["cache"]: own for own in found["measured"][key]}
        for own in found["savings"]["total"]:
            if own["scope"] != scope:
                continue
            taken = measured.get(f"CPACCache:similarity_threshold={own['threshold']:g}")
            plain = measured.get("balanced")
            cost = ("", "", "", "")
            if taken and plain:
                cost = (
                    f"{taken['pages_shared']:.1%}",
                    f"{1 - taken['nbytes'] / plain['nbytes']:.1%}",
                    f"{taken['kl']:.4f} ({plain['kl']:.4f})",
                    f"{taken['perplexity_change']:+.2%} ({plain['perplexity_change']:+.2%})",
                )
            alike = f"{own['alike'] / max(own['pages'], 1):.1%} ({own['alike_shuffled'] / max(own['pages'], 1):.1%})"
            second.append((content, scope, f"{own['threshold']:g}", alike, f"{own['saved_share']:.1%}", *cost))
    return first, second


def main() -> None:
    args = arguments()
    model, tokenizer = load(args)
    results, similar, savings = {}, [], []
    for content in args.contents.split(","):
        report = analysed(model, tokenizer, content, args)
        if args.folder:
            report.save(args.folder / content)
        first, second = lines(content, report)
        similar.append(first)
        savings += second
        results[content] = {name: report[name] for name in ("text", "savings", "measured", "recommendation", "prompts")}
        print(table(HEADER, [first]), table(SAVINGS, second), report, sep="\n\n", flush=True)
    print(table(HEADER, similar), table(SAVINGS, savings), sep="\n\n")
    write_report(args, results=results)


if __name__ == "__main__":
    main()
