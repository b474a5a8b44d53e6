"""The fused decode attention on the CPU shim against the torch path over the same packed pages.

Both sum the same numbers in another order, and the kernels split queries and weights into two halves, 22 bits together:
float32 outputs of about 1 agree to a few units of 1e-6, half precision ones to their own rounding.
"""

import gc
import weakref

import pytest
import torch

from hf_kvcompress.config import LayerConfig
from hf_kvcompress.masks import DenseMask
from hf_kvcompress.ops import attention_table, kernels, sources
from hf_kvcompress.policies.settings import EvictionConfig
from hf_kvcompress.softmax import Extras

from . import build
from .attention_helpers import attend, both, causal, emulate, filled, kernel_of

CLOSE = dict(atol=2e-5, rtol=2e-5)
SMALL = LayerConfig("eqrot3", "eqrot2")  # serves most tests, so that it is compiled once
#: keys, values, head size, page: together every codec as keys and as values
PAIRS = [
    ("eqrot4", "eqrot4", 128, 32),
    ("eqrot3", "eqrot2", 64, 32),
    ("eqrot2", "turbo2", 64, 16),
    ("turbo4", "turbo3", 64, 64),
    ("turbo3", "turbo4", 64, 128),
    ("turbo2", "eqrot3", 64, 128),
    ("int4", "int4", 128, 32),
    ("int3", "int2", 64, 64),
    ("int2", "int3", 64, 32),
    ("int8", "fp8", 128, 32),
    ("fp8", "int8", 64, 16),
    ("channel4", "channel2", 64, 64),
    ("channel3", "channel8", 64, 64),
]
PLAIN = [
    ("eqrot4", "eqrot4", 80, 32),
    ("channel8", "channel3", 48, 32),
    ("int3", "fp8", 112, 8),
    ("identity", "turbo2", 64, 32),
]


@pytest.fixture
def emulator(poisoned, monkeypatch):
    monkeypatch.delenv("HF_KVCOMPRESS_BACKEND", raising=False)
    return emulate()


@pytest.mark.parametrize("keys, values, dim, page", PAIRS + PLAIN)
def test_every_codec(keys, values, dim, page, emulator):
    layer = filled(
        LayerConfig(keys, values, page_size=page, group_size=min(page, 64) if "channel" in keys else 64),
        dim=dim,
        tokens=300,
    )
    reference, out = both(layer, torch.randn(1, 6, 1, dim), emulator)
    torch.testing.assert_close(out, reference, **CLOSE)
    assert kernel_of(emulator) == ("attention_mma" if (keys, values, dim, page) in PAIRS else "attention_plain")


def test_head_size_256(emulator):
    layer = filled(LayerConfig(), dim=256, heads=1, tokens=110)
    reference, out = both(layer, torch.randn(1, 2, 1, 256), emulator)
    torch.testing.assert_close(out, reference, **CLOSE)
    assert kernel_of(emulator) == "attention_mma"


