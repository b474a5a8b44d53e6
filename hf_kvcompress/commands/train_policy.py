"""`kvcompress train-policy`: a learned score for one model, from any text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..harness.loading import load_model
from ..scoring import read_text, standard_text
from ..training import LayerReport
from ..training import train_policy as train


def train_policy(
    model: Annotated[str, typer.Option(help="Name or folder of a model.")],
    out: Annotated[Path, typer.Option(help="Write the weights here, for LearnedCache(config, weights=...).")],
    text: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="UTF-8 text; may be repeated. By default the Python manual."),
    ] = None,
    teacher: Annotated[str, typer.Option(help="future, replay or both.")] = "both",
    target: Annotated[str, typer.Option(help="error (of the attention's output) or mass (of attention).")] = "error",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that the model reads.")] = 131072,
    length: Annotated[int, typer.Option(min=512, help="Tokens of one passage.")] = 2560,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the network.")] = 48,
    epochs: Annotated[int, typer.Option(min=1, help="Times that each passage is learned from.")] = 5,
    sliding: Annotated[bool, typer.Option(help="Train the layers with a sliding window as well.")] = False,
    seed: Annotated[int, typer.Option(help="Of first weights, order and noise.")] = 0,
) -> None:
    """Train the policy "learned" for a model: minutes on a CPU for a small one."""
    console = Console()
    try:
        loaded, tokenizer = load_model(model)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("reading", total=None)

            def on_progress(label: str, done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total, description=label)

            found = train(
                loaded,
                tokenizer,
                [read_text(path) for path in text] if text else [standard_text()],
                teacher=teacher,  # type: ignore[arg-type]  # checked there
                target=target,  # type: ignore[arg-type]
                tokens=tokens,
                length=length,
                hidden=hidden,
                epochs=epochs,
                sliding=sliding,
                seed=seed,
                on_progress=on_progress,
            )
        found.weights.save(out)
    except (ValueError, OSError) as error:
        console.print(f"kvcompress train-policy: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    console.print(_table(found.layers))
    console.print(f"cache = kvc.LearnedCache(model.config, weights={str(out)!r})", highlight=False, soft_wrap=True)


def _table(layers: list[LayerReport]) -> Table:
    table = Table(title="Passages held out: rank correlation with the teacher, part of all worth in the best quarter")
    for name in ("layer", "loss", "rank", "rank, H2O", "quarter", "quarter, H2O", "quarter, best"):
        table.add_column(name, justify="right")
    for own in layers:
        numbers = (own.rank, own.h2o_rank, own.share, own.h2o_share, own.best_share)
        table.add_row(
            str(own.layer), f"{own.loss[0]:.2f} -> {own.loss[1]:.2f}", *(f"{number:.3f}" for number in numbers)
        )
    return table
