"""`kvcompress tune`: codecs layer by layer for a quality target, searched on texts of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..harness.loading import FLOAT32_PARAMETERS
from ..scoring import load_text
from ..tuning import CALIBRATED, CANDIDATES, Tuned
from ..tuning import tune as search
from .common import (
    Calibrated,
    Device,
    Dtype,
    Json,
    Model,
    PromptTokens,
    Quiet,
    ScoreTokens,
    Texts,
    bar,
    open_model,
    printer,
    say,
    write_json,
)  # fmt: skip


def tune(
    model: Model,
    target_kl: Annotated[float, typer.Option(help="KL in nats a token that the settings may cost.")],
    output: Annotated[Path, typer.Option(help="Write the settings here, for CompressedCache(config, **settings).")],
    text: Texts = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            help="Codecs to choose from, mildest first, separated by commas. By default "
            f"{','.join(CANDIDATES)}, with a calibration {','.join(CALIBRATED)}."
        ),
    ] = None,
    calibration: Calibrated = None,
    prompt_tokens: PromptTokens = 1024,
    score_tokens: ScoreTokens = 256,
    layers_at_once: Annotated[int, typer.Option(min=1, help="Neighbouring layers that share their codecs.")] = 1,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a row, for which bytes are weighed.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Search codecs layer by layer for a target KL, on texts."""
    texts = [load_text(name) for name in text or ["prose"]]
    source, loaded, tokenizer = open_model(model, dtype, device, quiet)
    if loaded.num_parameters() <= FLOAT32_PARAMETERS:
        loaded = loaded.float()  # rounding in half precision would hide small divergences
    with bar("uncompressed", quiet) as tell:
        found = search(
            loaded,
            texts,
            target_kl,
            candidates=[name.strip() for name in candidates.split(",")] if candidates else None,
            calibration=calibration,
            tokenizer=tokenizer,
            prompt_tokens=prompt_tokens,
            score_tokens=score_tokens,
            layers_at_once=layers_at_once,
            context=context,
            keep=output,
            on_measured=tell,
        )
    _print(found, output, printer(json_file))
    write_json(json_file, {"model": source, **found.to_dict()})


def _print(found: Tuned, output: Path, console: Console) -> None:
    console.print(found.plan)
    console.print(
        f"KL {found.kl:.4f} of {found.target_kl:g}, perplexity {found.perplexity:.3f} ({found.base_perplexity:.3f} "
        f"uncompressed), {found.measurements} measurements.",
    )
    say(console, f"settings = json.loads(Path({str(output)!r}).read_text())")
    say(console, "cache = kvc.CompressedCache(model.config, **settings)")
