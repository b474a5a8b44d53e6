"""Attention mass by the kernel against torch: sums in another order, so to 1e-5."""

import pytest
import torch

from hf_kvcompress.ops import kernels
from hf_kvcompress.ops.mass import add_mass, attention_mass

from .mutants import caught

#: rows, key-value heads, query heads of each, queries, tokens, slots
SHAPES = [(2, 2, 4, 1, 70, 0), (1, 2, 7, 5, 33, 0), (2, 1, 1, 9, 5, 4), (2, 2, 8, 3, 64, 3), (1, 3, 3, 2, 1, 65)]


def draw(batch, heads, groups, queries, tokens, slots, by_lines=False, seed=0):
    """Logits that miss some keys, a query that sees nothing, padding, lines of shuffled lanes."""
    g = torch.Generator().manual_seed(seed)
    lanes = torch.tensor([batch * heads - 1, 0, 0]) if by_lines else None
    count = batch * heads if lanes is None else len(lanes)
    scores = torch.randn(count, groups * queries, tokens, generator=g) * 3
    scores[torch.rand(scores.shape, generator=g) < 0.2] = -torch.inf
    lse = torch.randn(batch * heads, groups * queries, generator=g) + 3
    lse[0, 0] = -torch.inf
    scores[0 if lanes is None else 1, 0] = -torch.inf
    real = (torch.rand(batch, queries, generator=g) < 0.7).float()
    starts = torch.randint(0, queries + 1, (max(slots - 1, 0),), generator=g).sort().values
    starts = torch.cat([torch.zeros(1), starts, torch.full((1,), queries)]).int() if slots else None
    out = torch.rand(count, max(slots, 1), tokens + 3, generator=g)
    return scores, groups, heads, lse, real, lanes, starts, out


def check(scores, groups, heads, lse, real, lanes, starts, out):
    with kernels.emulate(None):
        expected = attention_mass(scores, groups, heads, lse, real, lanes, starts, out.clone())
    got = attention_mass(scores, groups, heads, lse, real, lanes, starts, out.clone())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(got[..., scores.shape[2] :], out[..., scores.shape[2] :])


@pytest.mark.parametrize("by_lines", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mass_is_torchs(shape, by_lines, emulated):
    scores, groups, heads, lse, real, *rest = draw(*shape, by_lines)
    check(scores, groups, heads, lse, real, *rest)
    check(scores, groups, heads, lse, None, *rest)
    weights = scores.exp()
    check(weights, groups, heads, None, real, *rest)
    check(weights, groups, heads, None, None, *rest)
    assert len(emulated.launches) == 4


def test_nothing_to_add(emulated):
    assert attention_mass(torch.zeros(2, 4, 0), 2, 1).shape == (2, 1, 0)
    assert not emulated.launches


def test_tokens_share_what_queries_pay(emulated):
    """The mass of all tokens is the number of real queries, since each pays 1."""
    logits = torch.randn(4, 6, 50)
    mass = attention_mass(logits, 2, 2, logits.logsumexp(2), torch.tensor([[1.0, 0, 1], [1, 1, 1]]))
    torch.testing.assert_close(mass.sum((1, 2)), torch.tensor([4.0, 4, 6, 6]))


def test_every_schedule(scheduled):
    check(*draw(2, 2, 4, 3, 40, 2, by_lines=True))


def test_op_is_traced(emulated):
    torch.library.opcheck(add_mass, draw(*SHAPES[2]), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("after", "old", "new"),
    [
        ("sums[share][threadIdx.x] = sum;", "__syncthreads();", ""),
        ("float sum = 0.0f;", "if (column < tokens)", "if (true)"),
        ("if (real)", "lane / heads", "lane"),
        ("const float total", "total < -3.0e38f ? 0.0f : ", ""),
    ],
)
def test_planted_bugs_are_caught(after, old, new):
    assert caught(lambda: check(*draw(2, 2, 4, 3, 40, 2)), "attention_mass.cu", after, old, new)
