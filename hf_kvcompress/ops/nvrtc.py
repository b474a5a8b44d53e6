"""NVIDIA's run-time compiler by itself: compiles kernels for any architecture on machines without a GPU.

Kernels that run are compiled by cupy (`ops/kernels.py`). This is for checks: does every source compile, and how many
registers does it take. The library comes from the wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from . import sources

ARCHITECTURES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0))
HEADERS = ("cuda_fp16.h", "cuda_bf16.h")
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


class Resources(NamedTuple):
    """What one kernel takes: registers a thread, bytes of stack and of spills a thread, bytes of shared memory a block.

    Dynamic shared memory is not in `shared`.
    """

    registers: int
    stack: int
    spills: int
    shared: int


def architecture(capability: tuple[int, int]) -> str:
    """(9, 0) -> "sm_90"."""
    return f"sm_{capability[0]}{capability[1]}"


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """NVRTC of NVIDIA's wheels or of the system, or None."""
    return next(_found(), None)


def load_all() -> None:
    """Load every NVRTC of NVIDIA's wheels, where cupy does not look but finds what is loaded already."""
    list(_found())


def _found() -> Iterator[ctypes.CDLL]:
    folders = [folder / "lib" for root in _wheels() for folder in (*_newest(root), root / "cuda_nvrtc")]
    places = [str(path) for folder in folders for path in sorted(folder.glob("libnvrtc.so.[0-9]*"))]
    for place in filter(None, (*places, ctypes.util.find_library("nvrtc"))):
        with suppress(OSError):
            yield ctypes.CDLL(place)


def _wheels() -> list[Path]:
    """Folders that NVIDIA's wheels install into."""
    try:
        return [Path(place) for place in importlib.import_module("nvidia").__path__]
    except ImportError:
        return []


def _newest(root: Path) -> list[Path]:
    return sorted(root.glob("cu[0-9]*"), reverse=True)


@lru_cache(maxsize=4)
def include_flags(major: int) -> tuple[str, ...]:
    """-I and the folder with the headers of this version of CUDA; empty where none is found.

    Those of NVIDIA's wheels, of the toolkit that CUDA_PATH or CUDA_HOME names, or of the system.
    """
    places = [root / f"cu{major}" / "include" for root in _wheels()]
    if major == 12:
        places += [root / "cuda_runtime" / "include" for root in _wheels()]
    places += [Path(root) / "include" for name in ("CUDA_PATH", "CUDA_HOME") if (root := os.environ.get(name))]
    places.append(Path("/usr/local/cuda/include"))
    return tuple(f"-I{place}" for place in places if all((place / name).is_file() for name in HEADERS))[:1]


def version() -> tuple[int, int] | None:
    """Version of the compiler, or None where there is none."""
    found = library()
    if found is None:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    found.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_log(text: str, capability: tuple[int, int], defines: dict[str, int]) -> str:
    """Compile a source with its headers put in; returns ptxas's report.

    RuntimeError with the compiler's log if it does not compile, ValueError where there is no NVRTC.
    """
    found, known = library(), version()
    if found is None or known is None:
        raise ValueError("library: expected NVRTC (pip install nvidia-cuda-nvrtc nvidia-cuda-runtime), got none")
    flags = [f"-arch={architecture(capability)}", "--ptxas-options=-v", *include_flags(known[0])]
    flags += [*sources.options(text, defines), *sources.CUPY_OPTIONS]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    found.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    try:
        values = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = found.nvrtcCompileProgram(program, len(flags), values)
        found.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        found.nvrtcGetProgramLog(program, log)
    finally:
        found.nvrtcDestroyProgram(ctypes.byref(program))
    report = log.value.decode(errors="replace")
    if failed:
        raise RuntimeError(f"does not compile for {architecture(capability)} with {defines}:\n{report}")
    return report


def resources(report: str) -> dict[str, Resources]:
    """What each kernel takes, by name, from the report of `compile_log`."""
    found = {}
    for part in report.split("ptxas info")[1:]:
        entry, spills, registers = ENTRY.search(part), SPILLS.search(part), REGISTERS.search(part)
        if entry is not None:
            name = entry[1]
        if spills is not None:
            stack, stores, loads = map(int, spills.groups())
        if registers is not None:
            found[name] = Resources(int(registers[1]), stack, max(stores, loads), int(registers[2] or 0))
    return found
