"""A trained score beside the other policies: perplexity and KL through the cache at several kept fractions.

    kvcompress train-policy --model MODEL --text a.txt --text b.txt --output policy.safetensors
    python eval/learned_policy.py --model MODEL --weights policy.safetensors --text unseen.txt --text code --text prose

Codec identity, so that only eviction counts; layers with full attention only; the same sinks, recent window and share
of recent tokens for all. Every window is scored with every policy, so differences are taken window by window. Give no
text that the weights were trained on: the script refuses one whose hash is in the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvcompress as kvc
from hf_kvcompress.environment import devices, versions
from hf_kvcompress.integrations.demo_model import demo_model
from hf_kvcompress.policies.learned import LearnedWeights
from hf_kvcompress.scoring import read_text, score, standard_text

POLICIES = "learned,h2o,snapkv,expected,keydiff,random,streaming"
Windows = dict[str, list[torch.Tensor]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder; by default the model of the demo extra")
    parser.add_argument("--weights", action="append", required=True, help="what `kvcompress train-policy` wrote")
    parser.add_argument("--text", action="append", help="a UTF-8 file, `prose` or `code`; may be repeated")
    parser.add_argument("--windows", type=int, default=4, help="of each text, evenly spread, without overlap")
    parser.add_argument("--prompt-tokens", type=int, default=2047)
    parser.add_argument("--score-tokens", type=int, default=257)
    parser.add_argument("--step", type=int, default=32, help="tokens of a scored forward")
    parser.add_argument("--fractions", default="0.5,0.25,0.1", help="parts of the tokens that stay")
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--dtype", default="float32", help="bfloat16 is faster; its rounding costs KL of about .001")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def load_windows(names: list[str], tokenizer: Any, number: int, length: int, trained_on: list[str]) -> Windows:
    """Token ids `[1, length]` by text, each window beginning with the tokenizer's special tokens."""
    windows: Windows = {}
    prefix = torch.tensor(tokenizer("")["input_ids"], dtype=torch.long)
    size = length - len(prefix)
    for name in names:
        text = standard_text(name) if name in ("prose", "code") else read_text(name)
        if hashlib.sha256(text.encode()).hexdigest()[:16] in trained_on:
            raise SystemExit(f"text: expected one that the weights were not trained on, got {name}")
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        pieces = [piece for piece in ids.split(size) if len(piece) == size]
        if len(pieces) < number:
            raise SystemExit(f"windows: expected at most {len(pieces)} for {name}, got {number}")
        chosen = [pieces[i * (len(pieces) - 1) // max(number - 1, 1)] for i in range(number)]
        windows[Path(name).stem] = [torch.cat([prefix, piece])[None] for piece in chosen]
    return windows


def contenders(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings by name; "learned" stands for every file of weights."""
    found: dict[str, dict[str, Any]] = {}
    for name in args.policies.split(","):
        if name != "learned":
            found[name] = {"policy": name}
            continue
        for file in args.weights:
            label = name if len(args.weights) == 1 else f"{name} ({Path(file).stem})"
            found[label] = {"policy": name, "policy_options": {"weights": file}}
    return found


def measure(model: Any, windows: Windows, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every policy, fraction, text and window."""
    rows = []
    for text, pieces in windows.items():
        for index, ids in enumerate(pieces):
            ids = ids.to(model.device)

            def measured(reference: Any = None, ids: torch.Tensor = ids, **settings: Any) -> Any:
                def make() -> kvc.CompressedCache:
                    return kvc.CompressedCache(model.config, codec="identity", **settings)

                return score(model, ids, make, args.prompt_tokens, args.step, reference=reference)

            with kvc.enable(model):
                base = measured()
                for policy, settings in contenders(args).items():
                    for fraction in map(float, args.fractions.split(",")):
                        got = measured(base, budget=fraction, **settings)
                        loss = (got.nll.mean() - base.nll.mean()).item()
                        row = {"policy": policy, "fraction": fraction, "text": text, "window": index}
                        rows.append({**row, "kl": got.mean_kl, "loss": loss, "base": base.nll.mean().item()})
            print(f"{text} {index + 1}/{len(pieces)}", flush=True)
    return rows


def summary(rows: list[dict[str, Any]], policy: str, fraction: float, text: str | None) -> dict[str, float]:
    """Mean KL and its standard error over windows, perplexity, and the difference to H2O window by window."""
    chosen = [r for r in rows if r["fraction"] == fraction and text in (None, r["text"])]
    own = [r for r in chosen if r["policy"] == policy]
    h2o = {(r["text"], r["window"]): r["kl"] for r in chosen if r["policy"] == "h2o"}
    apart = [r["kl"] - h2o[r["text"], r["window"]] for r in own if h2o]

    def error(numbers: list[float]) -> float:
        return statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan

    return {
        "kl": statistics.fmean(r["kl"] for r in own),
        "kl_error": error([r["kl"] for r in own]),
        "perplexity_factor": math.exp(statistics.fmean(r["loss"] for r in own)),
        "apart": statistics.fmean(apart) if apart else math.nan,
        "apart_error": error(apart),
        "better": sum(a < 0 for a in apart),
        "windows": len(own),
    }


def main() -> None:
    args = arguments()
    source = args.model or str(demo_model(print))
    tokenizer = AutoTokenizer.from_pretrained(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype)).eval().to(device)
    trained = [LearnedWeights.open(file).config.training for file in args.weights]
    length = args.prompt_tokens + args.score_tokens
    windows = load_windows(
        args.text or ["code", "prose"],
        tokenizer,
        args.windows,
        length,
        [own for file in trained for own in file["texts"]],
    )
    rows = measure(model, windows, args)
    summaries = []
    print("| text | kept | policy | KL | perplexity | KL less H2O's | windows better |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for text in [*windows, None]:
        for fraction in map(float, args.fractions.split(",")):
            for policy in contenders(args):
                own = summary(rows, policy, fraction, text)
                summaries.append({"text": text or "all", "fraction": fraction, "policy": policy, **own})
                print(
                    f"| {text or 'all'} | {fraction:.0%} | {policy} | {own['kl']:.4f} ± {own['kl_error']:.4f} | "
                    f"x {own['perplexity_factor']:.3f} | {own['apart']:+.4f} ± {own['apart_error']:.4f} | "
                    f"{own['better']}/{own['windows']} |"
                )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        report = {"versions": versions(), "devices": devices(), "settings": given, "training": trained}
        args.json.write_text(json.dumps({**report, "summary": summaries, "rows": rows}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
