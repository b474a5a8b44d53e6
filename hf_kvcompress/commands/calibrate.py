"""`kvcompress calibrate`: the key basis of a model for `TransformCache`, from any text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..calibrating import calibrate as learn
from ..scoring import calibration_texts, load_text
from .common import Device, Dtype, Json, Model, Quiet, bar, open_model, printer, say, write_json


def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option(help="Write the calibration here, for TransformCache(config, ...).")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="prose, code, a UTF-8 file or datasets:NAME, like what the model will read. Repeat it for more. By "
            "default the Python manual and library, but for what prose and code have of them."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that the model reads.")] = 8192,
    length: Annotated[int, typer.Option(min=64, help="Tokens of one passage.")] = 2048,
    rotated: Annotated[
        bool, typer.Option(help="Take keys as cached, where the model's rotation is not known.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Learn a model's key basis: minutes on a CPU for a small one."""
    source, loaded, tokenizer = open_model(model, dtype, device, quiet)
    texts = [load_text(name) for name in text] if text else calibration_texts()
    with bar("reading", quiet) as tell:
        found = learn(loaded, texts, tokenizer, tokens=tokens, length=length, rotated=rotated, on_progress=tell)
    found.save(output)
    made_of = found.config.made_of
    report = {"model": source, "output": str(output), "layers": len(found.layers), "nbytes": found.nbytes}
    write_json(json_file, {**report, "made_of": made_of})
    console = printer(json_file)
    say(console, f"{len(found.layers)} layers, {found.nbytes:,} bytes, from {made_of['tokens']:,} tokens.")
    say(console, f"cache = kvc.TransformCache(model.config, calibration={str(output)!r}, bits=2)")
