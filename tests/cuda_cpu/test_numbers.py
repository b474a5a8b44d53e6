"""The shim's 16-bit numbers, conversions and bit operations are those of torch and of Python's integers."""

import pytest
import torch

from hf_kvcompress.ops import kernels

from . import build, compiling

TEXT = (compiling.SHIM.parent / "planted" / "numbers.cu").read_text()
DTYPES = {0: torch.float16, 1: torch.bfloat16}


def run(name, args, n, **defines):
    with kernels.emulate(build.Emulator(texts={"numbers.cu": TEXT})):
        kernels.load("numbers.cu", name, **defines)(-(-n // 256), 256, [*args, n])


def same(got, expected):
    return torch.equal(got.nan_to_num(7.5), expected.nan_to_num(7.5)) and torch.equal(got.isnan(), expected.isnan())


@pytest.mark.parametrize("bfloat", DTYPES)
def test_every_16_bit_number_and_the_ties_between(bfloat):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(DTYPES[bfloat])
    floats = every.float()
    ties = (floats.double() + floats.roll(-1).double()).div(2).float()
    normal = ties.where((ties.abs() >= 2.0**-126) | (ties == 0), 0)  # subnormal floats count as zero in kernels
    got, back = torch.zeros_like(every), torch.zeros_like(floats)
    run("convert", [normal, got, every, back], every.numel(), BFLOAT=bfloat)
    assert same(back, floats)
    assert same(got, normal.to(DTYPES[bfloat]))


@pytest.mark.parametrize("bfloat", DTYPES)
def test_arithmetic_rounds_once(bfloat):
    dtype = DTYPES[bfloat]
    a, b, c = torch.randn(3, 4096).to(dtype)
    c[::2] = (a[::2].double() * b[::2].double()).to(dtype).neg()  # where a product rounded before the sum would show
    out = torch.zeros(6, 4096, dtype=dtype)
    run("arithmetic", [a, b, c, out], 4096, BFLOAT=bfloat)
    x, y, z = a.double(), b.double(), c.double()
    fused = (x * y + z).to(dtype)
    expected = torch.stack([(x + y).to(dtype), (x - y).to(dtype), (x * y).to(dtype), (x / y).to(dtype), fused, fused])
    assert torch.equal(out, expected)
    assert not torch.equal(fused, (a * b + c))


def test_integers():
    x = torch.cat([torch.randn(500) * 10, torch.tensor([0.5, 1.5, 2.5, -0.5, 3e9, -3e9, 1e20, torch.inf, -torch.inf])])
    x = torch.cat([x, torch.tensor([torch.nan, 5e9, 4e9])])
    bits = torch.randint(-(1 << 31), 1 << 31, x.shape).int()
    bits[:3] = torch.tensor([0, -1, 1])
    out = torch.zeros(9, x.numel(), dtype=torch.int32)
    run("integers", [x, bits, out], x.numel(), BFLOAT=0)
    low, high = -(1 << 31), (1 << 31) - 1
    wide = x.double().nan_to_num(0, torch.inf, -torch.inf)
    for row, rounded in enumerate((wide.round(), wide.trunc(), wide.floor())):
        assert torch.equal(out[row].long(), rounded.clamp(low, high).long())
    assert torch.equal(out[3].long() & 0xFFFFFFFF, wide.round().clamp(0, (1 << 32) - 1).long())
    numbers = [value & 0xFFFFFFFF for value in bits.tolist()]
    assert out[4].tolist() == [value.bit_count() for value in numbers]
    assert out[5].tolist() == [32 - value.bit_length() for value in numbers]
    assert out[6].tolist() == [(value & -value).bit_length() for value in numbers]
    for value, permuted, shifted in zip(numbers, out[7].tolist(), out[8].tolist(), strict=True):
        both = value | (value ^ 0xFFFFFFFF) << 32
        expected = sum((both >> 8 * pick & 255) << 8 * i for i, pick in enumerate((5, 1, 7, 3)))
        assert permuted & 0xFFFFFFFF == expected
        assert shifted & 0xFFFFFFFF == ((5 << 32 | value) >> 7) & 0xFFFFFFFF
