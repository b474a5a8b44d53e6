"""`kvcompress eval`: caches side by side on one model, with the uncompressed one, Random and recency."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..harness.evaluate import evaluate as measure
from ..harness.loading import load_model
from ..harness.processes import Processes
from ..harness.report import Report
from ..harness.specs import CacheSpec
from ..harness.suites import Suite, suite_of
from ..integrations.demo_model import demo_model


def evaluate(
    model: Annotated[
        str | None, typer.Option(help="Name or folder of a model, or `recall`; by default that of the demo extra.")
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(help="`balanced`, `int8/int4`, `h2o:budget=0.25,codec=kivi4`, `transformers:quanto4`; repeat it."),
    ] = None,
    suite: Annotated[str, typer.Option(help="quick, standard or full.")] = "quick",
    text: Annotated[
        list[str] | None, typer.Option(help="prose, code, a UTF-8 file or datasets:NAME[:CONFIG][:SPLIT][:COLUMN].")
    ] = None,
    records: Annotated[
        list[str] | None, typer.Option(help="qa:FILE or summary:FILE, .json or .jsonl, or qa:datasets:NAME.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated names of tasks; `none` leaves them out.")] = None,
    task_length: Annotated[list[int] | None, typer.Option(min=32, help="Context of the tasks, in tokens.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Passages, samples of a task and repeats of a clock.")
    ] = None,
    size: Annotated[list[str] | None, typer.Option(help="Another size of the suite, such as prompt=512.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for rows as they come, report and plots.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report here.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    score_dtype: Annotated[
        str, typer.Option(help="Of perplexity and KL: auto (float32 up to a billion parameters), same or float32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Measure caches: perplexity, KL, attention error, agreement, long-context tasks, bytes and speed.

    A run with --out that was stopped goes on where it was. Runs under torchrun share the work.
    """
    console = Console()
    try:
        specs = [CacheSpec.parse(spec) for spec in cache or ["balanced"]]
        chosen = _suite(suite, tasks, task_length, seeds, size)
        source = model or str(demo_model(lambda line: console.print(line, highlight=False)))
        loaded, tokenizer = load_model(source, dtype, device)
        report = _run(loaded, tokenizer, specs, chosen, text or ["prose"], records or [], out, score_dtype, console)
    except (ValueError, ImportError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        line = (str(error).splitlines() or [type(error).__name__])[0]
        console.print(f"kvcompress eval: {line}", style="red", highlight=False, markup=False, soft_wrap=True)
        if out is not None and any(out.glob("rows-*.jsonl")):
            console.print(f"Results so far are kept in {out}.", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if not Processes().is_first:
        return
    print(report.markdown())
    console.print(f"Took {report.seconds:.0f} s.", highlight=False)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(
            json.dumps({"model": model or "demo", **report.to_dict()}, indent=1) + "\n", encoding="utf-8"
        )


def _suite(
    name: str, tasks: str | None, task_length: list[int] | None, seeds: int | None, size: list[str] | None
) -> Suite:
    sizes: dict[str, Any] = {"task_lengths": task_length or None}
    if tasks is not None:
        sizes["tasks"] = [] if tasks == "none" else [task.strip() for task in tasks.split(",")]
    if seeds is not None:
        sizes |= {"windows": seeds, "task_seeds": seeds, "repeats": seeds}
    for given in size or ():
        key, equals, value = given.partition("=")
        if not equals or not value.strip().isdigit():
            raise ValueError(f"size: expected name=whole number, got {given!r}")
        sizes[key.strip()] = int(value)
    return suite_of(name, **sizes)


def _run(
    model: Any, tokenizer: Any, specs: list[CacheSpec], suite: Suite, texts: list[str], records: list[str],
    out: Path | None, score_dtype: str, console: Console,
) -> Report:  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not (Processes().is_first and console.is_terminal)
    ) as progress:
        bar = progress.add_task("preparing", total=None)

        def on_unit(unit: str, index: int, total: int, cache: str) -> None:
            progress.update(bar, completed=index, total=total, description=escape(f"{unit} {cache}"))

        return measure(model, specs, suite, tokenizer, texts, records, out, score_dtype, on_unit=on_unit)
