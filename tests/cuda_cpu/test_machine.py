"""The emulated machine: right kernels pass under every schedule, and each kind of bug ends the launch with its line."""

import pytest
import torch

from hf_kvcompress.ops import kernels

from . import build, compiling

PLANTED = compiling.SHIM.parent / "planted"


def text(name):
    return (PLANTED / f"{name}.cu").read_text()


def run(name, kernel, grid, block, args, schedule="forward", guard="end", shared=0, source=None):
    emulator = build.Emulator(schedule, guard, {f"{name}.cu": text(name) if source is None else source})
    with kernels.emulate(emulator):
        kernels.load(f"{name}.cu", kernel)(grid, block, args, shared)


def row_sum(schedule="forward", guard="end", source=None):
    x, out = torch.randn(5, 300), torch.full((5,), torch.nan)
    run("row_sum", "row_sum", 5, 128, [x, out, 300], schedule, guard, 0, source)
    torch.testing.assert_close(out, x.sum(1), rtol=1e-5, atol=1e-5)


def staged(schedule="forward", source=None):
    x, out = torch.randn(3, 128), torch.full((3, 128), torch.nan)
    run("staged", "staged", 3, 32, [x, out], schedule, "end", 512, source)
    assert torch.equal(out, x.flip(1))


@pytest.mark.parametrize("guard", build.GUARDS)
@pytest.mark.parametrize("schedule", build.SCHEDULES)
def test_right_kernels_pass(schedule, guard):
    row_sum(schedule, guard)
    staged(schedule)


#: what is wrong -> what stands in row_sum.cu, what stands there instead, what the message must say
BUGS = {
    "barrier missing": ("= sum;\n    __syncthreads();", "= sum;\n", "shared memory.* at row_sum.cu:"),
    "barrier missing at the end": (
        "parts[3];\n    __syncthreads();\n    if (threadIdx.x == 0)",
        "parts[3];\n    if (threadIdx.x == 127)",
        "shared memory.*row_sum.cu:15",
    ),
    "barrier in a branch": (
        "if (lane == 0) parts[warp] = sum;",
        "if (lane == 0) { parts[warp] = sum; __syncthreads(); }",
        "divergent barrier.*row_sum.cu:12",
    ),
    "thread leaves before a barrier": (
        "    sum = warp_sum",
        "    if (threadIdx.x == 127) return;\n    sum = warp_sum",
        "deadlock.*1 of 128.*common.cuh",
    ),
    "lanes leave before a shuffle": (
        "sum = warp_sum(sum)",
        "if (lane < 16) sum = warp_sum(sum)",
        "deadlock.*__shfl_xor_sync.*__syncthreads",
    ),
    "lane outside of its mask": (
        "sum = warp_sum(sum)",
        "sum += __shfl_xor_sync(0xffu, sum, 1)",
        "not in its own mask 0xff .*row_sum.cu:11",
    ),
    "lane read that is not in the mask": (
        "sum = warp_sum(sum)",
        "sum += __shfl_xor_sync(lane < 16 ? 0xffffu : 0xffff0000u, sum, 16)",
        r"lane \d+ reads lane \d+, which is not.*row_sum.cu:11",
    ),
    "different collectives": (
        "sum = warp_sum(sum)",
        "sum += lane < 16 ? __shfl_xor_sync(FULL_WARP, sum, 1) : __shfl_up_sync(FULL_WARP, sum, 1)",
        "at different collectives.*row_sum.cu:11",
    ),
    "read past the end": (
        "i < n;",
        "i < n + 1;",
        r"out of bounds: read of 4 bytes.*block [04],0,0\), at row_sum.cu:10",
    ),
    "read before the beginning": ("x[(size_t)", "x[-1 + (size_t)", "out of bounds: read of 4 bytes.*row_sum.cu:10"),
    "write past the end": ("out[blockIdx.x]", "out[blockIdx.x + 1]", "out of bounds: write of 4 bytes.*row_sum.cu:16"),
    "write to an input": (
        "out[blockIdx.x] = total",
        "const_cast<float*>(x)[blockIdx.x] = total",
        "pointer to const.*row_sum.cu:16",
    ),
    "index of an array": (
        "parts[warp] = sum",
        "parts[warp + 1] = sum",
        "index 4 of an array.*thread 96.*row_sum.cu:12",
    ),
    "shared memory nobody wrote": (
        "if (lane == 0) parts",
        "if (lane == 0 && warp) parts",
        "has not written .byte.*row_sum.cu:14",
    ),
    "shared memory of the block before": (
        "if (lane == 0) parts",
        "if (lane == 0 && !(warp == 2 && blockIdx.x == 2)) parts",
        "has not written.*block 2,0,0.*row_sum.cu:14",
    ),
    "two blocks write one place": ("out[blockIdx.x]", "out[0]", "race in global memory.*another block.*row_sum.cu:16"),
    "every thread writes": ("    if (threadIdx.x == 0) out", "    out", "race in global memory.*row_sum.cu:16"),
    "misaligned vector": (
        "sum += x[(size_t)blockIdx.x * n + i]",
        "sum += reinterpret_cast<const float2*>(x + 1)[i % 8].x",
        "misaligned access.*row_sum.cu:10",
    ),
    "null pointer": (
        "sum += x[(size_t)blockIdx.x * n + i]",
        "sum += *(const float*)(size_t)(n - 300)",
        "read of 4 bytes at.*row_sum.cu:10",
    ),
    "shift by too much": ("float sum = 0;", "float sum = 0 * (1 << (n - 260));", "shift by 40.*row_sum.cu:9"),
    "overflow": ("float sum = 0;", "float sum = n * 100000000;", "signed integer overflow.*row_sum.cu:9"),
    "division by zero": ("float sum = 0;", "float sum = 0 * (7 / (n - 300));", "division by zero.*row_sum.cu:9"),
}


