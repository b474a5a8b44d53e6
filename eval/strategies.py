"""Every strategy of the package beside transformers' quantized layer, on the same tokens: KL over real bytes.

    python eval/strategies.py --text code --calibration calibration.safetensors --json results/strategies.json

Bytes are those of every tensor that the layers with full attention hold at the end; sliding layers keep their window
exact in all of them, since transformers' quantized layer cannot take one. A strategy that reaches a ratio only by
dropping tokens says so in its name.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from transformers import DynamicCache

import hf_kvcompress as kvc
from hf_kvcompress.commands.contenders import contender
from hf_kvcompress.scoring import score

RATIOS = (2.0, 4.0, 6.0, 8.0)
CODECS = ("int8", "eqrot4", "eqrot3", "eqrot3/eqrot2", "eqrot2", "turbo4", "haar3", "haar2", "kivi4", "kivi2")
TIERS = {
    "HierarchicalCache (exact, int8, eqrot4)": (("identity", "int8", "eqrot4"), 0.5),
    "HierarchicalCache (exact, eqrot4, eqrot2)": (("identity", "eqrot4", "eqrot2"), 0.25),
    "HierarchicalCache (eqrot4, eqrot2)": (("eqrot4", "eqrot2"), 0.2),
}


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--text", action="append", help="a UTF-8 file, `prose` or `code`; may be repeated")
    parser.add_argument("--windows", type=int, default=1, help="of each text, evenly spread, without overlap")
    parser.add_argument("--prompt-tokens", type=int, default=3072)
    parser.add_argument("--score-tokens", type=int, default=512)
    parser.add_argument("--calibration", help="what `kvcompress calibrate` wrote for this model, for TransformCache")
    return parser.parse_args()


def strategies(config: Any, calibration: str | None) -> dict[str, Callable[[], Any]]:
    """Makers of every cache by name."""
    exact = {"sliding": "exact", "page_size": 32}

    def packed(**settings: Any) -> Callable[[], Any]:
        return lambda: kvc.CompressedCache(config, **{**exact, **settings})

    makers: dict[str, Callable[[], Any]] = {}
    for name in CODECS:
        keys, _, values = name.partition("/")
        paged = {} if not name.startswith("kivi") else {"page_size": 64}
        makers[name] = packed(keys=keys, values=values or keys, **paged)
    for name, (levels, ratio) in TIERS.items():
        makers[name] = lambda levels=levels, ratio=ratio: kvc.HierarchicalCache(
            config, levels=levels, ratio=ratio, **exact
        )
    for codec in ("eqrot4", "eqrot3"):
        makers[f"CPACCache ({codec})"] = lambda codec=codec: kvc.CPACCache(config, codec=codec, **exact)
    if calibration is not None:
        for bits in (3, 2.5, 2, 1.6):
            makers[f"TransformCache ({bits} bits)"] = lambda bits=bits: kvc.TransformCache(
                config, calibration=calibration, bits=bits, **exact
            )
    for part in (0.5, 0.25):
        makers[f"h2o drops {1 - part:.0%}"] = packed(codec="identity", policy="h2o", budget=part)
        makers[f"eqrot3/eqrot2, h2o drops {1 - part:.0%}"] = packed(
            keys="eqrot3", values="eqrot2", policy="h2o", budget=part
        )
        makers[f"h2o, {1 - part:.0%} demoted to eqrot2"] = packed(
            codec="eqrot4", policy="h2o", budget=part, demote_to="eqrot2"
        )
    for name in ("quanto4-full", "quanto2-full"):
        makers[f"transformers {name}"] = contender(name, config).make
    return makers


def table(rows: list[dict[str, Any]]) -> str:
    """By ratio, over all windows."""
    names = sorted({r["cache"] for r in rows}, key=lambda n: min(r["ratio"] for r in rows if r["cache"] == n))
    lines = []
    for name in names:
        own = [r for r in rows if r["cache"] == name]
        ratio = sum(r["ratio"] for r in own) / len(own)
        worse = 100 * (math.exp(sum(r["loss"] for r in own) / len(own)) - 1)
        top1 = sum(r["top1"] for r in own) / len(own)
        lines.append((name, f"{ratio:.2f}", common.spread(r["kl"] for r in own), f"{worse:+.1f} %", f"{top1:.3f}"))
    return common.table(("cache", "ratio", "KL", "perplexity", "top-1"), lines)


def best(rows: list[dict[str, Any]]) -> str:
    """The least KL at each ratio or more."""
    lines = []
    for ratio in RATIOS:
        mean: dict[str, tuple[float, float]] = {}
        for name in {r["cache"] for r in rows}:
            own = [r for r in rows if r["cache"] == name]
            mean[name] = (sum(r["ratio"] for r in own) / len(own), sum(r["kl"] for r in own) / len(own))
        fit = sorted((kl, name, own) for name, (own, kl) in mean.items() if own >= ratio)
        lines.append([f"{ratio:g}x", *(f"{name}: {kl:.4f} at {own:.2f}x" for kl, name, own in fit[:3])])
    return common.table(("bytes", "best", "second", "third"), lines)


def main() -> None:
    args = arguments()
    model, tokenizer = common.load(args)
    full, length = common.full_layers(model.config), args.prompt_tokens + args.score_tokens
    rows: list[dict[str, Any]] = []
    with kvc.enable(model):
        for text, index, ids in common.windows(args.text or ["prose", "code"], tokenizer, args.windows, length):
            ids = ids.to(model.device)
            base = score(model, ids, lambda: DynamicCache(config=model.config), args.prompt_tokens, 32)
            whole = common.bytes_of(base.cache, full)
            for name, make in strategies(model.config, args.calibration).items():
                begun = time.perf_counter()
                got = score(model, ids, make, args.prompt_tokens, 32, reference=base)
                row = {"text": text, "window": index, "cache": name, "ratio": whole / common.bytes_of(got.cache, full)}
                row |= {
                    "kl": got.mean_kl,
                    "loss": (got.nll.mean() - base.nll.mean()).item(),
                    "top1": got.top1_agreement,
                }
                rows.append({**row, "seconds": time.perf_counter() - begun})
                print(f"  {name:44} {row['ratio']:6.2f} {row['kl']:.4f} {row['loss']:+.4f}", flush=True)
            common.write_report(args, rows=rows)
    print(f"\n{table(rows)}\n\n{best(rows)}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
