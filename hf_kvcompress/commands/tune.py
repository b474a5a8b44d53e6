"""`kvcompress tune`: codecs layer by layer for a quality target, searched on texts of your own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..harness.loading import FLOAT32_PARAMETERS, load_model
from ..scoring import read_text, standard_text
from ..tuning import CANDIDATES, Tuned
from ..tuning import tune as search


def tune(
    model: Annotated[str, typer.Option(help="Name or folder of a model.")],
    target_kl: Annotated[float, typer.Option(help="Mean KL divergence of the next token, in nats.")],
    out: Annotated[Path, typer.Option(help="Write the settings here, for CompressedCache(config, **settings).")],
    text: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text; may be given more than once.")
    ] = None,
    candidates: Annotated[str, typer.Option(help="Codecs to choose from, mildest first.")] = ",".join(CANDIDATES),
    prompt_tokens: Annotated[int, typer.Option(min=64, help="Tokens of each text before those scored.")] = 1024,
    score_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text that are scored.")] = 256,
    layers_at_once: Annotated[int, typer.Option(min=1, help="Neighbouring layers that share their codecs.")] = 1,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens for which bytes are weighed.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write what was measured here, as JSON.")] = None,
) -> None:
    """Search single layers' codecs on texts; by default the Python manual."""
    console = Console()
    try:
        loaded, tokenizer = load_model(model)
        if loaded.num_parameters() <= FLOAT32_PARAMETERS:
            loaded = loaded.float()  # rounding in half precision would hide small divergences
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("uncompressed", total=None)

            def on_measured(done: int, total: int, label: str) -> None:
                progress.update(bar, completed=done, total=total, description=label)

            found = search(
                loaded,
                [read_text(path) for path in text] if text else standard_text(),
                target_kl,
                candidates=[name.strip() for name in candidates.split(",")],
                tokenizer=tokenizer,
                prompt_tokens=prompt_tokens,
                score_tokens=score_tokens,
                layers_at_once=layers_at_once,
                context=context,
                keep=out,
                on_measured=on_measured,
            )
    except (ValueError, OSError) as error:
        console.print(f"kvcompress tune: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    _print(found, out, console)
    if report:
        report.write_text(json.dumps({"model": model, **found.to_dict()}, indent=2) + "\n", encoding="utf-8")


def _print(found: Tuned, out: Path, console: Console) -> None:
    console.print(found.plan)
    console.print(
        f"KL {found.kl:.4f} of {found.target_kl:g}, perplexity {found.perplexity:.3f} ({found.base_perplexity:.3f} "
        f"uncompressed), {found.measurements} measurements.",
        highlight=False,
    )
    console.print(f"settings = json.loads(Path({str(out)!r}).read_text())", highlight=False, soft_wrap=True)
    console.print("cache = kvc.CompressedCache(model.config, **settings)", highlight=False, soft_wrap=True)
