"""What `kvcompress doctor` says of GPUs, with a stand-in for cupy and two of them."""

import sys

import torch

from hf_kvcompress.ops import diagnosis, kernels, nvrtc, probes, sources


def test_everything_is_there(cupy, monkeypatch):
    monkeypatch.setattr(probes, "run", lambda device: {"lop3": "", "mma_f16": "" if device == "cuda:0" else "error 3"})
    report = diagnosis.diagnose()
    assert (report["cupy"], report["driver's CUDA"], report["NVRTC"]) == ("14.0", "13.1", "13.0")
    assert report["cuda:0"].startswith(f"kernels, {len(sources.names())} sources compiled in ")
    assert report["cuda:0"].endswith(" s for sm_90; every instruction gives the known answer")
    assert report["cuda:1"].endswith("; mma_f16: error 3")
    assert len(cupy.compiled) == 2 * len(sources.names()) and not cupy.launched
    assert [options for _, options in cupy.compiled][0][0] == "-std=c++17"


def test_older_gpus_compile_what_they_can(cupy, monkeypatch):

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(probes, "run", lambda device: {})
    able = [name for name in sources.names() if sources.needs(sources.expand(name)) <= (7, 5)]
    assert 0 < len(able) < len(sources.names())
    assert diagnosis.diagnose()["cuda:0"].startswith(f"kernels, {len(able)} sources")


def test_why_torch_is_used(cupy, monkeypatch):
    monkeypatch.setenv("HF_KVCOMPRESS_BACKEND", "torch")
    report = diagnosis.diagnose()
    assert report["cuda:0"] == report["cpu"] == "torch (HF_KVCOMPRESS_BACKEND=torch)"
    monkeypatch.delenv("HF_KVCOMPRESS_BACKEND")
    cupy.error = RuntimeError("quantize.cu(3): error")
    assert "kernels fail after 0 sources: " in diagnosis.diagnose()["cuda:1"]
    assert "quantize.cu(3): error" in diagnosis.diagnose()["cuda:1"]

    def broken():
        raise OSError("libcuda.so.1 is not there")

    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", broken)
    assert diagnosis.diagnose()["driver's CUDA"] == "none (libcuda.so.1 is not there)"
    monkeypatch.setattr(nvrtc, "version", lambda: None)
    kernels._unready.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    report = diagnosis.diagnose()
    assert report["cupy"].startswith("none (") and report["NVRTC for checks"] == "none"
