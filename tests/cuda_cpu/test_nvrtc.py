"""Finding NVRTC and CUDA's headers, and reading ptxas's report."""

import pytest

from hf_kvcompress.ops import nvrtc

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compile time = 156.662 ms
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 16528 bytes smem, 412 bytes cmem[0]
"""


def test_report():
    assert nvrtc.resources(REPORT) == {
        "first": nvrtc.Resources(registers=40, stack=8, spills=16, shared=0),
        "second": nvrtc.Resources(registers=72, stack=0, spills=0, shared=16528),
    }


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Folders like those of NVIDIA's wheels for CUDA 12 and 13, and a toolkit."""
    for place in ("nvidia/cuda_runtime/include", "nvidia/cu13/include", "toolkit/include", "half/include"):
        (tmp_path / place).mkdir(parents=True)
        for name in nvrtc.HEADERS[: 1 if place.startswith("half") else None]:
            (tmp_path / place / name).touch()
    monkeypatch.setattr(nvrtc, "_wheels", lambda: [tmp_path / "nvidia"])
    nvrtc.include_flags.cache_clear()
    yield tmp_path
    nvrtc.include_flags.cache_clear()


def test_headers_of_the_compilers_own_version(wheels, monkeypatch):
    monkeypatch.setenv("CUDA_PATH", str(wheels / "half"))
    monkeypatch.setenv("CUDA_HOME", str(wheels / "toolkit"))
    assert nvrtc.include_flags(13) == (f"-I{wheels}/nvidia/cu13/include",)
    assert nvrtc.include_flags(12) == (f"-I{wheels}/nvidia/cuda_runtime/include",)
    assert nvrtc.include_flags(14) == (f"-I{wheels}/toolkit/include",), "a folder without bfloat16 is passed over"


def test_errors_of_the_compiler():
    assert nvrtc.architecture((10, 0)) == "sm_100"
    with pytest.raises(RuntimeError, match=r"(?s)does not compile for sm_80 with \{'A': 3\}:.*kernels.cu\(1\): error"):
        nvrtc.compile_log('extern "C" __global__ void f() { missing(A); }', (8, 0), {"A": 3})


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    assert nvrtc.version() is None
    with pytest.raises(ValueError, match="library: expected NVRTC .pip install nvidia-cuda-nvrtc"):
        nvrtc.compile_log("", (9, 0), {})
