"""`kvcompress plan`: what fits into a byte budget, layer by layer, from a model's config alone."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from ..harness.loading import dtype_of, load_config
from ..planner import plan as make_plan
from ..policies.registry import make_policy
from ..shares import BudgetError
from .common import Calibrated, Dtype, Json, Model, printer, say, write_json
from .errors import Failed


def plan(
    model: Model,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a row, prompt and answer together.")],
    budget: Annotated[str, typer.Option(help="Bytes (8GB, 64MB), or a part of the uncompressed bytes (0.25).")],
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    policy: Annotated[
        str | None, typer.Option(help="What evicts where quantization is not enough (default h2o); none never evicts.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="A codec, or KEYS/VALUES; by default the best that fits.")] = None,
    calibration: Calibrated = None,
    dtype: Dtype = "auto",
    json_file: Json = None,
) -> None:
    """Say what fits into a byte budget, from a model's config alone. Ends with 1 if nothing does."""
    wanted, config = dtype_of(dtype), load_config(model)
    own = config.get_text_config(decoder=True).dtype
    if wanted is None:
        wanted = own if isinstance(own, torch.dtype) else torch.bfloat16
    try:
        found = make_plan(
            config,
            context=context,
            batch=batch,
            budget=parse_budget(budget),
            dtype=wanted,
            policy=policy,
            codec=codec,
            calibration=calibration,
        )
    except BudgetError as error:
        raise Failed(str(error)) from None
    console = printer(json_file)
    console.print(found)
    evicts = found.policy is not None
    kept = f"{found.kept_fraction:.0%} of the tokens in layers with full attention" if evicts else "every token"
    longest = "any context" if found.max_context is None else f"up to {found.max_context:,} tokens"
    console.print(f"Keeps {kept}; the budget holds for {longest}.")
    if found.policy is not None and (make_policy(found.policy).needs_queries or batch > 1):
        say(console, "kvc.enable(model)")
    say(console, found.code())
    write_json(json_file, {"model": model, **found.to_dict()})


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
