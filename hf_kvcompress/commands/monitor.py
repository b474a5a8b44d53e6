"""`kvcompress monitor`: a generation that is looked on at, and what was seen."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..analysis.prompts import read_prompts
from ..harness.loading import check_length
from ..harness.specs import CacheSpec
from ..monitoring import Report, read
from ..monitoring import monitor as watch
from ..monitoring.files import HEADER
from .common import (
    Device,
    Dtype,
    Json,
    MaxTokens,
    ModelOrDemo,
    PromptsFile,
    Quiet,
    Seed,
    Temperature,
    open_model,
    printer,
    remarks,
    say,
    write_json,
)  # fmt: skip

PLOT = "report.png"


def monitor(
    model: ModelOrDemo = None,
    prompt: Annotated[str | None, typer.Option(help="What the model continues.")] = None,
    prompts_file: PromptsFile = None,
    cache: Annotated[
        str, typer.Option(help="A cache, such as balanced, int8/int4, h2o:budget=0.25,codec=kivi4 or none.")
    ] = "balanced",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    output_dir: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for all that is seen, empty or new.")
    ] = Path("monitoring_data"),
    share: Annotated[float, typer.Option(help="Part of the time that the monitor may take.")] = 0.05,
    layers: Annotated[int, typer.Option(min=1, help="Layers that are looked at.")] = 4,
    heads: Annotated[int, typer.Option(min=1, help="Key-value heads of each that are looked at.")] = 2,
    read_from: Annotated[
        Path | None,
        typer.Option("--read", exists=True, file_okay=False, help="Show the data of an earlier run, and run nothing."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Watch a cache while a model generates: memory, attention by page, pages that are alike."""
    console = printer(json_file)
    if read_from is not None:
        reports = {folder.name: Report(read(folder)) for folder in _recordings(read_from)}
        _show(console, reports, json_file)
        return
    prompts = _prompts(prompt, prompts_file)
    spec = CacheSpec.parse(cache)
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(f"output-dir: expected an empty folder, or one that is not there yet, got {str(output_dir)!r}")
    _, loaded, tokenizer = open_model(model, dtype, device, quiet)
    entrant = spec.entrant(loaded.config)
    inputs = [tokenizer(text, return_tensors="pt").input_ids.to(loaded.device) for text in prompts]
    check_length(loaded, max(ids.shape[1] for ids in inputs) + max_tokens, "the longest prompt + max-tokens")
    terminal, reports = remarks(quiet), {}
    with entrant.around(loaded):
        for number, ids in enumerate(inputs, 1):
            folder = output_dir if len(inputs) == 1 else output_dir / f"{number:03d}"
            held = entrant.make()
            looked = watch(held, model=loaded, output_dir=folder, share=share, layers=layers, heads=heads)
            with looked as seen:
                if terminal.is_terminal and not quiet:
                    seen.live(terminal)
                _generate(loaded, ids, held, max_tokens, temperature, seed)
            reports[folder.name] = seen.report()
            if find_spec("matplotlib") is not None:
                reports[folder.name].plot().savefig(folder / PLOT, dpi=120)
    _show(console, reports, json_file)
    say(console, f"Written to {output_dir}. To see it again: kvcompress monitor --read {output_dir}")


def _prompts(given: str | None, file: Path | None) -> list[str]:
    if (given is None) == (file is None):
        raise ValueError("prompt, prompts-file: expected one of them, got " + ("none" if given is None else "both"))
    if file is not None:
        return [str(prompt.text) for prompt in read_prompts(file)]
    assert given is not None
    if not given.strip():
        raise ValueError("prompt: expected a text, got an empty one")
    return [given]


def _generate(model: Any, ids: torch.Tensor, cache: Any, max_tokens: int, temperature: float, seed: int) -> None:
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=max_tokens, **sampling)


def _recordings(folder: Path) -> list[Path]:
    """The folder, or the folders in it, that hold a recording."""
    found = [folder] if (folder / HEADER).is_file() else sorted(file.parent for file in folder.glob(f"*/{HEADER}"))
    if not found:
        raise ValueError(f"read: expected a folder that kvcompress monitor wrote, got {str(folder)!r}")
    return found


def _show(console: Console, reports: dict[str, Report], json_target: str | None) -> None:
    for name, report in reports.items():
        if len(reports) > 1:
            console.rule(name)
        console.print(report)
    found = [{"name": name, **report.to_dict()} for name, report in reports.items()]
    write_json(json_target, found[0] if len(found) == 1 else found)
