"""What commands share: options with one meaning each, where they print, bars, JSON and how a model is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from ..harness.loading import load_model
from ..integrations.demo_model import demo_model

STDOUT = "-"

_DTYPE = "auto, bfloat16, float16 or float32."
_TEXT = "prose, code, a UTF-8 file or datasets:NAME; by default prose, the Python manual"
_PROMPTS = "UTF-8: .txt (a prompt a line), .json (a list of strings or of objects with a field prompt), .jsonl."
_REPEAT = "Repeat it for more."

Model = Annotated[str, typer.Option("--model", help="Name or folder of a model.")]
ModelOrDemo = Annotated[
    str | None, typer.Option("--model", help="Name or folder of a model; by default the one of the demo extra.")
]
Text = Annotated[str | None, typer.Option("--text", help=f"{_TEXT}.")]
Texts = Annotated[list[str] | None, typer.Option("--text", help=f"{_TEXT}. {_REPEAT}")]
Caches = Annotated[
    list[str] | None, typer.Option("--cache", help=f"A cache, such as balanced, int8/int4, h2o:budget=0.25. {_REPEAT}")
]
PromptsFile = Annotated[Path | None, typer.Option("--prompts-file", exists=True, dir_okay=False, help=_PROMPTS)]
Dtype = Annotated[str, typer.Option("--dtype", help=f"Of the model: {_DTYPE}")]
ScoreDtype = Annotated[
    str,
    typer.Option(
        "--score-dtype", help="Of perplexity and KL: auto (float32 up to a billion parameters), same or float32."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="New tokens of each prompt.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="Of the new tokens; 0 takes the likeliest.")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=64, help="Tokens of each prompt.")]
ScoreTokens = Annotated[int, typer.Option("--score-tokens", min=2, help="Tokens after the prompt that are scored.")]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Also write JSON to a file; without one, print JSON and nothing else."),
]
Calibrated = Annotated[
    Path | None,
    typer.Option("--calibration", exists=True, dir_okay=False, help="What `kvcompress calibrate` wrote for the model."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No bars and no remarks on stderr.")]


def printer(json_target: str | None = None) -> Console:
    """Where results are printed for people: stdout, and nowhere if JSON goes there."""
    return Console(quiet=json_target == STDOUT, highlight=False)


def remarks(quiet: bool = False) -> Console:
    """Where bars and remarks go: stderr."""
    return Console(stderr=True, quiet=quiet, highlight=False)


def say(console: Console, line: str) -> None:
    """Print a line as it is, whole: a command that wraps cannot be copied."""
    console.print(line, markup=False, soft_wrap=True)


def write_json(target: str | None, found: Any) -> None:
    """Write to the file that `--json` named, or to stdout."""
    if target is None:
        return
    text = json.dumps(found, indent=2) + "\n"
    if target == STDOUT:
        print(text, end="")
        return
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(text, encoding="utf-8")


def open_model(
    model: str | None, dtype: str = "auto", device: str = "auto", quiet: bool = False
) -> tuple[str, Any, Any]:
    """Source, model and tokenizer; without a name, the model of the demo extra.

    Raises:
        ValueError: there is no such model, no tokenizer, or no such dtype; ImportError: no demo extra.
    """
    source = model or str(demo_model(partial(say, remarks(quiet))))
    loaded, tokenizer = load_model(source, dtype, device)
    if tokenizer is None:
        raise ValueError(f"model: expected one with a tokenizer, got {source!r}")
    return source, loaded, tokenizer


class Tell(Protocol):
    """Moves a bar to `done` of `total`."""

    def __call__(self, done: int, total: int, label: str | None = None) -> None: ...


def columns(*extra: ProgressColumn) -> tuple[ProgressColumn, ...]:
    """Of every bar: what is done, how far, and for how long."""
    return (TextColumn("{task.description}"), BarColumn(), *extra, TimeElapsedColumn())


@contextmanager
def bar(label: str, quiet: bool = False, show: bool = True) -> Iterator[Tell]:
    """A bar on stderr that goes when it is done; nothing where nobody looks."""
    console = remarks(quiet)
    shown = Progress(
        *columns(MofNCompleteColumn()), console=console, transient=True, disable=not (show and console.is_terminal)
    )
    with shown:
        task = shown.add_task(label, total=None)

        def tell(done: int, total: int, label: str | None = None) -> None:
            text = {} if label is None else {"description": escape(label)}
            shown.update(task, completed=done, total=total, **text)  # type: ignore[arg-type]

        yield tell
