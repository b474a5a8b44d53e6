"""The kernel that rounds with error feedback, against torch: products may be summed in another order there."""

import pytest
import torch

from hf_kvcompress.codecs.registry import make_codec
from hf_kvcompress.ops import kernels
from hf_kvcompress.ops.feedback import feedback, feedback_matrix, round_with_feedback

from .mutants import caught

STEP = {2: 1.29, 3: 0.67}


def problem(heads, dim, tokens):
    """Vectors, the moment of queries that lie mostly in a few directions, and feedback weights."""
    g = torch.Generator().manual_seed(0)
    queries = torch.randn(heads, 200, 6, generator=g) @ torch.randn(heads, 6, dim, generator=g)
    queries += 0.3 * torch.randn(heads, 200, dim, generator=g)
    return torch.randn(heads, dim, tokens, generator=g), *feedback_matrix(queries.mT @ queries / 200, 0.01)


def compare(heads, dim, tokens, nbits):
    """A code that falls the other way sends its error on, so a token may differ; few do, and none gets worse by it."""
    z, moment, weights = problem(heads, dim, tokens)
    got = round_with_feedback(z.clone(), weights, STEP[nbits], nbits)
    with kernels.emulate(None):
        expected = round_with_feedback(z.clone(), weights, STEP[nbits], nbits)
    assert (got != expected).any(1).float().mean() <= 0.02
    half = 2 ** (nbits - 1)
    assert got.abs().max() <= half - 0.5 and ((got - 0.5).frac() == 0).all()
    lost = [((moment @ e) * e).sum() for e in (codes * STEP[nbits] - z for codes in (got, expected))]
    assert lost[0] <= 1.02 * lost[1]


@pytest.mark.parametrize(("heads", "dim", "tokens"), [(2, 64, 96), (1, 80, 45), (1, 256, 32), (3, 20, 7)])
@pytest.mark.parametrize("nbits", [2, 3])
def test_codes_are_torchs(heads, dim, tokens, nbits, emulated):
    compare(heads, dim, tokens, nbits)
    assert emulated.launches == ["round_with_feedback"]


def test_every_schedule(scheduled):
    compare(2, 40, 33, 2)


def test_larger_heads_stay_torchs(emulated):
    z, _, weights = problem(1, 512, 8)
    round_with_feedback(z, weights, 1.0, 2)
    assert not emulated.launches


@pytest.mark.parametrize("nbits", [2, 3])
def test_a_codec_packs_what_torch_packs(nbits, emulated):
    codec = make_codec(f"eqrot{nbits}", "key", 64)
    z, moment, _ = problem(2, 64, 64)
    x = z.mT.view(1, 2, 1, 64, 64)
    with kernels.emulate(None):
        segment = codec.begin_segment(x)
        expected = codec.decode({**codec.encode(x, segment, moment[None]), **segment})
    got = codec.decode({**codec.encode(x, segment, moment[None]), **segment})
    assert "round_with_feedback" in emulated.launches
    assert (got != expected).any(-1).float().mean() <= 0.02


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("__syncthreads();\n    for", "for"),
        ("        __syncthreads();\n    }", "    }"),
        ("c + 1 + part", "c + 2 + part"),
        ("weight[(size_t)c * dim + later]", "weight[(size_t)later * dim + c]"),
        ("part == 0 && real", "part == 0"),
        ("real ? z[base + (size_t)c * tokens] : 0.0f", "z[base + (size_t)c * tokens]"),
    ],
)
def test_planted_bug_is_caught(old, new, poisoned):
    assert caught(lambda: compare(2, 40, 33, 2), "quantize_feedback.cu", "extern __shared__", old, new)


def test_op_is_registered(emulated):
    z, _, weights = problem(1, 40, 33)
    torch.library.opcheck(
        feedback, (z, weights, torch.zeros_like(z), 1.0, 2), test_utils=("test_schema", "test_faketensor")
    )