@pytest.mark.parametrize("groups", [1, 4, 7, 8, 12])
@pytest.mark.parametrize("queries", [1, 5])
def test_groups_and_several_queries(groups, queries, emulator):
    layer = filled(SMALL, batch=2, tokens=200, new=queries)
    reference, out = both(layer, torch.randn(2, 2 * groups, queries, 64), emulator)
    torch.testing.assert_close(out, reference, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, emulator):
    layer = filled(SMALL, dtype=dtype, tokens=200)
    reference, out = both(layer, torch.randn(1, 8, 1, 64, dtype=dtype), emulator)
    torch.testing.assert_close(out, reference, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.fixture
def long_ranges(monkeypatch):
    """A block takes all tokens of a line, so that every warp goes through several tiles."""
    monkeypatch.setattr(attention_table, "_blocks_at_once", lambda device: 1)


@pytest.mark.parametrize("keys, values, dim, page", [PAIRS[1], PAIRS[5]])
@pytest.mark.parametrize("tokens", [700, 1100])
def test_long_ranges(tokens, keys, values, dim, page, emulator, long_ranges):
    layer = filled(LayerConfig(keys, values, page_size=page), dim=dim, tokens=tokens)
    layer.chunk.keys *= 3
    reference, out = both(layer, 2 * torch.randn(1, 4, 1, dim), emulator)
    torch.testing.assert_close(out, reference, **CLOSE)


@pytest.mark.parametrize("tokens", [3, 36, 100, 131, 400, 1000])
def test_lengths(tokens, emulator):
    layer = filled(SMALL, tokens=tokens)
    reference, out = both(layer, torch.randn(1, 4, 1, 64), emulator)
    torch.testing.assert_close(out, reference, **CLOSE)


@pytest.mark.parametrize("kind", ["bool", "one for all", "by head"])
def test_dense_masks(kind, emulator):
    layer = filled(SMALL, batch=2, tokens=200, new=3)
    shape = {"bool": (2, 1), "one for all": (1, 1), "by head": (2, 8)}[kind]
    mask = torch.rand(*shape, 3, 203) < 0.5
    mask[:, :, 1, :150] = False  # whole pages that a query does not see
    mask[-1, :, 2] = False  # a query that sees nothing gives 0
    reference, out = both(layer, torch.randn(2, 8, 3, 64), emulator, DenseMask(mask, 0))
    torch.testing.assert_close(out, reference, **CLOSE)
    assert (out[-1, :, 2] == 0).all()


def test_soft_cap_and_sinks(emulator):
    layer = filled(SMALL, tokens=200)
    extras = Extras(softcap=5.0, sink_logits=torch.randn(8))
    reference, out = both(layer, 3 * torch.randn(1, 8, 1, 64), emulator, extras=extras)
    torch.testing.assert_close(out, reference, **CLOSE)


@pytest.mark.parametrize("size, growth", [(1e-30, 0.0), (1e30, 0.0), (1.0, 30.0), (1.0, -6.0)])
def test_values_of_any_size(size, growth, emulator, long_ranges):
    layer = filled(SMALL, tokens=700, size=size, growth=growth)
    reference, out = both(layer, torch.randn(1, 8, 1, 64), emulator)
    size = reference.abs().max()
    torch.testing.assert_close(out / size, reference / size, **CLOSE)


def test_large_scores(emulator):
    layer = filled(SMALL, tokens=200)
    reference, out = both(layer, 300 * torch.randn(1, 8, 1, 64), emulator)
    torch.testing.assert_close(out, reference, atol=1e-3, rtol=1e-3)  # scores of some 1000 have an error of 1e-4


def test_rows_of_different_length(emulator):
    layer = filled(SMALL, batch=3, tokens=200)
    for row, count in enumerate((96, 200, 0)):
        layer.storage._truncate_row(row, count)
        layer.storage.positions.counts[row] = count
    layer.chunk.start = 200
    reference, out = both(layer, torch.randn(3, 8, 1, 64), emulator)
    torch.testing.assert_close(out, reference, **CLOSE)


def test_nothing_is_uploaded_between_two_seals(emulator, monkeypatch):
    uploads = []
    upload = attention_table.upload
    monkeypatch.setattr(attention_table, "upload", lambda *args: uploads.append(1) or upload(*args))
    layer = filled(SMALL, tokens=200)
    for step in range(40):
        query = torch.randn(1, 4, 1, 64)
        if step % 13 == 0:
            reference, out = both(layer, query, emulator)
            torch.testing.assert_close(out, reference, **CLOSE)
        else:
            attend(layer, query, emulator=emulator)
        layer.update(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64))
    assert len(uploads) <= 3


def test_what_is_kept_does_not_keep_a_cache_alive(emulator):
    for config in (SMALL, LayerConfig("eqrot3", "eqrot2", eviction=EvictionConfig("streaming", budget=160))):
        layer = filled(config, tokens=200)
        attend(layer, torch.randn(1, 4, 1, 64), emulator=emulator)
        storage = weakref.ref(layer.storage)
        del layer
        gc.collect()
        assert storage() is None


@pytest.mark.parametrize("schedule", build.SCHEDULES)
def test_schedules(schedule, poisoned):
    layer = filled(SMALL, tokens=170, heads=1)
    query = torch.randn(1, 4, 1, 64)
    first, other = (attend(layer, query, emulator=emulate(name)) for name in ("forward", schedule))
    assert torch.equal(first, other)


