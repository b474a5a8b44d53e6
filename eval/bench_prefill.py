"""What compressing a long prompt costs: time to store it, as a part of the prompt's prefill on a real model.

    python eval/bench_prefill.py --tokens 16384 --json results/prefill.json

The prompt is prefilled through a compressed cache; the time inside the cache's `commit` (dropping padding, statistics,
encoding, packing) is summed over layers and divided by the whole prefill. The model is the demo's, or any `--model`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hf_kvcompress as kvc
from hf_kvcompress.environment import devices, versions
from hf_kvcompress.integrations.demo_model import demo_model
from hf_kvcompress.layer import CompressedLayer
from hf_kvcompress.scoring import standard_text, tokenize


def prefill(model, ids: torch.Tensor, cache) -> float:
    started = time.perf_counter()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--presets", nargs="+", default=list(kvc.PRESETS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = options.model or demo_model(print)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    ids = tokenize(AutoTokenizer.from_pretrained(source), standard_text(), options.tokens, model.device)
    spent = 0.0
    commit = CompressedLayer.commit

    def timed(layer: CompressedLayer) -> None:
        nonlocal spent
        started = time.perf_counter()
        commit(layer)
        spent += time.perf_counter() - started

    CompressedLayer.commit = timed  # type: ignore[method-assign]
    rows = []
    with torch.inference_mode(), kvc.enable(model):
        prefill(model, ids[:, :1024], DynamicCache(config=model.config))
        print(
            f"uncompressed  {prefill(model, ids, DynamicCache(config=model.config)):6.2f} s for {options.tokens} tokens"
        )
        for preset in options.presets:
            spent = 0.0
            total = prefill(model, ids, kvc.CompressedCache(model.config, preset=preset))
            rows.append({"preset": preset, "prefill_s": total, "compress_s": spent, "part": spent / total})
            print(f"{preset:13} {total:6.2f} s, compressing {spent:5.2f} s = {spent / total:.1%}", flush=True)
    if options.json:
        report = {"versions": versions(), "devices": devices(), "settings": vars(options), "results": rows}
        options.json.write_text(json.dumps(report, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
