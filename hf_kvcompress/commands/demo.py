"""`kvcompress demo`: what each preset costs on a real model and a real text, in one table."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TaskProgressColumn

from ..calibration import Calibration
from ..environment import devices, versions
from ..harness.loading import check_length, scoring_copy
from ..integrations.demo_model import demo_calibration
from ..scoring import hide_passkey, load_text, tokenize
from .common import (
    Caches,
    Calibrated,
    Device,
    Dtype,
    Json,
    ModelOrDemo,
    PromptTokens,
    Quiet,
    ScoreDtype,
    ScoreTokens,
    Seed,
    Text,
    bar,
    columns,
    open_model,
    printer,
    remarks,
    say,
    write_json,
)  # fmt: skip
from .compare import Comparison, Row, compare
from .contenders import check_name, default_names, may_be_calibrated
from .table import markdown, notes, rich_table


def demo(
    model: ModelOrDemo = None,
    text: Text = None,
    cache: Caches = None,
    calibration: Calibrated = None,
    prompt_tokens: PromptTokens = 3000,
    score_tokens: ScoreTokens = 512,
    max_tokens: Annotated[int, typer.Option(min=16, help="New tokens of the answer, for the speed too.")] = 64,
    step: Annotated[int, typer.Option(min=1, help="Tokens of a scored forward; 1 is plain decoding.")] = 32,
    depth: Annotated[float, typer.Option(min=0.0, max=1.0, help="Where the pass key hides in the prompt.")] = 0.35,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    score_dtype: ScoreDtype = "auto",
    device: Device = "auto",
    json_file: Json = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown, too.")] = False,
    quiet: Quiet = False,
) -> None:
    """Compare caches on a real model: bytes, quality, a hidden pass key and speed."""
    begun = time.perf_counter()
    for name in cache or ():
        check_name(name)
    read = load_text(text or "prose")
    source, loaded, tokenizer = open_model(model, dtype, device, quiet)
    scoring_model = scoring_copy(loaded, score_dtype)
    length = prompt_tokens + score_tokens
    check_length(loaded, length, "prompt-tokens + score-tokens")
    ids = tokenize(tokenizer, read, length, loaded.device)
    passkey = hide_passkey(tokenizer, ids[:, :prompt_tokens], depth, seed)
    # the pass key took the room of some text: the scored text goes on where the prompt's text stops
    following = ids[:, passkey.text_tokens :][:, :score_tokens]
    names = cache or default_names(loaded.config, calibration is not None or model is None)
    if calibration is None and model is None and any(map(may_be_calibrated, names)):
        calibration = _demo_calibration(scoring_model, tokenizer, quiet)
    task = Comparison(
        loaded,
        scoring_model,
        tokenizer,
        passkey,
        torch.cat([passkey.prompt, following], 1),
        max_tokens,
        step,
        calibration,
    )
    rows = _with_progress(names, task, quiet)
    _print(rows, task, source, printer(json_file), as_markdown)
    seconds = time.perf_counter() - begun
    say(remarks(quiet), f"Took {seconds:.0f} s.")
    settings = {
        "model": source if model else "demo",
        "text": text or "prose",
        "text_sha256": hashlib.sha256(str(task.text.tolist()).encode()).hexdigest(),
        "dtype": str(loaded.dtype),
        "score_dtype": str(scoring_model.dtype),
        "device": str(loaded.device),
        "prompt_tokens": prompt_tokens,
        "score_tokens": score_tokens,
        "max_tokens": max_tokens,
        "step": step,
        "calibration": None if calibration is None else dict(Calibration.open(calibration).config.made_of),
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
    write_json(json_file, report)


def _demo_calibration(model: Any, tokenizer: Any, quiet: bool) -> Path:
    """The demo model's calibration; made on the first call."""
    with bar("calibrating once", quiet) as tell:
        return demo_calibration(model, tokenizer, tell)


def _with_progress(names: list[str], task: Comparison, quiet: bool) -> list[Row]:
    with Progress(*columns(TaskProgressColumn()), console=remarks(quiet), transient=True) as progress:
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
        console.print(note, style="dim", markup=False)
    if as_markdown:
        say(console, markdown(rows))
