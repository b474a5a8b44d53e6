"""Whether a prompt that is prefilled in chunks is stored as well as one that is prefilled at once.

    python eval/chunked_prefill.py --json results/chunked.json

Codecs that learn statistics see fewer tokens at first when the prompt comes in chunks. One line a preset and chunk:
the KL divergence from the uncompressed model on the text after the prompt. The uncompressed model prefills at once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hf_kvcompress as kvc
from hf_kvcompress.environment import devices, versions
from hf_kvcompress.integrations.demo_model import demo_model
from hf_kvcompress.scoring import read_text, score, standard_text, tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=1536)
    parser.add_argument("--score-tokens", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 512, 128, 32])
    parser.add_argument("--presets", nargs="+", default=["balanced", "small", "tiny"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = options.model or demo_model(print)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    text = read_text(options.text) if options.text else standard_text()
    length = options.prompt_tokens + options.score_tokens
    ids = tokenize(AutoTokenizer.from_pretrained(source), text, length, model.device)
    reference = score(model, ids, lambda: DynamicCache(config=model.config), options.prompt_tokens)
    rows = []
    with kvc.enable(model):
        for preset in options.presets:
            for chunk in options.chunks:

                def make(preset: str = preset) -> kvc.CompressedCache:
                    return kvc.CompressedCache(model.config, preset=preset)

                result = score(model, ids, make, options.prompt_tokens, prefill_step=chunk or None, reference=reference)
                rows.append({"preset": preset, "chunk": chunk, "kl": result.mean_kl, "perplexity": result.perplexity})
                how = f"chunks of {chunk}" if chunk else "at once"
                print(f"{preset:14} {how:14} KL {result.mean_kl:.4f}  top-1 {result.top1_agreement:.3f}", flush=True)
    if options.json:
        report = {"versions": versions(), "devices": devices(), "settings": vars(options), "results": rows}
        options.json.write_text(json.dumps(report, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
