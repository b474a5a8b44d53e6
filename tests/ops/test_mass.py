"""Attention mass: the reference against loops."""

import pytest
import torch

from hf_kvcompress.ops.mass import attention_mass


@pytest.mark.parametrize("by_lines", [False, True])
@pytest.mark.parametrize("slotted", [False, True])
def test_mass_is_what_queries_pay(by_lines, slotted):
    g = torch.Generator().manual_seed(0)
    batch, heads, groups, queries, tokens = 2, 3, 2, 5, 7
    lanes = torch.tensor([4, 0, 4, 5]) if by_lines else torch.arange(batch * heads)
    logits = torch.randn(len(lanes), groups, queries, tokens, generator=g)
    logits[0, 1, 2] = -torch.inf
    lse = torch.randn(batch * heads, groups, queries, generator=g)
    lse[int(lanes[0]), 1, 2] = -torch.inf
    real = (torch.rand(batch, queries, generator=g) < 0.6).float()
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32) if slotted else None
    out = torch.rand(len(lanes), 3 if slotted else 1, tokens + 2, generator=g)
    expected = out.clone()
    for line, lane in enumerate(lanes.tolist()):
        for group in range(groups):
            for query in range(queries):
                weight = (logits[line, group, query] - lse[lane, group, query]).exp()
                if lse[lane, group, query] == -torch.inf:
                    weight = torch.zeros(tokens)
                slot = 0 if not slotted else (0 if query < 2 else 2)
                expected[line, slot, :tokens] += weight * real[lane // heads, query]
    mass = attention_mass(
        logits.flatten(1, 2), groups, heads, lse.flatten(1, 2), real, lanes if by_lines else None, starts, out
    )
    assert mass is out
    torch.testing.assert_close(mass, expected)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"scores: expected \[L, 3 \* q, n\] float32, got \[1, 4, 2\]"):
        attention_mass(torch.zeros(1, 4, 2), 3, 1)
    with pytest.raises(ValueError, match=r"out: expected contiguous \[1, 1, >= 2\], got \[1, 1, 1\]"):
        attention_mass(torch.zeros(1, 4, 2), 2, 1, out=torch.zeros(1, 1, 1))
