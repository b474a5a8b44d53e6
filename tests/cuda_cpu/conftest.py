"""Fixtures that run the kernels of `cuda/` on the CPU."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from hf_kvcompress.ops import kernels

from . import build, compiling
from .stand_ins import Cupy


@pytest.fixture(scope="session", autouse=True)
def a_compiler():
    """These tests need g++."""
    if not compiling.compiler():
        pytest.skip("g++ is not installed")
    compiling.forget_old()


@pytest.fixture
def poisoned():
    """torch.empty gives NaN or the largest integer, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulated(poisoned, monkeypatch):
    """Operations on CPU tensors run as emulated kernels: forward schedule, guard page at the end of every tensor."""
    monkeypatch.delenv("HF_KVCOMPRESS_BACKEND", raising=False)
    emulator = build.Emulator()
    with kernels.emulate(emulator):
        yield emulator


@pytest.fixture(params=build.SCHEDULES)
def scheduled(request, poisoned, monkeypatch):
    """As `emulated`, once for every thread schedule; the odd ones have the guard page at the beginning."""
    monkeypatch.delenv("HF_KVCOMPRESS_BACKEND", raising=False)
    emulator = build.Emulator(request.param, build.GUARDS[build.SCHEDULES.index(request.param) % 2])
    with kernels.emulate(emulator):
        yield emulator


@pytest.fixture
def cupy(monkeypatch):
    """A machine with two H200 of which torch's current one is number 0."""
    found = Cupy()
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=1000 + index))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.delenv("HF_KVCOMPRESS_BACKEND", raising=False)
    for cached in (kernels._capability, kernels._unready, kernels.load):
        cached.cache_clear()
    yield found
    for cached in (kernels._capability, kernels._unready, kernels.load):
        cached.cache_clear()
