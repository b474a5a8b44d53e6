"""Compiling kernels of `cuda/` for the CPU: the shim once, each source with each set of macros once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path

from hf_kvcompress.ops import sources

SHIM = Path(__file__).parent / "shim"
BUILT = Path(__file__).parent / ".build"
LINK = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs"]
RUNTIME_FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden"]
# -fno-strict-aliasing: kernels look at a register as two halves, as CUDA code does. tsan and ubsan only make the
# compiler call the shim's own functions; no library of theirs is linked.
KERNEL_FLAGS = ["-std=c++17", "-g1", "-gdwarf-4", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-w"]
KERNEL_FLAGS += ["-fsanitize=thread,bounds,alignment,shift-exponent,integer-divide-by-zero,signed-integer-overflow"]
QUICK = ["-Og", "-ffp-contract=off"]  # compiling takes longer than running
FUSED = ["-O1", "-fexpensive-optimizations", "-ffp-contract=fast"]
KERNEL_FLAGS += ["--param", "tsan-instrument-func-entry-exit=0", "-DKVC_EMULATED", f"-I{SHIM}"]
DYNAMIC_SHARED = re.compile(r"extern\s+__shared__[^;]*\bkvc_smem\s*\[\s*\]\s*;")


def compiler() -> str:
    """The C++ compiler, g++ or the one named by CXX; empty if there is none."""
    return os.environ.get("CXX") or shutil.which("g++") or ""


def _run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[:4000]}")


@lru_cache(maxsize=1)
def processor_flags() -> tuple[str, ...]:
    """Instructions for halves and fused operations, where the processor has them."""
    info = Path("/proc/cpuinfo")
    there = set(info.read_text().split()) if platform.machine() == "x86_64" and info.exists() else set()
    return tuple(flag for flag, name in (("-mf16c", "f16c"), ("-mfma", "fma")) if name in there)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@lru_cache(maxsize=1)
def _shim_text() -> str:
    return "\0".join(path.read_text() for path in sorted(SHIM.iterdir()))


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time makes `target`; its folder is there."""
    target.parent.mkdir(exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def forget_old() -> None:
    """Remove what was compiled more than a week ago."""
    for path in BUILT.glob("*") if BUILT.exists() else ():
        with suppress(FileNotFoundError):
            if path.is_file() and time.time() - path.stat().st_mtime > 7 * 24 * 3600:
                path.unlink()


def _made(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(path)` if it is not there."""
    if not target.exists():
        with locked(target), tempfile.TemporaryDirectory(dir=target.parent) as folder:
            if not target.exists():
                path = Path(folder) / target.name
                make(path)
                os.replace(path, target)
    return target


@lru_cache(maxsize=1)
def runtime() -> Path:
    """Shared library of the shim: schedules, barriers, checks of memory."""

    def make(path: Path) -> None:
        joined = path.with_suffix(".cpp")
        joined.write_text("".join(f'#include "{source}"\n' for source in sorted(SHIM.glob("*.cpp"))))
        _run(compiler(), *RUNTIME_FLAGS, *LINK, f"-I{SHIM}", f"-Wl,-soname,{path.name}", joined, "-o", path)

    key = _digest(_shim_text(), compiler(), *RUNTIME_FLAGS)
    return _made(BUILT / f"runtime-{key}.so", make)


def compile_text(text: str, defines: dict[str, int], contract: bool = False) -> Path:
    """Shared library of the kernels in `text`, whose own includes are already put in.

    `contract` fuses products and sums, as NVRTC does where a source does not say `// fmad: off`.
    """
    names = sources.kernels(text)
    if not names:
        raise ValueError('text: expected kernels declared extern "C" __global__ void, got none')
    fused = contract and sources.fused_multiply_add(text)
    flags = [*KERNEL_FLAGS, *processor_flags(), *(FUSED if fused else QUICK)]
    flags += [f"-D{name}={value}" for name, value in sorted({"__CUDA_ARCH__": 900, **defines}.items())]
    driver = '#include "emulator.h"\n' + DYNAMIC_SHARED.sub("", text) + "\n"
    driver += "".join(f"KVC_EXPORT({name})\n" for name in names)

    def make(path: Path) -> None:
        source, compiled = path.with_suffix(".cpp"), path.with_suffix(".o")
        source.write_text(driver)
        _run(compiler(), *flags, "-c", source, "-o", compiled)
        _run(compiler(), *LINK, compiled, runtime(), "-o", path)

    key = _digest(driver, _shim_text(), compiler(), *flags, *RUNTIME_FLAGS)
    return _made(BUILT / f"kernel-{key}.so", make)


@cache
def compile_source(source: str, defines: tuple[tuple[str, int], ...], contract: bool = False) -> Path:
    """Shared library of `cuda/<source>`."""
    return compile_text(sources.expand(source), dict(defines), contract)