@pytest.mark.parametrize("schedule", build.SCHEDULES)
@pytest.mark.parametrize("bug", BUGS)
def test_bug_ends_the_launch(bug, schedule):
    right, wrong, message = BUGS[bug]
    assert text("row_sum").count(right) == 1
    with pytest.raises(build.EmulationError, match=f"(?s)^row_sum: .*({message})"):
        row_sum(schedule, source=text("row_sum").replace(right, wrong))


def test_loop_without_end():
    spin = "while (reinterpret_cast<const volatile float*>(x)[0] < 1e30f) {}\n    sum = warp_sum"
    with pytest.raises(build.EmulationError, match="no end: .*thread 0.*row_sum.cu:11"):
        row_sum(source=text("row_sum").replace("sum = warp_sum", spin))


STAGED_BUGS = {
    "copy not waited for": ("    copies_wait<0>();\n", "", AssertionError),  # the old bytes are read: here, poison
    "copies of other lanes not waited for": ("    __syncwarp();\n", "", build.EmulationError),
    "shared memory too small": ("tile[31 - lane]", "tile[32 - lane]", build.EmulationError),
    "copy of a part of 16 bytes": ("lane * 4)", "lane * 4 + 1)", build.EmulationError),
}


@pytest.mark.parametrize("bug", STAGED_BUGS)
def test_bug_in_an_asynchronous_copy(bug):
    right, wrong, error = STAGED_BUGS[bug]
    source = text("staged").replace(right, wrong)
    assert source != text("staged")
    with pytest.raises(error):
        staged(source=source)


def tickets(schedule):
    """Order in which 64 threads of each of two blocks pass two points: `[block, point, thread]`."""
    found = torch.full((2, 2, 64), -1, dtype=torch.int32)
    run("order", "order", 2, 64, [torch.zeros(1, dtype=torch.int32), found], schedule)
    assert sorted(found.flatten().tolist()) == list(range(256))
    return found


def test_schedules_differ():
    forward, reverse = tickets("forward"), tickets("reverse")
    assert forward[0, 0].diff().min() > 0
    assert reverse[1, 0].diff().max() < 0
    shuffled = tickets("random threads")[0, 0].argsort().tolist()
    assert shuffled not in (list(range(64)), list(range(63, -1, -1)))
    for schedule, first in (("low warps first", 0), ("high warps first", 32)):
        passed = tickets(schedule)[0 if first == 0 else 1]
        ahead, behind = passed[:, first : first + 32], passed[:, 32 - first : 64 - first]
        assert ahead.max() < behind.min(), "one warp is through before the other begins"
    ahead = tickets("one warp ahead")
    assert all(x[:, :32].max() < x[:, 32:].min() or x[:, 32:].max() < x[:, :32].min() for x in ahead)


