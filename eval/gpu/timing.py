"""Clocks: device time by events and graphs, wall time of whole steps, host time of launches."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass
class Bench:
    """Where and how long to measure. `dry` runs on the CPU, at tiny sizes and without meaning."""

    device: torch.device
    dry: bool
    deadline: float
    copy_gbs: float = 0.0  # measured bandwidth of a copy, bytes read plus bytes written

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.perf_counter()

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give cached memory back, between sizes."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def by_torch() -> Iterator[None]:
    """Inside, every operation is its torch reference."""
    before = os.environ.get("HF_KVCOMPRESS_BACKEND")
    os.environ["HF_KVCOMPRESS_BACKEND"] = "torch"
    try:
        yield
    finally:
        del os.environ["HF_KVCOMPRESS_BACKEND"]
        if before is not None:
            os.environ["HF_KVCOMPRESS_BACKEND"] = before


def device_ms(bench: Bench, runs: Sequence[Run], seconds: float = 0.3) -> tuple[float, str]:
    """Median milliseconds of one of `runs`, and how it was taken: "graph", "events" or "clock".

    The runs are done in turn, so that several sets of data larger than the cache are read. A graph leaves the host out;
    where the runs cannot be captured, events around eager launches are taken.
    """
    for run in runs:
        run()
    bench.wait()
    if bench.device.type != "cuda":
        return _clock(bench, runs, seconds) * 1e3, "clock"
    replay, how = _captured(runs)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    taken: list[float] = []
    stop = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < stop:
        begin.record()
        replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / len(runs))
    return statistics.median(taken), how


def _captured(runs: Sequence[Run]) -> tuple[Run, str]:
    def eager() -> None:
        for run in runs:
            run()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            eager()
    except RuntimeError:
        torch.cuda.synchronize()
        return eager, "events"
    return graph.replay, "graph"


def _clock(bench: Bench, runs: Sequence[Run], seconds: float) -> float:
    taken: list[float] = []
    stop = time.perf_counter() + seconds
    while len(taken) < 2 or time.perf_counter() < stop:
        begin = time.perf_counter()
        for run in runs:
            run()
        taken.append((time.perf_counter() - begin) / len(runs))
    return statistics.median(taken)


def step_ms(bench: Bench, step: Run, steps: int) -> tuple[float, float]:
    """Milliseconds a step on the wall and on the host alone, over `steps` of them without waiting in between."""
    for _ in range(3):
        step()
    bench.wait()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    host = time.perf_counter() - begin
    bench.wait()
    return (time.perf_counter() - begin) / steps * 1e3, host / steps * 1e3


@contextmanager
def no_waiting(bench: Bench) -> Iterator[None]:
    """RuntimeError where something inside waits for the device."""
    if bench.device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
