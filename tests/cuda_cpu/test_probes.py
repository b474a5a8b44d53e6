"""The twins of the PTX wrappers give the known answers that a GPU is asked for."""

import pytest
import torch

from hf_kvcompress.ops import kernels, probes, sources

from . import build


def test_every_wrapper(scheduled):
    found = probes.run("cpu")
    assert set(found) == {"load_once", "lop3", "exp2", "e4m3", "dp4a", "mma_f16", "mma_bf16", "copies"}
    assert found == dict.fromkeys(found, "")
    assert len(scheduled.launches) == len(found)


def test_every_wrapper_has_a_probe():
    text = (sources.folder() / "ptx.cuh").read_text()
    probed = "".join((sources.folder() / name).read_text() for name in ("probes.cu", "probes_mma.cu"))
    for line in text.splitlines():
        if line.startswith("__device__ __forceinline__") and "_of(" not in line:
            name = line.split("(")[0].split()[-1]
            assert f"{name}(" in probed or f"{name}<" in probed or name == "e4m3_byte", name


def test_8_bit_floats_without_the_instructions():
    """Processors before sm_89 convert by hand."""
    source = "#define __CUDA_ARCH__ 800\n" + sources.expand("probes.cu")
    with kernels.emulate(build.Emulator(texts={"probes.cu": source})):
        assert probes.e4m3(torch.device("cpu")) == ""


@pytest.mark.parametrize(
    ("source", "right", "wrong", "probe"),
    [
        (
            "probes_mma.cu",
            "i % 2 * 8) * 16 + pair * 2 + i / 2 * 8",
            "i / 2 * 8) * 16 + pair * 2 + i % 2 * 8",
            "mma_f16",
        ),
        ("probes_mma.cu", "+ group, 8)", "+ group / 2, 8)", "mma_bf16"),
        ("probes.cu", "lop3<0xca>", "lop3<0xac>", "lop3"),
        ("probes.cu", "2 * i | (2 * i + 1) << 8", "2 * i << 8 | (2 * i + 1)", "e4m3"),
        ("probes.cu", "fast_exp2(x[i])", "fast_exp2(x[i] + 1e-5f)", "exp2"),
    ],
)
def test_a_wrong_answer_shows(source, right, wrong, probe):
    text = sources.expand(source)
    assert right in text
    with kernels.emulate(build.Emulator(texts={source: text.replace(right, wrong)})):
        assert getattr(probes, probe)(torch.device("cpu"))
