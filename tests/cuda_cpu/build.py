"""An emulator for `kernels.emulate`: runs the kernels of `cuda/` on CPU tensors and checks what they do."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from hf_kvcompress.ops import kernels, sources

from .compiling import SHIM, compile_source, compile_text, runtime
from .guards import GUARDS, Guarded, extent

SCHEDULES = ("forward", "reverse", "random threads", "low warps first", "high warps first", "one warp ahead")


class EmulationError(RuntimeError):
    """A kernel did something that a GPU would not forgive; the message names kernel, thread, block and line."""


class Range(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_size_t), ("end", ctypes.c_size_t), ("writable", ctypes.c_int)]


class Launch(ctypes.Structure):
    """`kvc::Launch` of shim/runtime.h."""

    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("static_shared", ctypes.c_size_t * 2),
        ("schedule", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("ranges", ctypes.POINTER(Range)),
        ("range_count", ctypes.c_int),
        ("message", ctypes.c_char * 1024),
        ("failed_at", ctypes.c_size_t),
    ]


@cache
def _library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _static_shared(library: ctypes.CDLL) -> ctypes.Array:
    found = (ctypes.c_size_t * 2)()
    library.kvc_static_shared(found)
    return found


def declared(source: str, defines: dict[str, int]) -> None:
    """ValueError if a source does not say that it is launched with these macros: then nothing else compiles them."""
    if defines not in sources.variants(sources.expand(source)):
        raise ValueError(f"{source}: expected macros that a line `// variants: ...` lists, got {defines}")


class Emulator:
    """Launcher for `kernels.emulate`.

    `schedule` is one of SCHEDULES. `guard` copies every tensor so that its end (or beginning) lies at an unmapped page;
    "off" uses the tensors as they are, as always happens to those that a kernel reaches through addresses in others.
    `texts` replaces files of `cuda/` by other text, for planted bugs. `undeclared` lets a source run with macros that
    its lines `// variants: ...` do not list. `contract` fuses products and sums wherever NVRTC may.
    """

    def __init__(
        self,
        schedule: str = "forward",
        guard: str = "end",
        texts: dict[str, str] | None = None,
        undeclared: bool = False,
        contract: bool = False,
    ):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
        if guard not in GUARDS:
            raise ValueError(f"guard: expected one of {GUARDS}, got {guard!r}")
        self.schedule, self.guard, self.texts = schedule, guard, texts or {}
        self.undeclared, self.contract = undeclared, contract
        self.launches: list[str] = []  # names of the kernels that ran, so that tests see that one did
        self.macros: list[dict[str, int]] = []  # of each launch

    def __call__(
        self,
        source: str,
        name: str,
        defines: dict[str, int],
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[kernels.Argument],
        shared: int,
        reached: Sequence[torch.Tensor],
    ) -> None:
        """Run one launch; EmulationError names what a kernel does wrong."""
        if source in self.texts:
            path = compile_text(sources.inlined(self.texts[source], source), defines, self.contract)
        else:
            if not self.undeclared:
                declared(source, defines)
            path = compile_source(source, tuple(sorted(defines.items())), self.contract)
        self.launches.append(name)
        self.macros.append(defines)
        launch(path, name, grid, block, args, shared, reached, self.schedule, self.guard, len(self.launches))


def _passed(name: str, position: int, x: kernels.Argument, kind: str, guarded: Guarded) -> ctypes._SimpleCData:
    """`x` as the C argument of this kind; ValueError if the kernel's parameter is of another kind."""
    if kind in "pc" and (x is None or isinstance(x, torch.Tensor)):
        return ctypes.c_size_t(0 if x is None else guarded.address(x))
    if kind == "l" and isinstance(x, kernels.Long):
        return ctypes.c_longlong(x.value)
    if kind == "i" and isinstance(x, int):
        return ctypes.c_int(x)
    if kind == "f" and isinstance(x, float):
        return ctypes.c_float(x)
    expected = {"p": "a tensor", "c": "a tensor", "l": "Long", "i": "an int", "f": "a float"}.get(kind, "no such type")
    raise ValueError(f"{name}: argument {position}: expected {expected}, got {type(x).__name__}")


def launch(
    path: Path,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[kernels.Argument],
    shared: int,
    reached: Sequence[torch.Tensor],
    schedule: str,
    guard: str,
    seed: int,
) -> None:
    """Run a kernel of the library at `path` over CPU tensors."""
    machine = _library(runtime())  # before the kernels, which are linked with it
    library = _library(path)
    try:
        kinds = getattr(library, f"kvc_kinds_{name}")
    except AttributeError:
        raise ValueError(f"name: expected a kernel of this source, got {name!r}") from None
    kinds.restype = ctypes.c_char_p
    signature = kinds().decode()
    if len(signature) != len(args):
        raise ValueError(f"{name}: expected {len(signature)} arguments, got {len(args)}")
    if block[0] * block[1] * block[2] > 1024:
        raise ValueError(f"{name}: expected a block of at most 1024 threads, got {tuple(block)}")
    if max(grid[1:]) > 65535:
        raise ValueError(f"{name}: expected a grid of at most 65535 in y and z, got {tuple(grid)}")
    if shared > 227 * 1024:
        raise ValueError(f"{name}: expected at most {227 * 1024} bytes of shared memory, got {shared}")
    guarded = Guarded(guard, reached)
    ranges = [Range(x.data_ptr(), x.data_ptr() + extent(x), True) for x in reached if x.numel()]
    written = set()
    try:
        values = [_passed(name, i, x, kind, guarded) for i, (x, kind) in enumerate(zip(args, signature, strict=True))]
        for value, x, kind in zip(values, args, signature, strict=True):
            if isinstance(x, torch.Tensor) and x.numel():
                ranges.append(Range(value.value, value.value + extent(x), kind == "p"))
                if kind == "p":
                    written.add(x.untyped_storage().data_ptr())
        pointers = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(value) for value in values])
        todo = Launch(
            entry=ctypes.cast(getattr(library, f"kvc_enter_{name}"), ctypes.c_void_p).value,
            arguments=ctypes.addressof(pointers),
            grid=(ctypes.c_uint * 3)(*grid),
            block=(ctypes.c_uint * 3)(*block),
            shared=shared,
            static_shared=_static_shared(library),
            schedule=SCHEDULES.index(schedule),
            seed=seed,
            ranges=(Range * max(1, len(ranges)))(*ranges),
            range_count=len(ranges),
        )
        if machine.kvc_run(ctypes.byref(todo)):
            message = todo.message.decode(errors="replace")
            place = source_line(path, todo.failed_at) if todo.failed_at else ""
            raise EmulationError(f"{name}: {message}{place}")
    finally:
        guarded.back(written)


def source_line(path: Path, code: int) -> str:
    """ ", at file:line" for an address in a library, with the lines of the functions it was inlined into."""
    tool = shutil.which("addr2line")
    if tool is None:
        return ""
    done = subprocess.run([tool, "-i", "-e", str(path), hex(code)], capture_output=True, text=True, timeout=60)
    places = [line.split(" ")[0].rsplit("/", 1)[-1] for line in done.stdout.splitlines()]
    places = [place for place in places if not place.startswith("?")]
    ours = [place for place in places if not (SHIM / place.split(":")[0]).exists()]
    return ", at " + " in ".join(ours) if ours else ""
