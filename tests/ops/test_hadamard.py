"""The rotation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_kvcompress.ops.hadamard import inverse_rotate, rotate, rotation_matrix, signs, split

DIMS = [1, 2, 3, 7, 8, 20, 64, 80, 96, 112, 128, 192, 256, 576]


@pytest.mark.parametrize("dim", DIMS)
def test_matrix_is_orthonormal_and_equals_rotate(dim):
    matrix = rotation_matrix(dim, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), atol=1e-12)
    x = torch.randn(5, dim)
    assert torch.allclose(rotate(x).double(), x.double() @ matrix, atol=1e-5)
    assert torch.allclose(inverse_rotate(rotate(x)), x, atol=1e-5)


@pytest.mark.parametrize("dim", DIMS[4:])
def test_spreads_single_and_equal_coordinates(dim):
    power, rest = split(dim)
    for x in (torch.eye(dim), torch.ones(1, dim)):
        z = rotate(x / x.norm(dim=-1, keepdim=True)) * math.sqrt(dim)
        assert z.abs().max() < 6, "no coordinate far out in a unit normal"
    assert power * rest == dim


@given(dim=st.sampled_from(DIMS), rows=st.integers(1, 40), pick=st.integers(0, 39))
def test_same_bits_whatever_is_beside(dim, rows, pick):
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows))
    one = x[pick % rows]
    assert torch.equal(rotate(x)[pick % rows], rotate(one))
    assert torch.equal(rotate(x.repeat(3, 1))[pick % rows], rotate(one))
    assert torch.equal(inverse_rotate(x)[pick % rows], inverse_rotate(one))


def test_same_bits_with_more_threads():
    x = torch.randn(2000, 80)
    threads, alone = torch.get_num_threads(), rotate(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(rotate(x), alone)
    finally:
        torch.set_num_threads(threads)


def test_any_layout_and_dtype():
    x = torch.randn(4, 96, 3)
    assert torch.equal(rotate(x.mT), rotate(x.mT.contiguous()))
    half = torch.randn(3, 64).bfloat16()
    assert torch.equal(rotate(half), rotate(half.float()))
    before = x.clone()
    rotate(x.mT)
    assert torch.equal(x, before)


def test_signs_never_change():
    """Stored caches depend on them."""
    bits = "".join("1" if s > 0 else "0" for s in signs(64, torch.device("cpu")).flatten().tolist())
    assert f"{int(bits, 2):016x}" == "304947d8deead700"


def test_bad_dim():
    with pytest.raises(ValueError, match="dim: expected a positive head size, got 0"):
        split(0)
