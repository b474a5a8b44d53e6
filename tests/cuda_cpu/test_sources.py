"""Texts of kernels: headers put in, what the comments say, and that an installed wheel has them."""

from pathlib import Path

import pytest
from setuptools.dist import Distribution

from hf_kvcompress.ops import sources

ROOT = Path(__file__).parents[2]


def test_headers_are_put_in_once(tmp_path, monkeypatch):
    (tmp_path / "a.cuh").write_text("#pragma once\nint a;\n")
    (tmp_path / "b.cuh").write_text('#pragma once\n#include "a.cuh"\nint b;\n')
    (tmp_path / "k.cu").write_text('#include <cuda_fp16.h>\n#include "a.cuh"\n#include "b.cuh"\nint k;\n')
    monkeypatch.setattr(sources, "folder", lambda: tmp_path)
    lines = sources.inlined((tmp_path / "k.cu").read_text(), "k.cu").splitlines()
    assert [line for line in lines if line.startswith("int")] == ["int a;", "int b;", "int k;"]
    assert lines[1] == "#include <cuda_fp16.h>" and "#pragma once" not in lines
    at = lines.index("int k;")
    assert lines[at - 1] == '#line 4 "k.cu"', "compilers name the line of the file"
    with pytest.raises(ValueError, match="k.cu:1: expected a file of .*, got 'c.cuh'"):
        sources.inlined('#include "c.cuh"', "k.cu")
    with pytest.raises(ValueError, match="source: expected a file of .*, got 'c.cu'"):
        sources.expand("c.cu")


def test_marks():
    text = "// A kernel.\n// needs: sm_80\n// variants: A=1,2 B=-3\n// variants: A=7\n// spills: 8\n// fmad: off\n"
    assert sources.needs(text) == (8, 0) and sources.needs("// needs: sm_100") == (10, 0)
    assert sources.variants(text) == [{"A": 1, "B": -3}, {"A": 2, "B": -3}, {"A": 7}]
    assert sources.marks(text, "spills") == ["8"]
    assert sources.options(text, {"B": -3, "A": 1}) == ("-std=c++17", "--fmad=false", "-DA=1", "-DB=-3")
    assert sources.needs("") == (7, 5) and sources.variants("") == [{}]
    assert sources.options("", {}) == ("-std=c++17",)
    with pytest.raises(ValueError, match="needs: expected sm_ and a number, got 'Ada'"):
        sources.needs("// needs: Ada\n")
    with pytest.raises(ValueError, match="variants: expected NAME=1,2 separated by spaces, got 'A=x'"):
        sources.variants("// variants: A=x\n")


def test_every_source_says_what_it_is():
    assert sources.names()
    for name in sources.names():
        text = (sources.folder() / name).read_text()
        assert text.startswith("// "), f"{name} begins with a comment on layout, grid and block"
        assert sources.variants(text) and sources.needs(text)
        assert not any(word in text for word in ("asm", "<cstdint>", "std::")), f"{name}: PTX belongs in ptx.cuh"


def test_a_wheel_holds_the_sources(monkeypatch):
    monkeypatch.chdir(ROOT)
    wheel = Distribution()
    wheel.parse_config_files(["setup.cfg"])
    build = wheel.get_command_obj("build_py")
    build.finalize_options()
    held = {name for package, _, _, names in build.data_files if package == "hf_kvcompress.cuda" for name in names}
    files = {path.name for path in (ROOT / "cuda").iterdir() if path.suffix in (".cu", ".cuh")}
    assert files and files <= held
    assert not (ROOT / "cuda" / "__init__.py").exists()


def test_installed_sources_are_found(tmp_path, monkeypatch):
    package = tmp_path / "hf_kvcompress"
    (package / "cuda").mkdir(parents=True)
    (package / "ops").mkdir()
    monkeypatch.setattr(sources, "__file__", str(package / "ops" / "sources.py"))
    assert sources.folder() == package / "cuda"
    (package / "cuda").rmdir()
    assert sources.folder() == tmp_path / "cuda"
