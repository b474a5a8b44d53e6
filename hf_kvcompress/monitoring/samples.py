"""What is copied out of a cache on the generating thread, and what becomes of it on the monitor's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

SKETCH = 128  # random projections of a page


@dataclass
class Logits:
    """Attention logits of one query over a run of tokens, of some heads: positions `[n]` or `[l, n]`, -1 where none.

    logits: `[h, G, n]` (or `[l, G, n]` of one head), -inf where the query may not look.
    """

    heads: list[int]
    positions: torch.Tensor
    logits: torch.Tensor


@dataclass
class MassSample:
    """What the newest query of a pass said about a layer; `sinks` are logits `[H, G]` of no token."""

    layer: int
    step: int
    seen: int
    time: float
    page_size: int
    parts: list[Logits]
    sinks: torch.Tensor | None = None
    unread: bool = False  # some tokens were in host memory and not read
    copied: Any = None  # event on the device after which the tensors are here


@dataclass
class Tokens:
    """Keys and values `[h, n, D]` of some heads at positions `[n]` (`[l, n]` and `[l, n, D]` of one head's lines)."""

    heads: list[int]
    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@dataclass
class PageSample:
    """What a layer holds, or the part of it that was not looked at before."""

    layer: int
    step: int
    page_size: int
    parts: list[Tokens]
    copied: Any = None


@dataclass
class Mass:
    """Attention of one query by page: parts of 1 that each page got and tokens that it still holds, `[P]` each.

    What is missing to 1 went to sink logits. Page p stands for the positions `p * page_size` to `(p + 1) * page_size`,
    whatever the cache made of them.
    """

    layer: int
    head: int
    step: int
    seen: int
    time: float
    mass: torch.Tensor
    held: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.mass.nbytes + self.held.nbytes


@dataclass
class Pages:
    """Whole pages of one head: numbers `[P]`, sketches `[P, S]` and norms `[P]` of keys and values, and themselves."""

    layer: int
    head: int
    step: int
    numbers: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


def to_host(sample: MassSample | PageSample) -> None:
    """Start copying a sample's tensors to the host; nobody waits for it here."""
    tensors = [(part, name) for part in sample.parts for name in vars(part) if name != "heads"]
    event = None
    for part, name in tensors:
        tensor = getattr(part, name)
        if tensor.device.type == "cuda":
            here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            setattr(part, name, here.copy_(tensor, non_blocking=True))
            event = event or torch.cuda.Event()
    if isinstance(sample, MassSample) and sample.sinks is not None:
        sample.sinks = sample.sinks.cpu()
    if event is not None:
        event.record()
        sample.copied = event


def nbytes_of(sample: MassSample | PageSample) -> int:
    """Bytes of a sample's tensors."""
    return sum(t.nbytes for part in sample.parts for t in vars(part).values() if isinstance(t, torch.Tensor))


def masses_of(sample: MassSample) -> list[Mass]:
    """The attention of each head by page; heads without a token are left out."""
    if sample.copied is not None:
        sample.copied.synchronize()
    found = []
    for head in sorted({head for part in sample.parts for head in part.heads}):
        positions, logits = [], []
        for part in sample.parts:
            if head not in part.heads:
                continue
            own = slice(None) if part.positions.dim() == 2 else slice(i := part.heads.index(head), i + 1)
            logits.append(part.logits[own].float().transpose(0, 1).flatten(1))  # [G, n]
            positions.append(part.positions.flatten())
        at, scores = torch.cat(positions).long(), torch.cat(logits, dim=1)
        scores, at = scores[:, at >= 0], at[at >= 0]
        if not len(at):
            continue
        weights = _softmax(scores, None if sample.sinks is None else sample.sinks[head])
        pages = int(at.max()) // sample.page_size + 1
        mass = torch.zeros(pages).index_add_(0, at // sample.page_size, weights.mean(0))
        held = torch.bincount(at // sample.page_size, minlength=pages).to(torch.int32)
        found.append(Mass(sample.layer, head, sample.step, sample.seen, sample.time, mass, held))
    return found


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the last axis of `[G, n]`, with a logit `[G]` more of no token, if given."""
    if sinks is None:
        return torch.nan_to_num(scores.softmax(-1))
    return torch.cat([scores, sinks.float()[:, None]], dim=1).softmax(-1)[:, :-1]