BARRIER = "    __syncthreads();\n"
#: what is wrong -> text in the expanded source, the part of it that changes, and what stands there instead
BUGS = {
    "fragments read too early": ("warp == 0, fragments);\n" + BARRIER, BARRIER, ""),
    "fragments overwritten too early": (
        "    __syncthreads();  // the fragments are no longer needed\n",
        BARRIER[:-1],
        "",
    ),
    "warps joined too early": ("total;\n    }\n" + BARRIER + "    for (int r = 0; r < count", BARRIER, ""),
    "tokens behind the last one seen": ("return token < end && (!positions", "token < end &&", ""),
    "one warp forgotten": ("for (int w = 0; w < WARPS; w++) x = fmaf", "w = 0", "w = 1"),
    "sums not shrunk": ("sums.out[n][i] *= shrink;", "shrink", "1.0f"),
    "total not shrunk": ("total = fmaf(total, shrink, along);", "shrink", "1.0f"),
    "another exponent": ("exponent - sums.exponent > 126 ? 0.0f : power_of(127", "127", "126"),
    "keys behind the last page": (
        "2 * (at.group % 2);\n            token = token < capacity ? token : capacity - 1;",
        "capacity - 1;",
        "token;",
    ),
    "values behind the last page": ("if (byte >= line) byte = 0;", "byte = 0;", ";"),
    "low halves of weights lost": ("*low = bits_of(__floats2half2_rn(x - __low", "*low = ", "*low = 0 * "),
    "exact tile reused too early": ("start += TILE) {\n    " + BARRIER, "__syncthreads();", ""),
    "new tokens as stored ones": ("(t - call.window) * call.table[NEW_KEY_TOKEN]", "(t - call.window)", "t"),
    "mean of the keys lost": ("if (threadIdx.x % 32 == 0) bias[r] = sum;", "sum", "0.0f"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, poisoned, long_ranges):
    around, old, new = BUGS[bug]
    text = sources.expand("attention_mma.cu")
    assert text.count(around) == 1 and old in around, f"the source has {text.count(around)} times: {around}"
    text = text.replace(around, around.replace(old, new))
    layer = filled(
        LayerConfig("eqrot3", "eqrot2", eviction=EvictionConfig("streaming")), tokens=902, heads=1, growth=6.0
    )
    for block in layer.storage.pages.blocks:  # the last tile is half behind the end of the tensors
        block.trim(layer.storage.pages.codecs, 32)
    layer.storage.pages.blocks[-1].counts[0] -= 9
    query = torch.randn(1, 3, 1, 64)
    reference = attend(layer, query)
    torch.testing.assert_close(attend(layer, query, emulator=emulate()), reference, **CLOSE)
    for schedule in build.SCHEDULES:
        wrong = emulate(schedule, attention_mma=text)
        try:
            torch.testing.assert_close(attend(layer, query, emulator=wrong), reference, **CLOSE)
        except (AssertionError, build.EmulationError):
            return
    pytest.fail("not caught")


def test_torch_path_where_kernels_do_not_serve(emulator, monkeypatch):
    layer = filled(SMALL, tokens=100)
    query = torch.randn(1, 4, 1, 64)
    attend(layer, query, DenseMask(torch.zeros(1, 1, 1, 101), 0), emulator)  # an additive mask
    attend(layer, query, None, emulator, Extras(bias=torch.zeros(1, 4, 1, 101)))
    attend(layer, torch.randn(1, 256, 1, 64), None, emulator)  # too many rows
    monkeypatch.setenv("HF_KVCOMPRESS_BACKEND", "torch")
    attend(layer, query, emulator=emulator)
    assert not emulator.launches


def test_compile_traces_through_the_op(emulator):
    layer = filled(SMALL, tokens=100)
    query = torch.randn(1, 4, 1, 64)
    reference = attend(layer, query, emulator=emulator)
    assert causal(layer, 1).causal

    def decode(own):
        return attend_compiled(own * 1.0)

    def attend_compiled(own):
        from hf_kvcompress.fused_decode import fused_decode

        return fused_decode(layer, own, causal(layer, 1), 64**-0.5, Extras())[0] + 0.0

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with kernels.emulate(emulator):
        out = torch.compile(decode, backend=backend)(query)
    torch.testing.assert_close(out, reference)
    assert any("fused_attention" in str(node.target) for graph in graphs for node in graph.graph.nodes)
