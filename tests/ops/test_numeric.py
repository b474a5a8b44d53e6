"""Sums and roundings that do not depend on what is beside them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_kvcompress.ops.numeric import bfloat16_ceil, blocks, clean_, tree_sum


@given(n=st.integers(1, 70), others=st.integers(1, 20), dim=st.integers(0, 1))
def test_tree_sum_is_a_sum_and_independent(n, others, dim):
    x = torch.randn(n, others)
    x = x if dim == 0 else x.T
    total = tree_sum(x, dim)
    assert torch.allclose(total, x.double().sum(dim).float(), atol=1e-4)
    one = x.narrow(1 - dim, others - 1, 1)
    assert torch.equal(tree_sum(one, dim), total[-1:])


@given(st.floats(0, 2.0**120, width=32))
def test_bfloat16_ceil(number):
    x = torch.tensor([number])
    up = bfloat16_ceil(x)
    assert up.float() >= x
    assert up.float() == x or torch.nextafter(up.float(), torch.zeros(1)).to(torch.bfloat16) == up
    assert up.float() <= x * (1 + 2**-7) + 1e-38


def test_clean():
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1e38, -0.0, 2.0])
    y = clean_(x)
    assert torch.equal(y, torch.tensor([0.0, 0, 0, 1e37, -1e37, 0, 2]))
    assert not torch.signbit(y[5])


@pytest.mark.parametrize(
    ("rows", "parts", "numel", "budget"), [(5, 3, 10, 7), (5, 3, 10, 60), (1, 9, 4, 16), (4, 1, 1, 99)]
)
def test_blocks_cover_everything_once(rows, parts, numel, budget):
    seen = torch.zeros(rows, parts)
    for start, end, first, last in blocks(rows, parts, numel, budget):
        seen[start:end, first:last] += 1
        assert (end - start) * (last - first) * numel <= max(budget, numel)
    assert (seen == 1).all()
