"""Bugs planted in the codecs' kernels: each must be caught by the comparison with torch or by the emulator itself."""

import pytest
import torch

from hf_kvcompress.codecs.registry import make_codec
from hf_kvcompress.ops import kernels, sources

from ..codecs.test_codecs import draw
from . import build

ROTATED, INTEGERS, FLOATS = "quantize_rotated.cu", "quantize_int.cu", "quantize_fp8.cu"
BARRIER = "        __syncthreads();\n"
#: what is wrong -> source, text, what stands there instead, codec, role
BUGS = {
    "rotation without barriers": (
        ROTATED,
        "x[i + half] = a - b;\n        }\n" + BARRIER,
        "x[i + half] = a - b;\n        }\n",
    ),
    "sum without barriers": (ROTATED, "n = half;\n" + BARRIER, "n = half;\n"),
    "next sum too early": (ROTATED, "float sum = x[0];\n    __syncthreads();\n", "float sum = x[0];\n"),
    "largest number too early": (
        ROTATED,
        "room[threadIdx.x] = own;\n    __syncthreads();\n",
        "room[threadIdx.x] = own;\n",
    ),
    "tile used too early": (
        ROTATED,
        "= number;\n        }\n    }\n    __syncthreads();\n",
        "= number;\n        }\n    }\n",
    ),
    "odd rest of a sum lost": (ROTATED, "i == 0 && n % 2", "n < 0"),
    "spread not taken out": (ROTATED, "(1.0f / from_bfloat16(spread[own]))", "1.0f"),
    "scale rounded down": (
        ROTATED,
        "scale_row + at.token(me.vector)] = bfloat16_nearest(kept)",
        "scale_row + at.token(me.vector)] = __float_as_int(kept) >> 16",
    ),
    "packed too early": (INTEGERS, "    __syncthreads();\n    Planes out", "    Planes out"),
    "channels beyond the head size": (
        INTEGERS,
        "        if (c < dim) {\n            for",
        "        {\n            for",
    ),
    "missing channels packed": (INTEGERS, "if (i < known) byte |=", "byte |="),
    "fields in another order": (INTEGERS, "& mask) << place;", "& mask) << (8 - bits - place);"),
    "wrong page": (INTEGERS, "page * tile.eighth * bits + inside", "page * tile.eighth + inside"),
    "scale rounded to the nearest": (INTEGERS, "bfloat16_ceil(fmaxf(", "bfloat16_nearest(fmaxf("),
    "bad numbers kept": (INTEGERS, "fabsf(x) <= 3.402823466e38f ? x : 0.0f", "x"),
    "more tokens than there are": (FLOATS, "if (job >= rows * tokens) return;", ""),
    "scale of the neighbour": (
        FLOATS,
        "scale[row * scale_row + token] = bits",
        "scale[row * scale_row + token / 2 * 2] = bits",
    ),
}


def outcome(name, role, dim, x):
    """Bytes and numbers under whatever serves."""
    codec = make_codec(name, role, dim, page_size=16, group_size=16)
    with kernels.emulate(None):
        segment = codec.begin_segment(x)
        packed = codec.encode(x, segment)
    got = codec.encode(x, segment)
    return [*got.values(), codec.decode({**packed, **segment})]


CODECS = {ROTATED: [("eqrot3", "key", 80), ("turbo2", "value", 25)], FLOATS: [("fp8", "key", 20)]}
CODECS[INTEGERS] = [("channel4", "value", 20), ("int4", "key", 20), ("int4", "value", 20)]


def differs(emulator, cases):
    """Whether the emulator complains or results are not torch's."""
    for name, role, dim in cases:
        x = draw("channels", (1, 32, dim), torch.float32)[:, : 32 if name != "fp8" else 27]
        x[0, 5, 3] = torch.nan
        with kernels.emulate(None):
            expected = outcome(name, role, dim, x)
        try:
            with kernels.emulate(emulator):
                got = outcome(name, role, dim, x)
        except build.EmulationError:
            return True
        if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
            return True
    return False


@pytest.mark.parametrize("source", CODECS)
def test_nothing_is_planted(source, poisoned):
    assert not differs(build.Emulator(), CODECS[source])


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, poisoned):
    source, right, wrong = BUGS[bug]
    text = sources.expand(source)
    assert text.count(right) >= 1, "the kernel has changed: plant the bug anew"
    planted = {source: text.replace(right, wrong)}
    assert any(differs(build.Emulator(schedule, texts=planted), CODECS[source]) for schedule in build.SCHEDULES)
