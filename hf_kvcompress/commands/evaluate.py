"""`kvcompress eval`: caches side by side on one model, with the uncompressed one, Random and recency."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..harness.errors import sentence
from ..harness.evaluate import evaluate as measure
from ..harness.loading import load_model
from ..harness.processes import Processes
from ..harness.specs import CacheSpec
from ..harness.suites import Suite, suite_of
from ..integrations.demo_model import demo_model
from .common import (
    Caches,
    Device,
    Dtype,
    Json,
    Quiet,
    ScoreDtype,
    Texts,
    bar,
    printer,
    remarks,
    say,
    write_json,
)  # fmt: skip
from .errors import Failed


def evaluate(
    model: Annotated[
        str | None,
        typer.Option(help="Name or folder of a model, or recall; by default the one of the demo extra."),
    ] = None,
    cache: Caches = None,
    suite: Annotated[str, typer.Option(help="quick, standard or full.")] = "quick",
    text: Texts = None,
    records: Annotated[
        list[str] | None,
        typer.Option(help="qa:FILE or summary:FILE, .json or .jsonl, or qa:datasets:NAME. Repeat it for more."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names of tasks, separated by commas; none leaves them out.")
    ] = None,
    task_length: Annotated[
        list[int] | None, typer.Option(min=32, help="Context of the tasks, in tokens. Repeat it for more.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Passages, samples of a task and repeats of a clock.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Another size of the suite, such as prompt=512. Repeat it for more.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for rows as they come, report and plots.")
    ] = None,
    dtype: Dtype = "auto",
    score_dtype: ScoreDtype = "auto",
    device: Device = "auto",
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure caches: perplexity, KL, attention error, agreement, long-context tasks, bytes and speed.

    A run with --output-dir that was stopped goes on where it was. Runs under torchrun share the work.
    """
    try:
        specs = [CacheSpec.parse(spec) for spec in cache or ["balanced"]]
        chosen = _suite(suite, tasks, task_length, seeds, size)
        source = model or str(demo_model(partial(say, remarks(quiet))))
        loaded, tokenizer = load_model(source, dtype, device)
        with bar("preparing", quiet, show=Processes().is_first) as tell:
            report = measure(
                loaded, specs, chosen, tokenizer, text or ["prose"], records or [], output_dir, score_dtype,
                on_unit=lambda unit, index, total, name: tell(index, total, f"{unit} {name}"),
            )  # fmt: skip
    except (Exception, KeyboardInterrupt) as error:
        if output_dir is not None and any(output_dir.glob("rows-*.jsonl")):
            say(remarks(quiet), f"Results so far are kept in {output_dir}.")
        if isinstance(error, MemoryError | RuntimeError) and ("memory" in str(error) or isinstance(error, MemoryError)):
            raise Failed(f"model: expected one that fits into memory with its caches: {sentence(error)}") from error
        raise
    if not Processes().is_first:
        return
    say(printer(json_file), report.markdown())
    write_json(json_file, {"model": model or "demo", **report.to_dict()})


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
