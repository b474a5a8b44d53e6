"""Kernels that make a segment's statistics, against eqrot's torch code: equal but for the order of float64 sums."""

import math

import pytest
import torch

from hf_kvcompress.codecs.registry import make_codec
from hf_kvcompress.ops import kernels, segments, sources

from ..codecs.test_codecs import KINDS, draw, same
from . import build

SOURCE = "quantize_segment.cu"


def made(x, later, query_ms):
    """Histories and statistics under whatever serves: of a beginning, and of what follows it."""
    codec = make_codec("eqrot4", "key", x.shape[-1])
    history = codec.learn({}, x)
    longer = codec.learn(history, later)
    begun = codec.begin_segment(x, query_ms), codec.begin_segment(later, None, history)
    return [history, longer], [*begun, codec.begin_segment(later, query_ms, longer)]


def close(got, expected):
    """Histories to 1e-11; statistics to a step of bfloat16, which one in 20 may be off (torch sums in float32)."""
    for ours, theirs in zip(got[0], expected[0], strict=True):
        for name in theirs:
            size = theirs[name].abs() if name != "first" else theirs["second"].mul(theirs["weight"]).sqrt()
            if not ((ours[name] - theirs[name]).abs() <= 1e-11 * size).all():
                return False
    for ours, theirs in zip(got[1], expected[1], strict=True):
        for name in theirs:
            a, b = (t[name].contiguous().view(torch.int16).int() for t in (ours, theirs))
            if (a - b).abs().max() > 1 or (a != b).float().mean() > 0.05:
                return False
    return True


def compare(x, later):
    query_ms = torch.rand(*x.shape[:-2], x.shape[-1], generator=torch.Generator().manual_seed(2))
    got = made(x, later, query_ms)
    with kernels.emulate(None):
        return close(got, made(x, later, query_ms))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "subnormal"])
@pytest.mark.parametrize(("dim", "tokens"), [(64, 64), (20, 77), (256, 5)])
def test_statistics_are_torchs(kind, dim, tokens, emulated):
    shape = (2, 2, 1, tokens, dim)
    assert compare(draw(kind, shape, torch.float32), draw(kind, shape, torch.float32, 1))
    assert emulated.launches == ["segment_learn"] * 2 + ["segment_begin"] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype, emulated):
    wide = draw("channels", (2, 80, 3, 128), dtype)
    assert compare(wide[:, 10:74, :, :64].transpose(1, 2), wide[:, 2:66, :, 64:].transpose(1, 2))
    assert compare(wide[:, :64, :, ::2].transpose(1, 2), wide[:, :64, :, 1::2].transpose(1, 2))


def test_what_is_not_finite_counts_as_zero(emulated):
    clean = draw("channels", (2, 48, 64), torch.float32)
    clean[0, 20] = 0
    x = clean.clone()
    x[0, 20, ::3] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])[torch.arange(22) % 4]
    query_ms = torch.rand(2, 64)
    bad = query_ms.clone()
    query_ms[0, 3], bad[0, 3] = 0, math.nan
    codec = make_codec("eqrot2", "key", 64)
    same(codec.begin_segment(x, bad), codec.begin_segment(clean, query_ms))
    same(codec.learn({}, x), codec.learn({}, clean))


def test_rows_alone_have_the_same_statistics(emulated):
    x, later = draw("channels", (3, 2, 50, 96), torch.bfloat16), draw("channels", (3, 2, 64, 96), torch.bfloat16, 1)
    query_ms = torch.rand(3, 2, 96)
    together, alone = made(x, later, query_ms), made(x[1, 1], later[1, 1], query_ms[1, 1])
    for batch, own in zip([*together[0], *together[1]], [*alone[0], *alone[1]], strict=True):
        same({name: t[1, 1] for name, t in batch.items()}, own)


def test_every_schedule(scheduled):
    assert compare(draw("channels", (1, 40, 80), torch.bfloat16), draw("channels", (1, 33, 80), torch.bfloat16, 1))


BARRIER = "    __syncthreads();\n"
BUGS = {
    "sums used too early": (BARRIER + "    double offset", "    double offset"),
    "sums written too early": (
        BARRIER + "    if (me.slot == 0) {\n        me.sums[",
        "    if (me.slot == 0) {\n        me.sums[",
    ),
    "totals used too early": (BARRIER + "\n    double total", "\n    double total"),
    "learnt too early": (BARRIER + "    if (me.slot != 0) return;", "    if (me.slot != 0) return;"),
    "one token too many": ("for (int t = me.slot; t < tokens;", "for (int t = me.slot; t <= tokens;"),
    "history does not fade": ("    fade = exp(-tokens / (double)memory);", "    fade = 1.0;"),
    "age forgotten": ("me.sums[threadIdx.x] = sum * age;", "me.sums[threadIdx.x] = sum;"),
    "queries not used": ("relative /= fmaxf", "relative /= 1.0f + 0.0f * fmaxf"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, poisoned):
    right, wrong = BUGS[bug]
    text = sources.expand(SOURCE)
    assert right in text, "the kernel has changed: plant the bug anew"
    x, later = draw("channels", (2, 64, 80), torch.float32), draw("normal", (2, 40, 80), torch.float32, 1)
    query_ms = torch.rand(2, 80, generator=torch.Generator().manual_seed(2))
    expected = made(x, later, query_ms)
    for schedule in build.SCHEDULES:
        try:
            with kernels.emulate(build.Emulator(schedule, texts={SOURCE: text.replace(right, wrong)})):
                got = made(x, later, query_ms)
        except build.EmulationError:
            return
        if not close(got, expected):
            return
    pytest.fail("nobody noticed")


def test_ops_are_registered(emulated):
    x, sums = draw("channels", (1, 2, 16, 64), torch.bfloat16), torch.ones(3, 2, 64, dtype=torch.float64)
    weight, halves = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 2, 64, dtype=torch.bfloat16)
    calls = [
        (segments.segment_begin, (x, None, sums[0], sums[1], weight, halves[0], halves[1].clone(), 1024.0, 1e-4)),
        (segments.segment_learn, (x, None, None, None, sums[0], sums[1].clone(), weight, 1024.0)),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
