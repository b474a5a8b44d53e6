"""TransformCache beside equalised rotation on texts that its calibration has not seen: KL, perplexity, bits.

    python eval/transform.py --calibrate a.txt --calibrate b.txt --text c.txt --text code --json results/transform.json

All layers are packed; the prompt is read in one pass and the text after it through the packed prompt, 32 tokens at a
time. Bits are of packed numbers, metadata included, the calibration not: it belongs to the model, as its weights do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import common
import torch
from transformers import DynamicCache

import hf_kvcompress as kvc
from hf_kvcompress.calibrating import calibrate
from hf_kvcompress.calibration import Calibration
from hf_kvcompress.commands.compare import packed_bits
from hf_kvcompress.scoring import read_text, score, standard_text, tokenize
from hf_kvcompress.strategies import TRANSFORM_BITS

ROTATED = ("eqrot4/eqrot4", "eqrot3/eqrot3", "eqrot3/eqrot2", "eqrot2/eqrot2")


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--calibrate", action="append", help="a text to calibrate on; may be repeated")
    parser.add_argument("--calibration", type=Path, help="a file that `kvcompress calibrate` wrote, instead")
    parser.add_argument("--text", action="append", help="a UTF-8 file, `prose` or `code`; may be repeated")
    parser.add_argument("--bits", default=",".join(f"{bits:g}" for bits in TRANSFORM_BITS))
    parser.add_argument("--beside", default=",".join(ROTATED), help="keys/values of other caches, comma-separated")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--prompt-tokens", type=int, default=1536)
    parser.add_argument("--score-tokens", type=int, default=512)
    return parser.parse_args()


def text_of(name: str) -> str:
    return standard_text(name) if name in ("prose", "code") else read_text(name)


def settings_of(args: argparse.Namespace, calibration: Calibration) -> dict[str, dict[str, Any]]:
    """Every cache of the table by name."""
    found: dict[str, dict[str, Any]] = {}
    for name in filter(None, args.beside.split(",")):
        keys, values = name.split("/")
        found[name] = {"keys": keys, "values": values}
    for bits in args.bits.split(","):
        keys, values = TRANSFORM_BITS[float(bits)]
        found[f"{keys}/{values}"] = {"keys": keys, "values": values, "calibration": calibration}
    return found


def main() -> None:
    args = arguments()
    model, tokenizer = common.load(args)
    if args.calibration:
        calibration = Calibration.open(args.calibration)
    else:
        begun = time.perf_counter()
        texts = [text_of(name) for name in args.calibrate or ["prose"]]
        calibration = calibrate(model, texts, tokenizer, tokens=args.calibration_tokens)
        print(f"calibrated in {time.perf_counter() - begun:.0f} s, {calibration.nbytes:,} bytes", flush=True)
    length = args.prompt_tokens + args.score_tokens + 1
    rows: list[dict[str, Any]] = []
    with kvc.enable(model), torch.inference_mode():
        for text in args.text or ["code"]:
            ids = tokenize(tokenizer, text_of(text), length, model.device)
            base = score(model, ids, lambda: DynamicCache(config=model.config), args.prompt_tokens)
            for name, settings in settings_of(args, calibration).items():

                def make(settings: dict[str, Any] = settings) -> Any:
                    return kvc.CompressedCache(model.config, **settings)

                got = score(model, ids, make, args.prompt_tokens, reference=base)
                row = {"text": Path(text).stem, "cache": name, "bits": packed_bits(got.cache), "kl": got.mean_kl}
                row |= {"dppl": got.perplexity / base.perplexity - 1, "top1": got.top1_agreement}
                rows.append(row)
                print(f"{row['text']:12} {name:18} {row['bits']:.2f} {row['kl']:.4f} {row['dppl']:+.2%}", flush=True)
    lines = []
    for name in settings_of(args, calibration):
        own = [row for row in rows if row["cache"] == name]
        kls = [f"{row['kl']:.4f}" for row in own]
        changes = [f"{row['dppl']:+.1%}" for row in own]
        lines.append((name, f"{own[0]['bits']:.2f}", *kls, *changes))
    texts = list(dict.fromkeys(row["text"] for row in rows))
    header = ("keys/values", "bits", *(f"KL {t}" for t in texts), *(f"PPL {t}" for t in texts))
    print("\n" + common.table(header, lines))
    common.write_report(args, rows=rows)


if __name__ == "__main__":
    main()
