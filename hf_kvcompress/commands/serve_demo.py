"""`kvcompress serve-demo`: many prompts with one system text through the engine, as they stream, with the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..analysis.prompts import read_prompts
from ..codecs.registry import parse
from ..paging.engine import PagedAttentionEngine
from ..prefix.cache import PrefixCache
from .common import (
    Device,
    Dtype,
    Json,
    MaxTokens,
    ModelOrDemo,
    PromptsFile,
    Quiet,
    open_model,
    printer,
    say,
    write_json,
)  # fmt: skip

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
    model: ModelOrDemo = None,
    prompts_file: PromptsFile = None,
    enable_paging: Annotated[bool, typer.Option(help="Serve all prompts at once; else one after the other.")] = True,
    enable_prefix_cache: Annotated[bool, typer.Option(help="Read what prompts have in common once.")] = True,
    block_size: Annotated[int, typer.Option(help="Tokens of a block: 8, 16, 32, 64 or 128.")] = 16,
    codec: Annotated[str, typer.Option(help="A codec, such as eqrot4, int8 or identity.")] = "eqrot4",
    memory_gb: Annotated[float | None, typer.Option(help="GB that the pool and the exact windows may take.")] = None,
    max_tokens: MaxTokens = 32,
    cache_dir: Annotated[Path | None, typer.Option(file_okay=False, help="Keep prefixes in this folder, too.")] = None,
    redis: Annotated[str | None, typer.Option(help="Keep prefixes in a Redis server, redis://host:port/0.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Serve prompts with a paged, compressed cache and shared prefixes; show throughput, latency and memory."""
    parse(codec, "codec")
    lines = [SYSTEM + own for own in QUESTIONS]
    if prompts_file is not None:
        lines = [str(prompt.text) for prompt in read_prompts(prompts_file)]
    _, loaded, tokenizer = open_model(model, dtype, device, quiet)
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
    console = printer(json_file)
    texts = _serve(console, engine, lines, max_tokens)
    report = engine.report()
    console.print(_table(report, engine))
    write_json(json_file, {**report, "answers": texts})


def _serve(console: Console, engine: PagedAttentionEngine, prompts: list[str], max_tokens: int) -> list[str]:
    """Print each answer as its last token comes."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for piece in engine.stream(prompts, max_tokens):
        tokens[piece.prompt].append(piece.token)
        if piece.last:
            text = engine.tokenizer.decode(tokens[piece.prompt], skip_special_tokens=True)
            asked = prompts[piece.prompt][-60:]
            say(console, f"[{piece.prompt}] {asked!r}\n    {text.strip()!r}")
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
