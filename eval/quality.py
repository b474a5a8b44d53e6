"""The regression gate: presets and strategies against the figures in `eval/quality.json`.

    python eval/quality.py            the quick part, on the small model of the package, in two minutes
    python eval/quality.py --full     both parts; the second on the model of the demo extra
    python eval/quality.py --record   measure and write the file anew; the change is then read in the diff

Exit code 1 and a table of what moved, if a figure is worse than recorded by more than its tolerance.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_kvcompress.harness import Entrant, Report, Suite, evaluate
from hf_kvcompress.harness.gate import compare, differences, record, table
from hf_kvcompress.harness.loading import load_model
from hf_kvcompress.integrations.demo_model import demo_model

FILE = Path(__file__).with_suffix(".json")
CODECS = ("near-lossless", "balanced", "small", "tiny", "kivi4", "kivi2", "turbo3", "haar3")
POLICIES = ("h2o", "snapkv", "expected", "keydiff")


@dataclass(frozen=True)
class Part:
    """One model with its suite and caches."""

    model: str | None
    suite: Suite
    caches: tuple[str, ...]
    texts: tuple[str, ...] = ("prose",)


def policies(budget: str, *more: str) -> tuple[str, ...]:
    own = tuple(f"{name}:budget={budget},codec=identity" for name in (*POLICIES, *more, *BOUNDS))
    demoted = f"h2o:budget={budget},codec=identity,demote_to=eqrot2"
    return (*own, f"h2o:budget={budget},codec=eqrot4", demoted)


STRATEGIES = ("CPACCache", "HierarchicalCache:ratio=0.25")
BOUNDS = ("random", "streaming")
PARTS = {
    "quick": Part(
        "recall",
        Suite("gate, quick", prompt=384, scored=64, chunk=16, stepped=0, windows=3, probed=32, generated=8, timed=0,
              tasks=None, task_lengths=(384,), task_seeds=2),
        (*CODECS, "fp8", "int4", *policies("0.35", "PyramidKVCache", "AdaKVCache", "tova", "rkv"), *STRATEGIES,
         "balanced:quality_guard=0.1"),
    ),
    "full": Part(
        None,
        Suite("gate, full", prompt=1024, scored=96, stepped=0, windows=2, probed=32, generated=2, timed=0,
              tasks=("needle", "pairs"), task_lengths=(1024,), task_seeds=2),
        (*CODECS, *policies("0.5"), *STRATEGIES),
        ("prose", "code"),
    ),
}  # fmt: skip


def measure(part: Part, caches: Sequence[str | Entrant] | None = None, out: Path | None = None) -> Report:
    """Run a part, or some caches on its suite; with a folder it goes on where it was stopped.

    In float32: in 16 bits answers at a near tie, and evictions, depend on the processor.
    """
    model, tokenizer = load_model(part.model or str(demo_model(print)), "float32")
    return evaluate(model, caches or part.caches, part.suite, tokenizer, part.texts, out=out, bounds=False)


def text_of(kept: Mapping[str, Any]) -> str:
    """As JSON, a line for each figure."""
    return re.sub(
        r"\{\s*(\"mean\"[^{}]*?)\s*\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", json.dumps(kept, indent=1)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also the part on the demo's model")
    parser.add_argument("--record", action="store_true", help="write what is measured instead of comparing it")
    parser.add_argument("--out", type=Path, help="folder for rows and reports; a run that was stopped goes on there")
    args = parser.parse_args()
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    failed = False
    for name in PARTS if args.full else ("quick",):
        report = measure(PARTS[name], out=None if args.out is None else args.out / name)
        print(f"{name}: {report.header()}")
        if args.record:
            kept[name] = record(report, f"python eval/quality.py --record{' --full' * (name == 'full')}")
            FILE.write_text(text_of(kept) + "\n", encoding="utf-8")
            continue
        if name not in kept:
            raise SystemExit(f"{FILE.name}: expected figures of the part {name!r}; make them with --record")
        other = differences(kept[name], report)
        if other:
            print(f"Not the recorded run, so figures may move: {', '.join(other)}.")
        moved = compare(kept[name], report)
        number = sum(map(len, kept[name]["figures"].values()))
        print(f"{number} figures of {len(kept[name]['figures'])} caches; outside their tolerance: {len(moved)}.")
        print(table(moved) if moved else "")
        failed |= any(one.fails for one in moved)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
