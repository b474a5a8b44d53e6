"""Quality of caches on a real model: perplexity, KL, top-1 agreement over several texts, pass keys at several depths.

    python eval/quality.py --caches near-lossless,balanced,small,tiny --text novel.txt --json results/quality.json

One aligned line a cache and text, then a line of means. How the numbers are made: docs/evaluation.md. Bytes and speed
are in `kvcompress demo`, which holds its caches in the model's own dtype.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcompress.commands.compare import packed_bits
from hf_kvcompress.commands.contenders import BASELINE, Contender, contender
from hf_kvcompress.config import PRESETS
from hf_kvcompress.environment import devices, versions
from hf_kvcompress.integrations.demo_model import demo_model
from hf_kvcompress.scoring import Score, decode, hide_passkey, read_text, score, standard_text, tokenize

HEADER = f"{'cache':24} {'text':16} {'bits':>6} {'PPL':>8} {'dPPL':>8} {'KL':>8} {'top-1':>6} {'keys':>6} {'s':>6}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder; by default the model of the demo extra")
    parser.add_argument("--caches", default=",".join(PRESETS), help="comma-separated names, as in `kvcompress demo`")
    parser.add_argument("--text", action="append", help="a UTF-8 file, `prose` or `code`; may be repeated")
    parser.add_argument("--prompt-tokens", type=int, default=1536)
    parser.add_argument("--score-tokens", type=int, default=512)
    parser.add_argument("--step", type=int, default=32, help="tokens of a scored forward")
    parser.add_argument("--depths", default="", help="comma-separated depths of pass keys, such as 0.1,0.5,0.9")
    parser.add_argument("--passkey-tokens", type=int, default=2500)
    parser.add_argument("--dtype", default="float32", help="KL below .001 is rounding noise in bfloat16")
    parser.add_argument("--no-enable", action="store_true", help="keep the model's own attention")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def load_texts(names: list[str], tokenizer: Any, length: int, device: Any) -> dict[str, torch.Tensor]:
    """Token ids by text name."""
    texts = {}
    for name in names:
        text = standard_text(name) if name in ("prose", "code") else read_text(name)
        texts[Path(name).stem] = tokenize(tokenizer, text, length, device)
    return texts


def found_passkeys(
    model: Any, tokenizer: Any, entrant: Contender, text: torch.Tensor, depths: list[float]
) -> list[bool]:
    """Whether the pass key at each depth is found after the prompt was compressed."""
    found = []
    for seed, depth in enumerate(depths):
        hidden = hide_passkey(tokenizer, text, depth, seed)
        got = decode(model, hidden.prompt, hidden.question, entrant.make, 10)
        found.append(hidden.found_in(tokenizer.decode(got.tokens)))
    return found


def measure(model: Any, entrant: Contender, ids: torch.Tensor, args: argparse.Namespace, base: dict[str, Any]) -> Any:
    """One cache on one text; `base` is the uncompressed measurement of the same text, empty for itself."""
    reference: Score | None = base.get("score")
    got = score(model, ids, entrant.make, args.prompt_tokens, args.step, reference=reference)
    return {
        "score": got,
        "perplexity": got.perplexity,
        "delta_perplexity": got.perplexity - (reference or got).perplexity,
        "mean_kl": got.mean_kl,
        "top1_agreement": got.top1_agreement,
        "bits": packed_bits(got.cache) or model.dtype.itemsize * 8.0,
    }


def line(name: str, text: str, row: dict[str, Any]) -> str:
    return (
        f"{name:24} {text:16} {row['bits']:6.2f} {row['perplexity']:8.3f} {row['delta_perplexity']:+8.3f} "
        f"{row['mean_kl']:8.5f} {row['top1_agreement']:6.3f} {row.get('passkeys', ''):>6} {row['seconds']:6.1f}"
    )


def main() -> None:
    args = arguments()
    source = args.model or str(demo_model(print))
    tokenizer = AutoTokenizer.from_pretrained(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype)).eval().to(device)
    texts = load_texts(args.text or ["prose", "code"], tokenizer, args.prompt_tokens + args.score_tokens, device)
    depths = [float(depth) for depth in args.depths.split(",") if depth]
    haystack = tokenize(tokenizer, standard_text(), args.passkey_tokens, device)
    baselines: dict[str, dict[str, Any]] = {}
    rows = []
    print(HEADER)
    for name in [BASELINE, *(n for n in args.caches.split(",") if n != BASELINE)]:
        entrant = contender(name, model.config)
        if args.no_enable:
            entrant = Contender(entrant.name, entrant.make)
        measured = []
        with entrant.around(model):
            for text, ids in texts.items():
                begun = time.perf_counter()
                row = measure(model, entrant, ids, args, baselines.get(text, {}))
                if name == BASELINE:
                    baselines[text] = dict(row)
                del row["score"]
                row["seconds"] = time.perf_counter() - begun
                measured.append(row)
                rows.append({"cache": name, "text": text, **row})
                print(line(name, text, row), flush=True)
            mean = {key: sum(row[key] for row in measured) / len(measured) for key in measured[0]}
            if depths:
                found = found_passkeys(model, tokenizer, entrant, haystack, depths)
                mean["passkeys"] = f"{sum(found)}/{len(found)}"
        rows.append({"cache": name, "text": "mean", **mean})
        print(line(name, "mean", mean), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        report = {"versions": versions(), "devices": devices(), "settings": settings, "rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
