"""`kvcompress demo`: what each preset costs on a real model and a real text, in one table."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..environment import devices, versions
from ..harness.loading import check_length, load_model, scoring_copy
from ..integrations.demo_model import demo_model
from ..scoring import hide_passkey, read_text, standard_text, tokenize
from .compare import Comparison, Row, compare
from .contenders import check_name, default_names
from .table import markdown, notes, rich_table


def demo(
    model: Annotated[
        str | None, typer.Option(help="Name or folder of a model; by default the one of the demo extra.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text; by default the Python manual.")
    ] = None,
    caches: Annotated[
        str | None, typer.Option(help="Comma-separated presets, codecs (KEYS or KEYS/VALUES), quanto4, quanto2.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=256, help="Tokens of the prompt, pass key included.")] = 3000,
    score_tokens: Annotated[int, typer.Option(min=2, help="Tokens after the prompt that are scored.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=16, help="Tokens decoded for the answer and the speed.")] = 64,
    step: Annotated[int, typer.Option(min=1, help="Tokens of a scored forward; 1 is plain decoding.")] = 32,
    depth: Annotated[float, typer.Option(min=0.0, max=1.0, help="Where the pass key hides in the prompt.")] = 0.35,
    seed: Annotated[int, typer.Option(help="Chooses the pass key.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    score_dtype: Annotated[
        str, typer.Option(help="Of the scored run: auto (float32 up to a billion parameters), same or float32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write rows, settings and versions here.")
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Also print the table as Markdown.")] = False,
) -> None:
    """Compare caches on a real model: bytes, quality, a hidden pass key and speed."""
    console = Console()
    begun = time.perf_counter()
    names = [name.strip() for name in caches.split(",")] if caches else None
    try:
        for name in names or ():
            check_name(name)
        source = model or str(demo_model(lambda line: console.print(line, highlight=False)))
        loaded, tokenizer = load_model(source, dtype, device)
        scoring_model = scoring_copy(loaded, score_dtype)
        length = prompt_tokens + score_tokens
        check_length(loaded, length, "prompt-tokens + score-tokens")
        ids = tokenize(tokenizer, read_text(text) if text else standard_text(), length, loaded.device)
        passkey = hide_passkey(tokenizer, ids[:, :prompt_tokens], depth, seed)
    except (ValueError, ImportError, OSError) as error:
        console.print(f"kvcompress demo: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    # the pass key took the room of some text: the scored text goes on where the prompt's text stops
    following = ids[:, passkey.text_tokens :][:, :score_tokens]
    task = Comparison(
        loaded, scoring_model, tokenizer, passkey, torch.cat([passkey.prompt, following], 1), new_tokens, step
    )
    names = names or default_names(loaded.config)
    rows = _with_progress(names, task, console)
    _print(rows, task, source, console, as_markdown)
    seconds = time.perf_counter() - begun
    console.print(f"Took {seconds:.0f} s.", highlight=False)
    if json_file:
        settings = {
            "model": source if model else "demo",
            "text": str(text) if text else "prose",
            "text_sha256": hashlib.sha256(str(task.text.tolist()).encode()).hexdigest(),
            "dtype": str(loaded.dtype),
            "score_dtype": str(scoring_model.dtype),
            "device": str(loaded.device),
            "prompt_tokens": prompt_tokens,
            "score_tokens": score_tokens,
            "new_tokens": new_tokens,
            "step": step,
            "depth": depth,
            "seed": seed,
        }
        report = {
            "versions": versions(),
            "devices": devices(),
            "settings": settings,
            "seconds": seconds,
            "rows": [row.to_dict() for row in rows],
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _with_progress(names: list[str], task: Comparison, console: Console) -> list[Row]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        total = task.tokens_per_cache()
        bars = {name: progress.add_task(name, total=total, visible=False) for name in ("uncompressed", *names)}

        def on_tokens(name: str, tokens: int) -> None:
            progress.update(bars[name], advance=tokens, visible=True)

        return compare(names, task, on_tokens)


def _print(rows: list[Row], task: Comparison, source: str, console: Console, as_markdown: bool) -> None:
    scored = task.text.shape[1] - task.prompt_length
    title = (
        f"{Path(source).name}, {str(task.model.dtype).removeprefix('torch.')} (scored in "
        f"{str(task.scoring_model.dtype).removeprefix('torch.')}): prompt of {task.prompt_length} tokens, "
        f"{scored} scored after it, pass key {task.passkey.key} at token {task.passkey.position}"
    )
    console.print(rich_table(rows, title))
    for note in notes(rows):
        console.print(note, style="dim", highlight=False, markup=False)
    if as_markdown:
        print(markdown(rows))
