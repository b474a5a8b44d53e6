"""`kvcompress demo`: what each preset costs on a real model and a real text, in one table."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..environment import devices, versions
from ..integrations.demo_model import demo_model
from ..scoring import hide_passkey, read_text, standard_text, tokenize
from .compare import Comparison, Row, compare
from .contenders import check_name, default_names
from .table import markdown, notes, rich_table

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: above this many parameters a second copy in float32 is too dear
FLOAT32_PARAMETERS = 1_000_000_000


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
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
        if score_dtype not in ("auto", "same", "float32"):
            raise ValueError(f"score-dtype: expected auto, same or float32, got {score_dtype!r}")
        source = model or str(demo_model(lambda line: console.print(line, highlight=False)))
        loaded, scoring_model, tokenizer = _load(source, dtype, score_dtype, device)
        length = prompt_tokens + score_tokens
        _check_length(loaded, length)
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


def _load(source: str, dtype: str, score_dtype: str, device: str) -> tuple[Any, Any, Any]:
    """The model, the one to score with, and the tokenizer."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(source)
    wanted: Any = "auto" if dtype == "auto" else DTYPES[dtype]
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=wanted).eval().to(device)
    if score_dtype == "auto":
        score_dtype = "float32" if loaded.num_parameters() <= FLOAT32_PARAMETERS else "same"
    same = score_dtype == "same" or loaded.dtype == torch.float32
    return loaded, loaded if same else copy.deepcopy(loaded).float(), tokenizer


def _check_length(model: Any, length: int) -> None:
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(f"prompt-tokens + score-tokens: expected at most {most} for this model, got {length}")


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
