"""What the scripts on policies share: models, windows of text, prompts that are read once, tables and reports."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvcompress as kvc
from hf_kvcompress.environment import devices, versions
from hf_kvcompress.integrations.demo_model import demo_model
from hf_kvcompress.policies.registry import POLICIES
from hf_kvcompress.scoring import load_text, text_windows
from hf_kvcompress.scoring.oracle import FutureAttention, OraclePolicy
from hf_kvcompress.scoring.replay import Prompt

__all__ = ["Prompt"]  # the scripts take it from here

ORACLE = "oracle"
#: every policy that needs no file of weights, and the bounds around them
SCORED = ("streaming", "h2o", "snapkv", "tova", "expected", "keydiff", "rkv")
ALL = (ORACLE, *SCORED, "random")


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="name or folder; by default the model of the demo extra")
    made.add_argument("--dtype", default="bfloat16", help="float32 is three times slower; bfloat16 costs a KL of .001")
    made.add_argument("--policies", default=",".join(ALL), help="comma-separated")
    made.add_argument("--learned", type=Path, help="weights of `kvcompress train-policy`, for the policy `learned`")
    made.add_argument("--json", type=Path)
    return made


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer."""
    source = args.model or str(demo_model(print))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype)).eval().to(device)
    return model, AutoTokenizer.from_pretrained(source)


def names(args: argparse.Namespace) -> list[str]:
    """The policies asked for, `learned` among them if there are weights."""
    asked = [name for name in args.policies.split(",") if name]
    for name in asked:
        if name not in (ORACLE, *POLICIES):
            raise SystemExit(f"policies: expected names among {', '.join((ORACLE, *POLICIES))}, got {name!r}")
    return asked + ["learned"] * (args.learned is not None and "learned" not in asked)


def policy_settings(name: str, future: FutureAttention | None, learned: Path | None = None) -> dict[str, Any]:
    """`policy` and its options for a `CompressedCache`."""
    if name == ORACLE:
        assert future is not None
        return {"policy": OraclePolicy(future)}
    return {"policy": name, "policy_options": {"weights": str(learned)} if name == "learned" else {}}


def windows(texts: Sequence[str], tokenizer: Any, number: int, length: int) -> list[tuple[str, int, torch.Tensor]]:
    """`number` windows `[1, length]` of each text: its name, the window's number, the tokens.

    They are spread evenly over the text and do not overlap; each begins with the tokenizer's special tokens.
    """
    found = []
    try:
        for name in texts:
            ids = text_windows(tokenizer, load_text(name), number, length)
            found += [(Path(name).stem, index, window) for index, window in enumerate(ids)]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return found


def full_layers(config: Any) -> list[int]:
    """Numbers of the layers that attend to everything."""
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [index for index, kind in enumerate(kinds) if kind == "full_attention"]


def bytes_of(cache: Any, layers: Sequence[int]) -> int:
    """Bytes of every tensor that some layers of a cache hold."""
    if hasattr(cache, "commit"):
        cache.commit()
    return kvc.tensor_bytes([cache.layers[index] for index in layers])


# -- tables --------------------------------------------------------------------------------------------------------


def spread(numbers: Iterable[float], form: str = ".4f") -> str:
    """Mean and standard deviation."""
    own = list(numbers)
    mean = format(statistics.fmean(own), form)
    return f"{mean} ± {format(statistics.stdev(own), form)}" if len(own) > 1 else mean


def perplexity(rows: Sequence[dict[str, Any]]) -> float:
    """Of all rows' tokens together."""
    return math.exp(statistics.fmean(row["nll"] for row in rows))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """As Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def write_report(args: argparse.Namespace, **parts: Any) -> None:
    """Versions, devices, settings and results as JSON, where `--json` says."""
    if not args.json:
        return
    args.json.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = {"versions": versions(), "devices": devices(), "settings": settings, **parts}
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
