"""What would run on each device and why, for `kvcompress doctor`."""

from __future__ import annotations

import time
from typing import Any

import torch

from . import kernels, native, nvrtc, probes, sources


def diagnose() -> dict[str, Any]:
    """Settings, versions and one report a device, JSON-ready. On a GPU it compiles one variant of every source."""
    report: dict[str, Any] = {"torch's CUDA": torch.version.cuda or "none, this torch has no CUDA"}
    report.update(_cupy())
    found = nvrtc.version()
    report["NVRTC for checks"] = "none" if found is None else f"{found[0]}.{found[1]}"
    report["sources"] = len(sources.names())
    try:
        report["HF_KVCOMPRESS_BACKEND"] = native.backend()
    except ValueError as error:
        return report | {"HF_KVCOMPRESS_BACKEND": str(error)}
    report["cpu"] = _cpu()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        report[f"cuda:{index}"] = _gpu(index)
    return report


def _cupy() -> dict[str, str]:
    try:
        import cupy
    except Exception as error:  # a broken installation raises more than ImportError
        return {"cupy": f"none ({error})"}
    found = {"cupy": str(cupy.__version__)}
    nvrtc.load_all()
    for name, ask in (("driver's CUDA", cupy.cuda.runtime.driverGetVersion), ("NVRTC", cupy.cuda.nvrtc.getVersion)):
        try:
            version = ask()
            major, minor = version if isinstance(version, tuple) else (version // 1000, version % 1000 // 10)
            found[name] = f"{major}.{minor}"
        except Exception as error:  # each library may be missing by itself
            found[name] = f"none ({error})"
    return found


def _cpu() -> str:
    if native.backend() != "auto":
        return f"torch (HF_KVCOMPRESS_BACKEND={native.backend()})"
    reason = native.why_not()
    return f"torch ({reason})" if reason else "torch, and a C library for decode steps in half precision"


def _gpu(index: int) -> str:
    """Which code serves a GPU; compiles what would run there and compares each instruction with a known answer."""
    reason = kernels.why_not(f"cuda:{index}")
    if reason:
        return f"torch ({reason})"
    capability = torch.cuda.get_device_capability(index)
    started, compiled = time.perf_counter(), 0
    try:
        for name in sources.names():
            text = sources.expand(name)
            if capability >= sources.needs(text):
                kernels.load(name, sources.kernels(text)[0], **sources.variants(text)[0]).compile(index)
                compiled += 1
        wrong = [f"{name}: {text}" for name, text in probes.run(f"cuda:{index}").items() if text]
    except RuntimeError as error:
        return f"kernels fail after {compiled} sources: {error}"
    took = f"{compiled} sources compiled in {time.perf_counter() - started:.1f} s for {nvrtc.architecture(capability)}"
    return f"kernels, {took}; {'; '.join(wrong) if wrong else 'every instruction gives the known answer'}"
