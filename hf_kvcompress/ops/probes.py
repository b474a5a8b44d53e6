"""Every PTX wrapper of `cuda/ptx.cuh` against a known answer, on the device that is there.

Without a GPU the wrappers are only our reading of the PTX ISA; `kvcompress doctor` and `eval/bench_gpu.py` run these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import kernels

EXP2_ERROR = 2.0**-21  # relative; ex2.approx errs by 2 units in the last place


def _words(n: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-(1 << 31), 1 << 31, (n,), generator=torch.Generator().manual_seed(n)).int().to(device)


def _numbers(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def _run(name: str, *args: kernels.Argument, source: str = "probes.cu") -> None:
    kernels.load(source, f"probe_{name}")(1, 32, args)


def _different(got: torch.Tensor, expected: torch.Tensor) -> str:
    wrong = (got != expected) & ~(got.isnan() & expected.isnan())
    return f"{int(wrong.sum())} of {wrong.numel()} numbers are wrong" if wrong.any() else ""


def load_once(device: torch.device) -> str:
    """Loads of 4, 8 and 16 bytes."""
    words, out = _words(64, device), torch.zeros(3, 64, dtype=torch.int32, device=device)
    _run("load_once", words, out)
    return _different(out, words.expand(3, -1))


def lop3(device: torch.device) -> str:
    """Functions of three bits."""
    a, b, c = _words(96, device).view(3, 32)
    out = torch.zeros(4, 32, dtype=torch.int32, device=device)
    _run("lop3", a, b, c, out)
    return _different(out, torch.stack([a & b | c, a ^ b ^ c, a & b | ~a & c, a & b ^ c]))


def exp2(device: torch.device) -> str:
    """Powers of two."""
    x = torch.linspace(-100, 100, 2001, device=device)
    out = torch.zeros_like(x)
    _run("exp2", x, out, x.numel())
    error = (out.double() / x.double().exp2() - 1).abs().max().item()
    return "" if error <= EXP2_ERROR else f"relative error {error:.2g}"


def e4m3(device: torch.device) -> str:
    """8-bit floats, both ways: all bytes, all ties between them, and numbers outside the range."""
    every = torch.arange(256, device=device).to(torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[:127]
    x = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, _numbers(256, device=device) * 0.02])
    x = torch.cat([x, -x, torch.tensor([448.0, 460.0, 1e9, -1e9], device=device)])
    pairs = torch.zeros(x.numel() // 2, dtype=torch.int16, device=device)
    numbers = torch.zeros(256, device=device)
    _run("e4m3", x, pairs, numbers, pairs.numel())
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return _different(pairs.view(torch.float8_e4m3fn).float(), expected) or _different(numbers, every)


def dp4a(device: torch.device) -> str:
    """Sums of four products of bytes."""
    a, b, c = _words(96, device).view(3, 32)
    c, out = c >> 8, torch.zeros(32, dtype=torch.int32, device=device)
    _run("dp4a", a, b, c, out)
    products = a.contiguous().view(torch.int8).int() * b.contiguous().view(torch.int8).int()
    return _different(out, c + products.view(32, 4).sum(1))


def _mma(name: str, dtype: torch.dtype, device: torch.device) -> str:
    a, b = _numbers(16, 16, device=device).to(dtype), _numbers(16, 8, device=device).to(dtype)
    start = _numbers(16, 8, device=device) + 1
    out = start.clone()
    _run(name, a.view(torch.int16), b.view(torch.int16), out, source="probes_mma.cu")
    error = (out - (a.double() @ b.double() + start)).abs().max().item()
    return "" if error < 1e-4 else f"error {error:.2g}: fragments are laid out in another way"


def mma_f16(device: torch.device) -> str:
    """mma.m16n8k16 with halves."""
    return _mma("mma_f16", torch.float16, device)


def mma_bf16(device: torch.device) -> str:
    """mma.m16n8k16 with bfloat16."""
    return _mma("mma_bf16", torch.bfloat16, device)


def copies(device: torch.device) -> str:
    """Asynchronous copies to shared memory, waited for in groups."""
    x = _numbers(3, 128, device=device)
    out = torch.zeros_like(x)
    _run("copies", x, out, source="probes_mma.cu")
    return _different(out, x.flip(1))


ANY: tuple[Callable[[torch.device], str], ...] = (load_once, lop3, exp2, e4m3, dp4a)
SM80: tuple[Callable[[torch.device], str], ...] = (mma_f16, mma_bf16, copies)


def run(device: torch.device | str) -> dict[str, str]:
    """What is wrong with each wrapper on `device`, by name; empty where it does what it should.

    RuntimeError if a kernel does not compile. Waits for the device.
    """
    device = torch.device(device)
    modern = kernels.capability(torch.empty(0, device=device)) >= (8, 0)
    return {probe.__name__: probe(device) for probe in (*ANY, *(SM80 if modern else ()))}