@pytest.mark.parametrize("schedule", build.SCHEDULES)
def test_collectives_and_atomics(schedule):
    x = torch.randint(-50, 50, (32,), dtype=torch.int32)
    x[3] = 7
    lane, out = torch.arange(32), torch.full((14, 32), -1, dtype=torch.int32)
    run("exchange", "collectives", 1, 32, [x, out], schedule)
    bits = (1 << lane[x > 0]).sum()
    same = torch.stack([(1 << lane[(x & 1) == (value & 1)]).sum() for value in x])
    to_int32 = torch.stack([bits, *same]).to(torch.int32)
    expected = [
        x[5].expand(32),
        x[lane // 8 * 8 + (lane + 1) % 8],
        x[lane ^ 3],
        torch.cat([x[:2], x[:-2]]),
        torch.where(lane % 16 < 14, x[(lane + 2) % 32], x),
        to_int32[0].expand(32),
        torch.ones(32),
        torch.ones(32),
        x.sum().expand(32),
        x.max().expand(32),
        to_int32[1:],
        torch.stack([x[:16].min(), x[16:].min()]).repeat_interleave(16),
        (x > 0).sum().expand(32),
        torch.full((32,), 3),
    ]
    assert torch.equal(out, torch.stack([row.to(torch.int32) for row in expected]))
    parts = [torch.full((9,), -1, dtype=torch.int32), *(torch.zeros(1, dtype=torch.int32) for _ in range(2))]
    run("exchange", "share", 9, 64, [x, *parts], schedule)
    assert parts[2] == x[:9].sum()


def test_what_another_block_wrote_needs_a_fence():
    x, counter, total = torch.arange(9, dtype=torch.int32), *(torch.zeros(1, dtype=torch.int32) for _ in range(2))
    source = text("exchange").replace("        __threadfence();\n", "")
    with pytest.raises(build.EmulationError, match="race in global memory: reads .* in another block"):
        run("exchange", "share", 9, 64, [x, torch.zeros_like(x), counter, total], source=source)


def test_blocks_whose_last_warp_is_not_full():
    x, out = torch.randn(2, 10), torch.full((2,), torch.nan)
    source = text("row_sum").replace("parts[0] + parts[1] + parts[2] + parts[3]", "parts[0] + parts[1]")
    source = source.replace("warp_sum(sum)", "__shfl_sync(FULL_WARP, sum, 0)").replace("i += 128", "i += 33")
    run("row_sum", "row_sum", 2, 33, [x, out, 10], source=source)
    assert torch.equal(out, x[:, 0])  # lane 0 of the second warp has nothing to add


@pytest.mark.skipif("-mfma" not in compiling.processor_flags(), reason="this processor has no fused operations")
def test_products_and_sums_are_fused_only_where_they_may_be():
    source = 'extern "C" __global__ void f(const float* x, float* out) { out[0] = x[0] * x[1] + x[2]; }'
    x = torch.tensor([1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11])
    for text, contract, expected in (
        (source, False, 0.0),
        (source, True, 2.0**-24),
        ("// fmad: off\n" + source, True, 0.0),
    ):
        out = torch.ones(1)
        with kernels.emulate(build.Emulator(texts={"f.cu": text}, contract=contract)):
            kernels.load("f.cu", "f")(1, 1, [x, out])
        assert out == expected


def test_without_hand_written_switching(monkeypatch):
    """The same machine on processors other than x86-64."""
    monkeypatch.setattr(compiling, "RUNTIME_FLAGS", [*compiling.RUNTIME_FLAGS, "-DKVC_UCONTEXT"])
    caches = [compiling.runtime, compiling.compile_source]
    for cached in caches:
        cached.cache_clear()
    row_sum("one warp ahead")
    with pytest.raises(build.EmulationError, match="out of bounds"):
        row_sum(source=text("row_sum").replace("i < n;", "i < n + 1;"))
    for cached in caches:
        cached.cache_clear()
