"""`kvcompress plan`: what fits into a byte budget, layer by layer, from a model's config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import AutoConfig

from ..planner import BudgetError
from ..planner import plan as make_plan
from ..policies.registry import make_policy

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def plan(
    model: Annotated[str, typer.Option(help="Name or folder of a model; only its config is read.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of a row, prompt and answer together.")],
    budget: Annotated[str, typer.Option(help="Bytes (8GB, 64MB), or a part of the uncompressed bytes (0.25).")],
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the model: bfloat16, float16 or float32.")] = "bfloat16",
    policy: Annotated[
        str | None, typer.Option(help="What evicts where quantization is not enough (default h2o); none never evicts.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="Use this codec, or KEYS/VALUES, instead of choosing one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the plan here.")] = None,
) -> None:
    """Print what fits into a budget. Ends with 1 if nothing does."""
    console = Console()
    try:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
        found = make_plan(
            AutoConfig.from_pretrained(model),
            context=context,
            batch=batch,
            budget=parse_budget(budget),
            dtype=DTYPES[dtype],
            policy=policy,
            codec=codec,
        )
    except (ValueError, OSError) as error:
        console.print(f"kvcompress plan: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, BudgetError) else 2) from None
    console.print(found)
    evicts = found.policy is not None
    kept = f"{found.kept_fraction:.0%} of the tokens in layers with full attention" if evicts else "every token"
    longest = "any context" if found.max_context is None else f"up to {found.max_context:,} tokens"
    console.print(f"Keeps {kept}; the budget holds for {longest}.", highlight=False)
    if found.policy is not None and (make_policy(found.policy).needs_queries or batch > 1):
        console.print("kvc.enable(model)", highlight=False, soft_wrap=True)
    console.print(found.code(), highlight=False, markup=False, soft_wrap=True)
    if json_file:
        json_file.write_text(json.dumps({"model": model, **found.to_dict()}, indent=2) + "\n", encoding="utf-8")


def parse_budget(text: str) -> str | int | float:
    """A part of the whole ("0.25"), a number of bytes ("1000000") or bytes with a unit ("64MB")."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
