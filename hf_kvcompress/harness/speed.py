"""Seconds and peak bytes of a prompt and of the tokens decoded after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..scoring import Decoded, decode

WARM_UP = 192  # tokens: enough to seal pages, so that nothing is built while the clock runs


def percentile(numbers: Sequence[float], part: float) -> float:
    """The smallest number that `part` of all numbers do not exceed."""
    if not numbers or not 0 <= part <= 1:
        raise ValueError(f"numbers, part: expected some numbers and 0 to 1, got {len(numbers)} and {part}")
    return sorted(numbers)[max(0, -(-round(part * 1e6) * len(numbers) // 10**6) - 1)]


def timed(model: Any, ids: torch.Tensor, make_cache: Callable[[], Any], new_tokens: int) -> Decoded:
    """Prefill and decode, after a short run that warms up.

    Args:
        ids: `[1, T]`; the last token is fed after the prompt.
    """
    decode(model, ids[:, :-1][:, :WARM_UP], ids[:, -1:], make_cache, 3)
    return decode(model, ids[:, :-1], ids[:, -1:], make_cache, new_tokens)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that tensors took at once while `work` ran, over those that were there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    kineto = profile.profiler.kineto_results if profile.profiler is not None else None  # type: ignore[attr-defined]
    events = [event for event in kineto.events() if event.name() == "[memory]"] if kineto is not None else []
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
