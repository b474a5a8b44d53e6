"""`ops/kernels.py`: who is served, what is passed, and the path through cupy, with a stand-in for cupy and the GPU."""

import sys

import numpy as np
import pytest
import torch

from hf_kvcompress.ops import kernels, nvrtc, sources

from . import build, compiling
from .stand_ins import on_device

ROW_SUM = {"row_sum.cu": (compiling.SHIM.parent / "planted" / "row_sum.cu").read_text()}


def test_launch_through_cupy(cupy):
    x = on_device(torch.zeros(4))
    kernel = kernels.load("probes.cu", "probe_exp2", WIDTH=7)
    kernel((3, 2), 64, [x, x[1:], None, -5, 0.5, kernels.Long(1 << 40), True], shared=2048)
    (code, options) = cupy.compiled[0]
    assert code == sources.expand("probes.cu") and '#include "' not in code
    assert "-DWIDTH=7" in options and "-std=c++17" in options and "--fmad=false" not in options
    assert any(option.startswith("-I") for option in options)
    name, grid, block, args, shared, stream = cupy.launched[0]
    assert (name, grid, block, shared, stream) == ("probe_exp2", (3, 2, 1), (64, 1, 1), 2048, 1000)
    assert args == (x.data_ptr(), x.data_ptr() + 4, 0, -5, 0.5, 1 << 40, 1)
    kinds = [np.uint64, np.uint64, np.uint64, np.int32, np.float32, np.int64, np.int32]
    assert [type(value) for value in args] == kinds
    assert cupy.raw.max_dynamic_shared_size_bytes == 0 and not cupy.devices
    kernel(1, 32, [x], shared=47 * 1024 + 1)  # with the 1024 bytes of static memory more than a block gets unasked
    assert cupy.raw.max_dynamic_shared_size_bytes == 47 * 1024 + 1
    kernel(1, 32, [x], shared=100 * 1024)
    kernel(1, 32, [x], shared=60 * 1024)
    assert cupy.raw.max_dynamic_shared_size_bytes == 100 * 1024
    assert len(cupy.compiled) == 1 and len(cupy.launched) == 4


def test_numbers_are_told_apart_by_type(cupy):
    x = on_device(torch.zeros(1))
    for args in ([x, 1, 1.0, kernels.Long(1), True], [x, 0, -0.0, 0.0, kernels.Long(0), None, False]) * 2:
        kernels.load("probes.cu", "probe_exp2")(1, 32, args)
        kinds = {int: np.int32, float: np.float32, kernels.Long: np.int64, bool: np.int32, type(None): np.uint64}
        assert [type(value) for value in cupy.launched[-1][3][1:]] == [kinds[type(value)] for value in args[1:]]
    assert [str(value) for value in cupy.launched[-1][3][1:]] == ["0", "-0.0", "0.0", "0", "0", "0"]


def test_another_device_compiles_again_and_uses_its_stream(cupy):
    kernel = kernels.load("probes.cu", "probe_exp2")
    kernel(1, 32, [on_device(torch.zeros(4))])
    kernel(1, 32, [on_device(torch.zeros(4), 1)])
    assert len(cupy.compiled) == 2
    assert [launch[-1] for launch in cupy.launched] == [1000, 1001]
    assert cupy.devices == [1]
    with pytest.raises(ValueError, match="expected every tensor on one device, got one on cuda:1"):
        kernel(1, 32, [on_device(torch.zeros(4)), on_device(torch.zeros(4), 1)])


def test_same_macros_are_one_kernel():
    load = kernels.load
    assert load("probes.cu", "probe_exp2", A=1, B=2) is load("probes.cu", "probe_exp2", A=1, B=2)
    assert repr(load("probes.cu", "probe_exp2", A=1)) == "probe_exp2 (probes.cu A=1)"
    with pytest.raises(ValueError, match="A: expected an int, got 1.5"):
        load("probes.cu", "probe_exp2", A=1.5)


def test_error_of_the_compiler_names_kernel_and_architecture(cupy):
    cupy.error = RuntimeError("line 3: what?")
    with pytest.raises(RuntimeError, match=r"probe_exp2 \(probes.cu A=1\) does not compile for sm_90: line 3: what\?"):
        kernels.load("probes.cu", "probe_exp2", A=1)(1, 32, [on_device(torch.zeros(4))])


def test_who_is_served(cupy, monkeypatch):
    x, y = torch.zeros(1), on_device(torch.zeros(1))
    assert kernels.serves(y) and not kernels.serves(x)
    assert kernels.why_not("cuda") == kernels.why_not("cuda:1") == ""
    assert "not on cpu" in kernels.why_not("cpu")
    monkeypatch.setenv("HF_KVCOMPRESS_BACKEND", "torch")
    assert not kernels.serves(y) and kernels.why_not("cuda") == "HF_KVCOMPRESS_BACKEND=torch"
    monkeypatch.setenv("HF_KVCOMPRESS_BACKEND", "cuda")
    assert kernels.serves(y) and not kernels.serves(x)
    with kernels.emulate(build.Emulator()):
        assert kernels.serves(x) and kernels.why_not("cpu") == ""
        monkeypatch.setenv("HF_KVCOMPRESS_BACKEND", "torch")
        assert not kernels.serves(x)


