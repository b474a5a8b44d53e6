"""The README's comparison: one run of the standard suite, its table and its plot.

    python eval/readme.py                        about half an hour on two cores; goes on where it was stopped
    python eval/readme.py --write README.md      also puts the table between the README's markers

The plot goes to docs/images, the whole report to results/standard.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from hf_kvcompress.harness import Report, evaluate
from hf_kvcompress.harness.loading import load_model
from hf_kvcompress.harness.plots import side_by_side
from hf_kvcompress.harness.report import markdown_table
from hf_kvcompress.integrations.demo_model import demo_model

CACHES = (
    "near-lossless",
    "balanced",
    "small",
    "tiny",
    "h2o:budget=0.25,codec=eqrot4",
    "transformers:quanto4-full",
)
COLUMNS = ("cache", "MB", "ratio", "PPL", "KL", "top-1", "tasks", "answer KL", "decode tok/s")
ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- eval table -->", "<!-- /eval table -->"


def block(report: Report) -> str:
    """The table with the columns that a reader needs first."""
    header, rows = report.table()
    chosen = [index for index, name in enumerate(header) if name in COLUMNS]
    picked = [[row[index] for index in chosen] for row in (header, *rows)]
    return f"{BEGIN}\n{markdown_table(picked[0], picked[1:])}\n{END}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder; by default the model of the demo extra")
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "standard", help="rows, report and plots")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "standard.png")
    parser.add_argument("--write", type=Path, help=f"a text with the markers {BEGIN} and {END}")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model or str(demo_model(print)))
    report = evaluate(model, CACHES, args.suite, tokenizer, out=args.out)
    args.image.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(report, [("KL", "MB"), ("decode tok/s", "MB")]).savefig(args.image, dpi=110)
    print(f"{report.header()}\n\n{block(report)}")
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        found, times = re.subn(f"{BEGIN}.*?{END}", lambda _: block(report), text, flags=re.DOTALL)
        if times != 1:
            raise SystemExit(f"write: expected the markers {BEGIN} and {END} once in {args.write}, got {times} times")
        args.write.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
