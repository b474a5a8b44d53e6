"""`kvcompress analyze`: how redundant the keys and values of a model are on prompts, and what to use for them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..analysis.analyze import THRESHOLDS
from ..analysis.analyze import analyze as look
from ..analysis.prompts import read_prompts
from ..analysis.sentences import findings, overview, title
from ..harness.loading import load_model
from ..integrations.demo_model import demo_model
from .common import Device, Dtype, Json, Quiet, Seed, Temperature, bar, printer, remarks, say, write_json


def analyze(
    model: Annotated[
        str | None,
        typer.Option(help="Name or folder of a model, or recall; by default the one of the demo extra."),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="UTF-8: .txt (a prompt a line), .json (a list of strings or of objects with a field prompt), .jsonl.",
        ),
    ] = None,
    document: Annotated[bool, typer.Option("--document", help="Take a .txt file as one prompt.")] = False,
    max_tokens: Annotated[int, typer.Option(min=0, help="New tokens of each prompt; 0 only reads.")] = 64,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each prompt, the first ones; by default all.")
    ] = None,
    temperature: Temperature = 1.0,
    page_size: Annotated[int, typer.Option(min=8, help="Tokens of a page.")] = 32,
    threshold: Annotated[
        list[float] | None,
        typer.Option(help=f"Least cosine of pages to share, by default {', '.join(map(str, THRESHOLDS))}. Repeat it."),
    ] = None,
    measured_prompts: Annotated[
        int, typer.Option(min=0, help="Prompts that caches are measured on; 0 measures nothing.")
    ] = 4,
    target_kl: Annotated[float, typer.Option(help="KL in nats a token that the recommended cache may cost.")] = 0.01,
    memory: Annotated[str, typer.Option(help="Of pages held, such as 500MB; of more a sample is looked at.")] = "1GB",
    output_dir: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the report, its plots and one HTML file.")
    ] = Path("kvcompress-analysis"),
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Find redundancy in keys and values: similar pages, what sharing them saves and costs, which cache to use.

    Without a file a mixed set is read: prose, code, letters of one template, a document that comes twice.
    """
    prompts = None if prompts_file is None else read_prompts(prompts_file, document)
    loaded, tokenizer = load_model(model or str(demo_model(partial(say, remarks(quiet)))), dtype, device)
    with bar("preparing", quiet) as tell:
        report = look(
            loaded,
            tokenizer,
            prompts,
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            temperature=temperature,
            page_size=page_size,
            thresholds=threshold or THRESHOLDS,
            measured_prompts=measured_prompts,
            target_kl=target_kl,
            memory=memory,
            seed=seed,
            on_progress=lambda what, done, total: tell(done, total, what),
        )
    report.found["model"]["name"] = model or "demo"
    written = report.save(output_dir)
    console = printer(json_file)
    for line in [title(report.found), "", *findings(report.found), "", *overview(report.found)]:
        say(console, line)
    for path in written:
        say(remarks(quiet), str(path))
    if len(written) == 1:
        say(remarks(quiet), "Plots and HTML need matplotlib and jinja2: pip install 'hf_kvcompress[plot]'")
    say(remarks(quiet), f"Took {report['seconds']:.0f} s.")
    write_json(json_file, report.to_dict())
