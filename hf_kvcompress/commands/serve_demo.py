"""`kvcompress serve-demo`: many prompts with one system text through the engine, as they stream, with the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..codecs.registry import codec_names, parse
from ..harness.loading import load_model
from ..integrations.demo_model import demo_model
from ..paging.engine import PagedAttentionEngine
from ..prefix.cache import PrefixCache

SYSTEM = (
    "You are a patient assistant of a public library. You answer in one or two plain sentences, you never invent a "
    "title, and where you are not sure you say so. The library lends books for four weeks, records for two, and keeps "
    "a reading room with maps and newspapers that is open every day but Sunday. "
)
QUESTIONS = (
    "How long may I keep a book?",
    "Is the reading room open on Sundays?",
    "What do you lend besides books?",
    "Can I read today's newspaper there?",
    "Which maps do you have?",
    "May I borrow a record for a month?",
    "Do you know a good novel about the sea?",
    "Where would I find a dictionary?",
)


def serve_demo(
    model: Annotated[
        str | None, typer.Option(help="Name or folder of a model; by default the one of the demo extra.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A prompt a line; by default eight questions.")
    ] = None,
    enable_paging: Annotated[bool, typer.Option(help="Serve all prompts at once; else one after the other.")] = True,
    enable_prefix_cache: Annotated[bool, typer.Option(help="Read what prompts have in common once.")] = True,
    block_size: Annotated[int, typer.Option(help="Tokens of a block: 8, 16, 32, 64 or 128.")] = 16,
    codec: Annotated[str, typer.Option(help=f"One of {', '.join(codec_names())}.")] = "eqrot4",
    memory_gb: Annotated[float | None, typer.Option(help="Size of the pool in GB.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of each prompt.")] = 32,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep prefixes in this folder, too.")] = None,
    redis: Annotated[str | None, typer.Option(help="Keep prefixes in a Redis server, redis://host:port/0.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Serve prompts with a paged, compressed cache and shared prefixes; show throughput, latency and memory."""
    console = Console()
    try:
        parse(codec, "codec")
        source = model or str(demo_model(lambda line: console.print(line, highlight=False)))
        loaded, tokenizer = load_model(source, dtype, device)
        store = PrefixCache(block_size=block_size, disk=cache_dir, remote=redis) if enable_prefix_cache else None
        engine = PagedAttentionEngine(
            loaded,
            tokenizer,
            block_size=block_size,
            codec=codec,
            memory_gb=memory_gb,
            prefix_cache=store,
            max_batch=32 if enable_paging else 1,
        )
        lines = prompts.read_text(encoding="utf-8").splitlines() if prompts else [SYSTEM + own for own in QUESTIONS]
        lines = [line for line in lines if line.strip()]
        texts = _serve(console, engine, lines, max_tokens)
    except (ValueError, ImportError, OSError, MemoryError) as error:
        console.print(f"kvcompress serve-demo: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    report = engine.report()
    console.print(_table(report, engine))
    if json_file is not None:
        json_file.write_text(json.dumps({**report, "answers": texts}, indent=1) + "\n", encoding="utf-8")


def _serve(console: Console, engine: PagedAttentionEngine, prompts: list[str], max_tokens: int) -> list[str]:
    """Print each answer as its last token comes."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for piece in engine.stream(prompts, max_tokens):
        tokens[piece.prompt].append(piece.token)
        if piece.last:
            text = engine.tokenizer.decode(tokens[piece.prompt], skip_special_tokens=True)
            asked = prompts[piece.prompt][-60:]
            console.print(f"[{piece.prompt}] {asked!r}\n    {text.strip()!r}", highlight=False, markup=False)
    return [engine.tokenizer.decode(own, skip_special_tokens=True) for own in tokens]


def _table(report: dict[str, Any], engine: PagedAttentionEngine) -> Table:
    table = Table(title=f"{report['prompts']} prompts, {report['generated_tokens']} new tokens", show_header=False)
    rows = [
        ("new tokens a second", f"{report['tokens_per_second']:.1f}"),
        ("first token, median", f"{report['first_token_seconds']:.3f} s"),
        ("further token, median", f"{report['token_seconds'] * 1000:.1f} ms"),
        ("cache at its peak", f"{report['peak_bytes'] / 2**20:.2f} MB"),
        ("padded batch, uncompressed", f"{report['peak_dense_bytes'] / 2**20:.2f} MB"),
        ("saved", f"{engine.memory_savings:.0%}"),
        ("preemptions", str(report["preemptions"])),
    ]
    if engine.prefixes is not None:
        stats = engine.prefixes.store.stats
        rows.append(("prompt tokens reused", f"{stats.tokens_reused} of {stats.tokens_reused + stats.tokens_read}"))
    for row in rows:
        table.add_row(*row)
    return table
