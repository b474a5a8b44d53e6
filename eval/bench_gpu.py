"""Everything that only a GPU can tell, in one command under ten minutes.

    python eval/bench_gpu.py --json results/gpu.json
    python eval/bench_gpu.py --dry        # tiny sizes on the CPU emulator, only to see that the script works

Needs torch, transformers, cupy and this checkout; neither datasets nor evaluate. In this order, each part written to
the JSON file as soon as it is there: what was found, a known answer for every PTX wrapper, the operations against their
torch references, copy bandwidth, launch overhead, decode attention and whole steps, packing and unpacking, what
strategies cost beside the plain codec, `generate`.
Ends with status 1 if a wrapper or an operation gives a wrong answer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu import attention, overhead, vectors, work
from gpu.timing import Bench

from hf_kvcompress.environment import devices, versions
from hf_kvcompress.ops import diagnosis, kernels, probes

TARGETS = """Wanted on an H200: int4 attention at least 2.5 times SDPA and 60 % of the copy bandwidth at 32k and more;
a step at least 5 times DynamicCache's at 32k; host at most 80 us a layer and step; no waiting; packing at most 0.2 ms
and unpacking at most 0.1 ms per 1,000 tokens."""
PARTS = ("attention", "packing", "overhead", "generate")
COLUMNS = {
    "attention": "cache batch tokens, attention_ms.3f gbs.0f percent.0f attention_ratio.2f step_ms.3f step_ratio.2f "
    "host_us.0f waits timed_by error",
    "packing": "codec tokens, pack_ms.4f unpack_ms.4f pack_ms_per_1000.4f unpack_ms_per_1000.4f timed_by",
    "overhead": "cache tokens, store_ms_per_1000.2f store_ms_per_1000_more.2f page_ms.2f page_ms_more.2f step_ms.2f "
    "error",
    "generate": "model batch prompt, cache prompt_s.2f step_ms.2f tokens_per_s.1f cache_bytes, peak_bytes, error",
}  # a key of the rows and its format


def emulation(dry: bool) -> AbstractContextManager[None]:
    """The CPU emulator when dry."""
    if not dry:
        return nullcontext()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.cuda_cpu.build import Emulator

    return kernels.emulate(Emulator(undeclared=True))


def table(rows: list[dict[str, Any]], columns: str) -> str:
    """Markdown."""
    formats = dict(re.fullmatch(r"(\w+?)((?:,|\.\df)?)", column).groups() for column in columns.split())
    lines = ["| " + " | ".join(formats) + " |", "|" + " --- |" * len(formats)]
    for row in rows:
        cells = [format(row[key], spec) if row.get(key) is not None else "" for key, spec in formats.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Report:
    """Collects results, writes them at once, prints them."""

    def __init__(self, path: Path | None):
        self.path, self.found = path, {"versions": versions(), "devices": devices()}

    def add(self, name: str, value: Any) -> None:
        self.found[name] = value
        if self.path is not None:
            self.path.write_text(json.dumps(self.found, indent=1, default=str) + "\n")

    def part(self, name: str, rows: Callable[[Bench], Iterator[dict[str, Any]]], bench: Bench, until: float) -> None:
        """Rows of one part, which may use the time up to `until`."""
        bench.deadline = until
        kept: list[dict[str, Any]] = []
        for row in rows(bench):
            kept.append(row)
            self.add(name, kept)
            print(row, flush=True)
        print(f"\n{name}\n{table(kept, COLUMNS[name])}\n", flush=True)


def wrong(name: str, found: dict[str, str]) -> int:
    """Print what is wrong; returns how many."""
    bad = {key: text for key, text in found.items() if text}
    print(f"{name}: {len(found) - len(bad)} of {len(found)} as expected", flush=True)
    for key, text in bad.items():
        print(f"  {key}: {text}", flush=True)
    return len(bad)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to measure after the checks")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU emulator")
    options = parser.parse_args()
    start = time.perf_counter()
    bench = Bench(torch.device("cpu" if options.dry else "cuda"), options.dry, start + 60 * options.minutes)
    if not options.dry and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry runs on the CPU")
    report = Report(options.json)
    with emulation(options.dry), torch.inference_mode():
        report.add("backends", diagnosis.diagnose())
        print(json.dumps(report.found, indent=1, default=str), flush=True)
        reason = kernels.why_not(bench.device)
        if reason:
            parser.error(f"kernels do not serve {bench.device}: {reason}")
        report.add("probes", probes.run(bench.device))
        bad = wrong("PTX wrappers", report.found["probes"])
        report.add("vectors", vectors.run(bench))
        bad += wrong("operations", report.found["vectors"])
        bench.copy_gbs = work.copy_bandwidth(bench)
        report.add("copy_gbs", bench.copy_gbs)
        report.add("launch_us", work.launch_us(bench))
        print(f"copy {bench.copy_gbs:.0f} GB/s, launch {report.found['launch_us']:.1f} us on the host\n", flush=True)
        share = 60 * options.minutes
        for name, run, until in (
            ("attention", attention.run, 0.65),
            ("packing", work.packing, 0.75),
            ("overhead", overhead.run, 0.8),
            ("generate", work.generate, 1.0),
        ):
            if name in options.parts:
                report.part(name, run, bench, start + until * share)
        report.add("seconds", time.perf_counter() - start)
    print(f"{TARGETS}\n{'nothing' if not bad else bad} wrong; {report.found['seconds']:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
