"""`kvcompress experiments`: general, repetitive and code, or experiments of yours, through several caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from ..experiments import Summary, builtin_experiments, read_experiments, run_experiments
from ..harness.loading import RECALL
from .common import Caches, Device, Json, Quiet, columns, printer, remarks, say, write_json
from .errors import Failed


def experiments(
    quick_test: Annotated[
        bool,
        typer.Option("--quick-test", help="Short ones on the package's own small model: offline, seconds to a minute."),
    ] = False,
    experiments_file: Annotated[
        Path | None,
        typer.Option(
            "--experiments", exists=True, dir_okay=False, help="JSON file; by default general, repetitive, code."
        ),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for a report of each and a summary of all.")
    ] = Path("kvcompress-experiments"),
    model: Annotated[
        str | None,
        typer.Option(
            help="Name or folder of a model, or recall, where none is named; by default the one of the demo extra."
        ),
    ] = None,
    cache: Caches = None,
    device: Device = "auto",
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Run prompts through caches: memory, speed, agreement and redundancy, a report of each and a summary.

    What is finished is not run again, what was stopped goes on. An experiment that fails is recorded, the others run,
    and the exit code is 1.
    """
    if quick_test and experiments_file is not None:
        raise ValueError("quick-test, experiments: expected one of them, got both")
    chosen = {} if cache is None else {"caches": cache}
    if experiments_file is not None:
        found = read_experiments(experiments_file, model, **chosen)
    else:
        found = builtin_experiments(model or (RECALL if quick_test else None), quick_test, **chosen)
    if found[0].model == RECALL:
        torch.set_num_threads(1)  # so small a model only waits for more of them
    try:
        with Progress(*columns(MofNCompleteColumn()), console=remarks(quiet), transient=True) as progress:
            whole = progress.add_task("experiments", total=len(found))
            part = progress.add_task("preparing", total=None)

            def tell(number: int, name: str, count: int, done: int, total: int, label: str) -> None:
                progress.update(whole, completed=number, total=count)
                progress.update(part, completed=done, total=total, description=escape(f"{name}: {label}"))

            summary = run_experiments(found, output_dir, device, on_progress=tell)
    except KeyboardInterrupt:
        say(remarks(quiet), f"Results so far are in {output_dir}; the same command goes on from there.")
        raise
    _print(summary, printer(json_file))
    for report in summary.reports:
        if report.is_old:
            say(remarks(quiet), f"{report.name} was finished before.")
    say(remarks(quiet), f"Reports are in {output_dir}.")
    write_json(json_file, summary.to_dict())
    if summary.failed:
        failed = "; ".join(f"{report.name}: {report.reason}" for report in summary.failed)
        raise Failed(f"{len(summary.failed)} of {len(summary.reports)} failed: {failed}")


def _print(summary: Summary, console: Console) -> None:
    header, rows = summary.table()
    table = Table(title="Means over prompts", box=SIMPLE, padding=0)  # whole in 80 columns
    for name in header:
        side: JustifyMethod = "left" if name in ("experiment", "cache") else "right"
        table.add_column(name.replace(" ", "\n"), justify=side, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if rows:
        console.print(table)
