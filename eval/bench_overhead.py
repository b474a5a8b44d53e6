"""What CPAC, tiers and transform coding cost on a CPU, in processor time: 1,000 tokens, a page, a step of one layer.

    python eval/bench_overhead.py --repeat 3 --json results/overhead.json

A layer of Llama-8B's shape in bfloat16, keys and values drawn at random: no page is like another. "more" is what is
spent beyond plain equalised rotation at 4 bits. Medians over the repeats. `bench_gpu.py` has the same part for a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from bench_gpu import COLUMNS, table
from gpu import overhead
from gpu.timing import Bench

from hf_kvcompress.environment import devices, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, only to see that the script works")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(torch.device("cpu"), options.dry, time.perf_counter() + 3600)
    with torch.inference_mode():
        repeats = [list(overhead.run(bench, seed, (options.tokens,))) for seed in range(options.repeat)]
    rows = []
    for same in zip(*repeats, strict=True):
        middle = {key: statistics.median(row[key] for row in same) for key in same[0] if key.endswith(("_ms", "_1000"))}
        more = {key: statistics.median(row[key] for row in same) for key in same[0] if key.endswith("_more")}
        rows.append({**same[0], **middle, **more})
    print(table(rows, COLUMNS["overhead"]))
    if options.json:
        report = {"versions": versions(), "devices": devices(), "settings": vars(options), "rows": repeats}
        options.json.write_text(json.dumps(report, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
