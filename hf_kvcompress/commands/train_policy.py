"""`kvcompress train-policy`: a learned score for one model, from any text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..scoring import load_text
from ..training import LayerReport
from ..training import train_policy as train
from .common import Device, Dtype, Json, Model, Quiet, Seed, Texts, bar, open_model, printer, say, write_json


def train_policy(
    model: Model,
    output: Annotated[Path, typer.Option(help="Write the weights here, for LearnedCache(config, weights=...).")],
    text: Texts = None,
    teacher: Annotated[str, typer.Option(help="future, replay or both.")] = "both",
    target: Annotated[str, typer.Option(help="error (of the attention's output) or mass (of attention).")] = "error",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that the model reads.")] = 131072,
    length: Annotated[int, typer.Option(min=512, help="Tokens of one passage.")] = 2560,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the network.")] = 48,
    epochs: Annotated[int, typer.Option(min=1, help="Times that each passage is learned from.")] = 5,
    sliding: Annotated[bool, typer.Option(help="Train the layers with a sliding window as well.")] = False,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Train the policy "learned" for a model: minutes on a CPU for a small one."""
    texts = [load_text(name) for name in text or ["prose"]]
    source, loaded, tokenizer = open_model(model, dtype, device, quiet)
    with bar("reading", quiet) as tell:
        found = train(
            loaded,
            tokenizer,
            texts,
            teacher=teacher,  # type: ignore[arg-type]  # checked there
            target=target,  # type: ignore[arg-type]
            tokens=tokens,
            length=length,
            hidden=hidden,
            epochs=epochs,
            sliding=sliding,
            seed=seed,
            on_progress=lambda label, done, total: tell(done, total, label),
        )
    found.weights.save(output)
    layers = [asdict(own) for own in found.layers]
    write_json(json_file, {"model": source, "output": str(output), "layers": layers})
    console = printer(json_file)
    console.print(_table(found.layers))
    say(console, f"cache = kvc.LearnedCache(model.config, weights={str(output)!r})")


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
