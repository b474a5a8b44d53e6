"""Products with packed codes by a small C library, compiled on first use by the machine's own C compiler.

It is used for half-precision models on CPU and for few query rows (`serves`); everywhere else, and where there is no
compiler, the torch code of `ops/int8mm.py` and `codecs/integer.py` does the same. HF_KVCOMPRESS_BACKEND=torch turns it
off. The library links the OpenMP runtime by the name that torch has loaded, so both share one set of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("dot.c")
# No -ffast-math: linking with it would switch subnormal numbers off in the whole process.
FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
BACKENDS = ("auto", "torch", "cuda")
SMALL = 1 << 18  # bytes of codes times query rows
E4M3 = 9  # stands for the bits of 8-bit floats
MAX_ROWS = 32  # with more query rows a matrix product of decoded codes is faster


class _Format(ctypes.Structure):
    _fields_ = [
        ("nbits", ctypes.c_int),
        ("group", ctypes.c_long),
        ("table", ctypes.c_void_p),
        ("offset", ctypes.c_float),
    ]


def backend() -> str:
    """HF_KVCOMPRESS_BACKEND: "auto", "torch" (nothing compiled) or "cuda"."""
    name = os.environ.get("HF_KVCOMPRESS_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"HF_KVCOMPRESS_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had; `why_not` says why."""
    return _build()[0]


def why_not() -> str:
    """Why there is no compiled library; empty if there is one."""
    return _build()[1]


@lru_cache(maxsize=1)
def _build() -> tuple[ctypes.CDLL | None, str]:
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None, "no C compiler found (cc, gcc or clang, or the one named by CC)"
    try:
        made = _compiled(compiler)
        return ctypes.CDLL(str(made)), ""
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", b"") or str(error).encode()
        return None, f"{compiler} failed: {detail.decode(errors='replace').strip()[:300]}"


def _compiled(compiler: str) -> Path:
    """Path of the library for this source, these flags and this processor, compiled if it is not there yet."""
    cpu = Path("/proc/cpuinfo")
    flags_of_cpu = next((x for x in cpu.read_text().splitlines() if x.startswith("flags")), "") if cpu.exists() else ""
    key = hashlib.sha256("\n".join([SOURCE.read_text(), compiler, *FLAGS, flags_of_cpu]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_kvcompress" / "native"
    target = cache / f"dot-{key}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # two processes may compile at once: the last one wins
            made = Path(folder) / "dot.so"
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(made, target)
    return target


def serves(x: torch.Tensor, rows: int) -> bool:
    """Whether products with `rows` query rows on the device of `x` are done here."""
    return x.device.type == "cpu" and rows <= MAX_ROWS and backend() == "auto" and library() is not None


def _format(nbits: int, group: int, table: torch.Tensor, offset: float) -> tuple[_Format, torch.Tensor]:
    padded = torch.zeros(max(16, table.numel()))
    padded[: table.numel()] = table
    return _Format(nbits, group, padded.data_ptr(), offset), padded


def _pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _call(name: str, planes: list[torch.Tensor], shape: _Format, tensors: list[torch.Tensor], *sizes: int) -> None:
    loaded = library()
    assert loaded is not None
    planes = [plane.contiguous() for plane in planes]
    low = planes[-1]
    numbers = [ctypes.c_long(size) for size in sizes]
    work = planes[0].numel() * sizes[-1]
    threads = min(torch.get_num_threads(), work // SMALL + 1)  # waking a thread takes longer than little work
    pointers = [_pointer(planes[0]), _pointer(low), ctypes.byref(shape), *map(_pointer, tensors)]
    getattr(loaded, name)(*pointers, *numbers, ctypes.c_int(threads))


def key_dot(
    planes: list[torch.Tensor], nbits: int, table: torch.Tensor, offset: float, x: torch.Tensor
) -> torch.Tensor:
    """Sum over channels of x * number: planes `[n, T, bytes]`, x float32 `[n, U, M, D]` -> `[n, M, T]`.

    Each of the U equal runs of tokens has its own x; D is the number of channels that were packed together, `table` the
    numbers of the codes below 8 bits, and 8-bit codes are int8 + offset.
    """
    n, units, rows, group = x.shape
    tokens = planes[0].shape[1]
    shape, kept = _format(nbits, group, table, offset)
    out = torch.empty(n, rows, tokens)
    _call("key_dot", planes, shape, [x.contiguous(), out], n, units, tokens // units, rows)
    del kept  # alive until here: the library reads it
    return out


def value_dot(
    planes: list[torch.Tensor], nbits: int, page: int, table: torch.Tensor, offset: float, p: torch.Tensor
) -> torch.Tensor:
    """Sum over tokens of p * number: planes `[n, D, bytes]`, p float32 `[n, G, M, T]` -> `[n, M, D]`.

    Each of G equal groups of channels has its own p; `page` tokens were packed together.
    """
    n, groups, rows, tokens = p.shape
    channels = planes[0].shape[1]
    shape, kept = _format(nbits, page, table, offset)
    out = torch.empty(n, rows, channels)
    _call("value_dot", planes, shape, [p.contiguous(), out], n, groups, tokens, channels, rows)
    del kept
    return out


def paged_value_dot(
    planes: list[torch.Tensor], nbits: int, table: torch.Tensor, offset: float, p: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """As `value_dot`, each page's sum times a scale: p float32 `[n, U, M, page]`, scale float32 `[n, U, D]`."""
    n, pages, rows, page = p.shape
    channels = planes[0].shape[1]
    shape, kept = _format(nbits, page, table, offset)
    out = torch.empty(n, rows, channels)
    tensors = [p.contiguous(), scale.contiguous(), out]
    _call("paged_value_dot", planes, shape, tensors, n, pages, channels, rows)
    del kept, tensors
    return out


def channel_numbers(codes: torch.Tensor, parts: torch.Tensor, levels: torch.Tensor, out: torch.Tensor) -> None:
    """Numbers of codes `[bytes, T]` whose R channels have bits of their own, into `out`, bfloat16 `[T, R]`.

    codes: may be some tokens of longer rows. parts: int32 `[R, 2, 4]`; a code is the sum of two parts, each
    `((byte >> shift) & mask) << lift`. levels: bfloat16 `[R, most]`, by code.
    """
    loaded, (channels, most), tokens = library(), levels.shape, codes.shape[1]
    assert loaded is not None and codes.stride(1) == 1
    threads = min(torch.get_num_threads(), out.numel() // SMALL + 1)
    pointers = [_pointer(x) for x in (codes, parts, levels, out)]
    sizes = [ctypes.c_long(x) for x in (codes.stride(0), tokens, channels, most)]
    loaded.channel_numbers(*pointers, *sizes, ctypes.c_int(threads))
