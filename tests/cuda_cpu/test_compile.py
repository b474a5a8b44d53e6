"""Every source compiles with NVRTC for every architecture and every set of macros that it is launched with."""

import hashlib

import pytest

from hf_kvcompress.ops import nvrtc, sources

from . import compiling

MAIN = (9, 0)  # all sets of macros are compiled for this one; the others take the first set


def jobs():
    """Source, architecture and number of the set of macros, with a name."""
    for name in sources.names():
        text = sources.expand(name)
        for capability in nvrtc.ARCHITECTURES:
            if capability >= sources.needs(text):
                for number in range(len(sources.variants(text)) if capability == MAIN else 1):
                    label = f"{name}-{nvrtc.architecture(capability)}-{number}"
                    yield pytest.param(name, capability, number, id=label)


def report(text, capability, defines):
    """NVRTC's report; kept beside the emulated kernels, since the tests run with two versions of transformers."""
    parts = [text, repr((capability, sorted(defines.items()), nvrtc.version(), sources.CUPY_OPTIONS))]
    path = compiling.BUILT / f"nvrtc-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.txt"
    with compiling.locked(path):
        if not path.exists():
            path.write_text(nvrtc.compile_log(text, capability, defines))
    return path.read_text()


def spills_allowed(text):
    """`// spills: 16` in a source: so many bytes a thread were looked at and are accepted."""
    return max([0, *(int(number) for number in sources.marks(text, "spills"))])


def test_the_compiler_is_there():
    assert nvrtc.version() >= (13, 0)


@pytest.mark.parametrize(("name", "capability", "number"), jobs())
def test_compiles_without_spills(name, capability, number):
    text = sources.expand(name)
    defines = sources.variants(text)[number]
    found = nvrtc.resources(report(text, capability, defines))
    assert set(found) <= set(sources.kernels(text)) and found
    for kernel, taken in found.items():
        assert taken.spills <= spills_allowed(text), f"{kernel} {defines}: {taken}"
        assert taken.shared <= 48 * 1024, f"{kernel} {defines}: {taken}"