def test_why_a_gpu_is_not_served(cupy, monkeypatch):
    def reason():
        kernels._capability.cache_clear()
        kernels._unready.cache_clear()
        return kernels.why_not("cuda:0")

    monkeypatch.setattr(nvrtc, "include_flags", lambda major: ())
    assert reason() == "NVRTC 13.0 is there, but not its headers (cuda_fp16.h, cuda_bf16.h); set CUDA_PATH"

    def missing():
        raise RuntimeError("no libnvrtc")

    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", missing)
    assert reason() == "cupy 14.0 finds no NVRTC (no libnvrtc)"
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "cupy cannot be imported" in reason() and "hf_kvcompress[cuda12]" in reason()
    assert not kernels.serves(on_device(torch.zeros(1)))
    monkeypatch.setenv("HF_KVCOMPRESS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="HF_KVCOMPRESS_BACKEND=cuda, but cupy cannot be imported"):
        kernels.serves(on_device(torch.zeros(1)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    assert reason() == "compute capability 7.5 or later is needed, got 7.0"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in reason()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "torch sees no CUDA device"


def test_capability():
    assert kernels.capability(torch.zeros(1)) == (9, 0)


BAD = {
    "integer of 32 bits": (1 << 31, r"integer of 32 bits \(Long for 64\), got 2147483648"),
    "integer of 64 bits": (kernels.Long(1 << 63), "integer of 64 bits"),
    "text": ("7", "expected tensors, ints, floats, Long or None, got str"),
    "numpy": (np.float64(0.5).astype(np.float16), "got float16"),
}


@pytest.mark.parametrize("bad", BAD)
def test_arguments_that_cannot_be_passed(bad, emulated, cupy):
    value, message = BAD[bad]
    for x in (torch.zeros(1), on_device(torch.zeros(1))):
        with pytest.raises(ValueError, match=message):
            kernels.load("probes.cu", "probe_exp2")(1, 32, [x, value])


def test_launches_that_make_no_sense(emulated):
    emulated.texts = ROW_SUM
    kernel, x = kernels.load("row_sum.cu", "row_sum"), torch.zeros(4, 4)
    right = [x, x[0].clone(), 4]
    kernel(4, 128, right)
    for call, message in [
        (lambda: kernel(1, 128, [1, 2]), "expected a tensor among the arguments"),
        (lambda: kernel(0, 128, right), "expected a grid and a block of at least 1"),
        (lambda: kernel(1, (32, 64), right), "at most 1024 threads"),
        (lambda: kernel((1, 70000), 128, right), "at most 65535"),
        (lambda: kernel(1, 128, right, shared=230 * 1024), "bytes of shared memory"),
        (lambda: kernel(1, 128, right[:2]), "expected 3 arguments, got 2"),
        (lambda: kernel(1, 128, [x, x, 1.0]), "argument 2: expected an int, got float"),
        (lambda: kernel(1, 128, [x, 7, 1]), "argument 1: expected a tensor, got int"),
        (lambda: kernel(1, 128, [x, x, kernels.Long(1)]), "argument 2: expected an int, got Long"),
        (lambda: kernels.load("row_sum.cu", "row_some")(1, 128, right), "expected a kernel of this source"),
        (lambda: kernels.load("probes.cu", "probe_lop3", A=1)(1, 32, right), "a line `// variants: ...` lists, got"),
        (lambda: kernels.load("nowhere.cu", "row_sum")(1, 32, right), "expected a file of .*, got 'nowhere.cu'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with kernels.emulate(None), pytest.raises(ValueError, match="expected a CUDA tensor, got one on cpu"):
        kernel(4, 128, right)


def test_tensors_reached_by_their_address(emulated):
    text = """
    extern "C" __global__ void total(const long long* addresses, int n, float* out) {
        float sum = 0;
        for (int i = 0; i < n; i++) sum += *(const float*)addresses[i];
        *out = sum;
    }
    """
    emulated.texts = {"total.cu": text}
    x, out = torch.randn(10), torch.zeros(1)
    table = torch.tensor([x[i:].data_ptr() for i in (1, 3, 4)])
    kernel = kernels.load("total.cu", "total")
    kernel(1, 1, [table, 3, out], reached=[x[1:5]])
    torch.testing.assert_close(out[0], x[[1, 3, 4]].sum())
    with pytest.raises(build.EmulationError, match="out of bounds: read of 4 bytes"):
        kernel(1, 1, [table, 3, out], reached=[x[1:4]])
    with pytest.raises(build.EmulationError, match="out of bounds: read of 4 bytes"):
        kernel(1, 1, [table, 3, out])


def test_views_share_what_they_share(emulated):
    """Two views of one storage stay so, and only what a view covers may be touched."""
    emulated.texts = {"copy.cu": 'extern "C" __global__ void copy(const float* x, float* y, int at) { y[0] = x[at]; }'}
    kernel = kernels.load("copy.cu", "copy")
    whole = torch.arange(8.0)
    kernel(1, 1, [whole[::3], whole[1:2], 6])
    assert whole.tolist() == [0, 6, 2, 3, 4, 5, 6, 7]
    with pytest.raises(build.EmulationError, match="out of bounds"):
        kernel(1, 1, [whole[::3], whole[1:2], 7])


def test_memory_that_torch_did_not_fill_is_poisoned(emulated):
    assert torch.empty(7).isnan().all()
    assert (torch.empty(7, dtype=torch.int16) == 32767).all()
