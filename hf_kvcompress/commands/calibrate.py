"""`kvcompress calibrate`: the key basis of a model for `TransformCache`, from any text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..calibrating import calibrate as learn
from ..harness.loading import load_model
from ..scoring import read_text, standard_text


def calibrate(
    model: Annotated[str, typer.Option(help="Name or folder of a model.")],
    output: Annotated[Path, typer.Option(help="Write the calibration here, for TransformCache(config, ...).")],
    text: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="UTF-8 text; may be repeated. By default the Python manual."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that the model reads.")] = 8192,
    length: Annotated[int, typer.Option(min=64, help="Tokens of one passage.")] = 2048,
    rotated: Annotated[
        bool, typer.Option(help="Take keys as cached, where the model's rotation is not known.")
    ] = False,
) -> None:
    """Learn a model's key basis: minutes on a CPU for a small one."""
    console = Console()
    try:
        loaded, tokenizer = load_model(model)
        texts = [read_text(path) for path in text] if text else [standard_text()]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("reading", total=None)

            def on_progress(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)

            sizes = {"tokens": tokens, "length": length}
            found = learn(loaded, texts, tokenizer, **sizes, rotated=rotated, on_progress=on_progress)  # type: ignore
        found.save(output)
    except (ValueError, OSError) as error:
        console.print(f"kvcompress calibrate: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    size = f"{len(found.layers)} layers, {found.nbytes:,} bytes"
    console.print(f"{size}, from {found.config.made_of['tokens']:,} tokens.", highlight=False)
    line = f"cache = kvc.TransformCache(model.config, calibration={str(output)!r}, bits=2)"
    console.print(line, highlight=False, soft_wrap=True)
