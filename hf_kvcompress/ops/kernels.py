"""Kernels of `cuda/`: found, compiled with NVRTC through cupy on first use, launched on torch's current stream.

This is the only file that imports cupy. `serves(x)` says whether tensors like `x` go to kernels; elsewhere each
operation runs as its torch reference. Tests put an emulator in cupy's place with `emulate`, so that the same launches
run the same sources on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from . import nvrtc, sources
from .native import backend

STATIC_SHARED = 48 * 1024  # bytes of shared memory that a block gets without asking


class Long(NamedTuple):
    """A 64-bit integer argument of a kernel; a plain int is passed with 32 bits."""

    value: int


Argument = torch.Tensor | Long | int | float | None
Size = Sequence[int] | int


class Launcher(Protocol):
    """What `emulate` takes: it runs a kernel on CPU tensors."""

    def __call__(
        self,
        source: str,
        name: str,
        defines: dict[str, int],
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Argument],
        shared: int,
        reached: Sequence[torch.Tensor],
    ) -> None:
        """Run the kernel `name` of `cuda/<source>`."""


_emulator: Launcher | None = None
_lock = threading.Lock()


@contextmanager
def emulate(launcher: Launcher | None) -> Iterator[None]:
    """Give launches on CPU tensors to `launcher` inside a with statement; with None CPU tensors are not served."""
    global _emulator
    before, _emulator = _emulator, launcher
    try:
        yield
    finally:
        _emulator = before


def why_not(device: torch.device | str) -> str:
    """Why kernels do not serve `device`; empty if they do."""
    device = torch.device(device)
    if backend() == "torch":
        return "HF_KVCOMPRESS_BACKEND=torch"
    if device.type == "cpu" and _emulator is not None:
        return ""
    if device.type != "cuda":
        return f"kernels run on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _unready(torch.cuda.current_device() if device.index is None else device.index)


def serves(x: torch.Tensor) -> bool:
    """Whether operations on tensors like `x` are done by kernels.

    RuntimeError if HF_KVCOMPRESS_BACKEND=cuda asks for them on a CUDA tensor and they cannot be had.
    """
    if not x.is_cuda:
        return _emulator is not None and x.device.type == "cpu" and backend() != "torch"
    chosen = backend()
    if chosen == "torch":
        return False
    reason = _unready(x.get_device())
    if reason and chosen == "cuda":
        raise RuntimeError(f"HF_KVCOMPRESS_BACKEND=cuda, but {reason}")
    return not reason


def capability(x: torch.Tensor) -> tuple[int, int]:
    """Compute capability of the device of `x`; of the newest one that is emulated on the CPU."""
    return _capability(x.get_device()) if x.is_cuda else (9, 0)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _unready(index: int) -> str:
    if torch.version.hip is not None:
        return "torch is built for ROCm, the kernels need CUDA"
    found = _capability(index)
    if found < sources.OLDEST:
        oldest = "{}.{}".format(*sources.OLDEST)
        return f"compute capability {oldest} or later is needed, got {found[0]}.{found[1]}"
    try:
        import cupy
    except Exception as error:  # a broken installation raises more than ImportError
        extra = f"cuda{(torch.version.cuda or '13').split('.')[0]}"
        return f"cupy cannot be imported ({error}); pip install 'hf_kvcompress[{extra}]'"
    nvrtc.load_all()
    try:
        version = cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # cupy raises several kinds when the library is missing
        return f"cupy {cupy.__version__} finds no NVRTC ({error})"
    if not nvrtc.include_flags(version[0]):
        headers = ", ".join(nvrtc.HEADERS)
        return f"NVRTC {version[0]}.{version[1]} is there, but not its headers ({headers}); set CUDA_PATH"
    return ""


def without_waiting(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small table of the host where kernels read it; the stream is not stopped for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@cache
def load(source: str, name: str, **defines: int) -> Kernel:
    """The kernel `name` of `cuda/<source>`, compiled with these macros for each device when it first runs there."""
    for macro, value in defines.items():
        if not isinstance(value, int):
            raise ValueError(f"{macro}: expected an int, got {value!r}")
    return Kernel(source, name, {macro: int(value) for macro, value in defines.items()})


class Kernel:
    """One kernel with its macros; call it to launch."""

    def __init__(self, source: str, name: str, defines: dict[str, int]):
        self.source, self.name, self.defines = source, name, defines
        self._ready: dict[int, _Ready] = {}  # by device

    def __repr__(self) -> str:
        macros = "".join(f" {name}={value}" for name, value in self.defines.items())
        return f"{self.name} ({self.source}{macros})"

    def __call__(
        self,
        grid: Size,
        block: Size,
        args: Sequence[Argument],
        shared: int = 0,
        like: torch.Tensor | None = None,
        reached: Sequence[torch.Tensor] = (),
    ) -> None:
        """Launch on the device of `like` (the first tensor of `args` without it), on torch's current stream.

        A tensor passes its address, None a null pointer, an int 32 bits, a float 32 bits, `Long` 64 bits; `shared` is
        the dynamic shared memory of a block in bytes. `reached` are tensors whose addresses stand in a tensor of
        `args`: only the emulator, which checks every access, looks at them. Nothing is copied, made contiguous or
        waited for.
        """
        like = next((x for x in args if isinstance(x, torch.Tensor)), None) if like is None else like
        if like is None:
            raise ValueError(f"{self!r}: expected a tensor among the arguments or in like, got none")
        grid, block = _three(grid), _three(block)
        if min(*grid, *block) < 1:
            raise ValueError(f"{self!r}: expected a grid and a block of at least 1, got {grid} and {block}")
        if like.is_cuda:
            self._launch(like.get_device(), grid, block, args, shared)
        elif _emulator is not None:
            self._converted(args, -1)
            _emulator(self.source, self.name, self.defines, grid, block, args, shared, reached)
        else:
            raise ValueError(f"{self!r}: expected a CUDA tensor, got one on {like.device}")

    def compile(self, index: int) -> None:
        """Compile for the CUDA device `index` without launching; RuntimeError with the compiler's log if that fails."""
        with _on(index):
            if index not in self._ready:
                self._compile(index)

    def _launch(self, index: int, grid: tuple, block: tuple, args: Sequence[Argument], shared: int) -> None:
        values = self._converted(args, index)
        stream = _Stream(torch.cuda.current_stream(index).cuda_stream)
        with _on(index):
            ready = self._ready.get(index) or self._compile(index)
            if shared > ready.room:  # a block gets more only if it asks before
                ready.kernel.max_dynamic_shared_size_bytes = ready.room = shared
            ready.function(grid, block, values, shared, stream)

    def _compile(self, index: int) -> _Ready:
        import cupy

        text = sources.expand(self.source)
        flags = (*sources.options(text, self.defines), *nvrtc.include_flags(cupy.cuda.nvrtc.getVersion()[0]))
        with _lock:
            try:
                kernel = cupy.RawModule(code=text, options=flags).get_function(self.name)
                ready = _Ready(kernel, kernel.kernel, STATIC_SHARED - kernel.shared_size_bytes)
            except Exception as error:  # NVRTC's errors carry its log, the driver's a line
                arch = nvrtc.architecture(_capability(index))
                raise RuntimeError(f"{self!r} does not compile for {arch}: {error}") from error
        self._ready[index] = ready
        return ready

    def _converted(self, args: Sequence[Argument], index: int) -> tuple[Any, ...]:
        """As numpy scalars, which cupy passes with their own bits; `index` is the CUDA device, -1 the CPU."""
        values = []
        for x in args:
            if isinstance(x, torch.Tensor):
                if x.get_device() != index:
                    raise ValueError(f"{self!r}: expected every tensor on one device, got one on {x.device}")
                values.append(np.uint64(x.data_ptr()))
            else:
                known = _KNOWN.get((type(x), x))
                values.append(self._scalar(x) if known is None else known)
        return tuple(values)

    def _scalar(self, x: Long | int | float | None) -> Any:
        if x is None:
            scalar: Any = np.uint64(0)
        elif isinstance(x, Long):
            if not -(1 << 63) <= x.value < 1 << 63:
                raise ValueError(f"{self!r}: expected an integer of 64 bits, got {x.value}")
            scalar = np.int64(x.value)
        elif isinstance(x, int):
            if not -(1 << 31) <= x < 1 << 31:
                raise ValueError(f"{self!r}: expected an integer of 32 bits (Long for 64), got {x}")
            scalar = np.int32(x)
        elif isinstance(x, float):
            scalar = np.float32(x)
        else:
            raise ValueError(f"{self!r}: expected tensors, ints, floats, Long or None, got {type(x).__name__}")
        if len(_KNOWN) < 1 << 16 and not (isinstance(x, float) and x == 0):  # -0.0 equals 0.0
            _KNOWN[type(x), x] = scalar
        return scalar


_KNOWN: dict[tuple[type, object], Any] = {}  # numbers as numpy scalars: sizes and strides come again and again


@dataclass
class _Ready:
    """A kernel compiled for one device."""

    kernel: Any
    function: Any  # of cupy.cuda, which takes a stream
    room: int  # bytes of dynamic shared memory that a block may have


def _on(index: int) -> AbstractContextManager[Any]:
    """Makes a device current, for torch and for cupy."""
    if index == 0 and torch.cuda.current_device() == 0:
        return nullcontext()
    import cupy

    stack = ExitStack()
    stack.enter_context(torch.cuda.device(index))
    stack.enter_context(cupy.cuda.Device(index))
    return stack


class _Stream(NamedTuple):
    """A stream as cupy's launch takes it."""

    ptr: int


def _three(size: Size) -> tuple[int, ...]:
    return (size, 1, 1) if isinstance(size, int) else (*size, 1, 1)[:3]
