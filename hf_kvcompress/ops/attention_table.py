"""What the attention kernels are told of a layer: runs of tokens, and ranges of them to work on.

`cuda/attention_tiles.cuh` describes the table's layout.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from . import kernels
from .attention_formats import Variant

HEADER, RUN_FIELDS = 18, 18
STEP = 128  # a range of packed tokens begins at a multiple of it
BLOCKS_PER_PROCESSOR = 3
LEAST_TOKENS, MOST_TOKENS = 256, 8192  # of a range of packed tokens
EXACT_TOKENS = 64  # of a range of exact ones


@dataclass
class Lines:
    """Whose the lines of a block are.

    Args:
        lanes: the lane of each line.
        on_device: the same where the tokens are, int64.
        positions: `[lines, capacity]` int32, below 0 where there is no token, or None if the counts tell.
    """

    lanes: Sequence[int]
    on_device: torch.Tensor
    positions: torch.Tensor | None


@dataclass
class Run:
    """Packed tokens of one slab or block: fields `[lines, ...]` as codecs store them, contiguous.

    Args:
        keys, values: packed fields by name, statistics `[lines, D]` included.
        capacity: tokens that a line has room for.
        counts: tokens of each row of the batch, or of each line if there are `lines`.
        lines: whose the lines are; None if line i is of lane i.
        variant: number of the pair of codecs.
        own: tensors that nothing else holds.
    """

    keys: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]
    capacity: int
    counts: list[int]
    lines: Lines | None = None
    variant: int = 0
    own: list[torch.Tensor] = field(default_factory=list)

    @property
    def most(self) -> int:
        """Tokens of the fullest line."""
        return max(self.counts)


_KEY_FIELDS = ("codes", "codes_low", "scale", "centre", "mean", "spread")
_VALUE_FIELDS = ("codes", "codes_low", "scale", "centre")


@dataclass(frozen=True)
class Pass:
    """What passes have in common that may use the same table.

    Args:
        heads: key-value heads.
        groups: query heads of each.
        queries, new: queries and new exact tokens.
        strides: of the queries, new keys and new values, but for the last axes: nine numbers.
        logits: whether logits are wanted.
    """

    heads: int
    groups: int
    queries: int
    new: int
    strides: tuple[int, ...]
    logits: bool = False


@dataclass
class Table:
    """What a layer's kernels read besides the tokens in flight, as long as the tensors that it was made of are there.

    Args:
        data: int64, where the tokens are.
        variants: texts for the op.
        sizes: slots of work in all, then where its work begins and the number of its slots for each variant.
        logits: numbers that the logits of packed runs take.
        logits_at: run -> where its logits begin, and how long a line is.
        held: tensors that only this table keeps alive.
    """

    data: torch.Tensor
    variants: list[str]
    sizes: list[int]
    logits: int
    logits_at: list[tuple[int, int]]
    held: list[torch.Tensor] = field(default_factory=list, repr=False)


@cache
def _blocks_at_once(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count * BLOCKS_PER_PROCESSOR


def _range_length(tokens: int, device: torch.device) -> int:
    """Tokens of one block when all lines together have `tokens`."""
    each = -(-tokens // _blocks_at_once(device))
    return min(max(-(-each // STEP) * STEP, LEAST_TOKENS), MOST_TOKENS)


def make_table(
    runs: list[Run], variants: Sequence[Variant], window: tuple[torch.Tensor, torch.Tensor], own: Pass
) -> Table:
    """The table of these runs and of the exact tokens: keys and values `[B, H, slots, D]` in `window` and new ones."""
    device = window[0].device
    lanes, rows = window[0].shape[0] * own.heads, own.groups * own.queries if own.logits else 0
    base = HEADER + RUN_FIELDS * (len(runs) + 1)
    numbers = [0] * base
    extra: list[int] = []
    held, logits, logits_at = [*window], 0, []
    for index, run in enumerate(runs):
        tensors = [run.keys.get(name) for name in _KEY_FIELDS] + [run.values.get(name) for name in _VALUE_FIELDS]
        tensors += [None, None] if run.lines is None else [run.lines.on_device, run.lines.positions]
        held += [x for x in tensors if x is not None]
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        counts_at = -1
        if min(run.counts) < run.most:
            counts_at = base + len(extra)
            extra += run.counts
        line = run.most if run.lines is None else run.capacity
        place = (run.capacity, run.most, counts_at, int(run.lines is not None), *pointers[10:], logits, line)
        at = HEADER + index * RUN_FIELDS
        numbers[at : at + RUN_FIELDS] = [*pointers[:10], *place]
        logits_at.append((logits, line))
        logits += _lines(run, lanes) * rows * line
    exact = base - RUN_FIELDS
    numbers[exact : exact + 8] = [number for x in window for number in (x.data_ptr(), *x.stride()[:3])]
    numbers[base - 2] = logits
    works = _works(runs, window[0].shape[2] + own.new, lanes, own.heads, device)
    parts, sizes, owners, rotated = [], [0], [], []
    works_at = at = base + len(extra)
    for number, variant in enumerate(variants):
        mine = [work for work in works if work[0] == number]
        parts += [np.stack([work[1] | work[2] << 32, work[3] | work[4] << 32], 1).ravel() for work in mine]
        slots = sum(len(work[2]) for work in mine)
        sizes += [at, slots]
        at += 2 * slots
        owners += [work[5] for work in mine]
        rotated += [np.full(len(work[2]), variant.value.rotated and not work[6]) for work in mine]
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    parts.append(np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=lanes))]))
    parts.append(order | np.concatenate(rotated)[order].astype(np.int64) << 32)
    sizes[0] = len(owner)
    shape = (own.new, own.heads, own.groups, own.queries, len(runs))
    numbers[:HEADER] = [*own.strides, *shape, len(owner), works_at, at, at + lanes + 1]
    data = upload(np.concatenate([np.array(numbers + extra, dtype=np.int64), *parts]), device, held)
    own_tensors = [x for run in runs for x in run.own]
    return Table(data, [variant.text(device) for variant in variants], sizes, logits, logits_at, own_tensors)


def _lines(run: Run, lanes: int) -> int:
    return lanes if run.lines is None else len(run.lines.lanes)


def _works(runs: list[Run], exact: int, lanes: int, heads: int, device: torch.device) -> list[tuple[Any, ...]]:
    """Ranges of tokens: variant, run (as 32 bits), lines, firsts, ends, lanes, whether exact; longest runs first."""
    works: list[tuple[Any, ...]] = []
    each = _range_length(sum(run.most * _lines(run, lanes) for run in runs), device)
    for index, run in enumerate(runs):
        line = np.arange(_lines(run, lanes), dtype=np.int64)
        lane = line if run.lines is None else np.array(run.lines.lanes, dtype=np.int64)
        tokens = np.array(run.counts, dtype=np.int64)[line // heads if run.lines is None else line]
        works.append((run.variant, index, *_ranges(line, lane, tokens, each), False))
    line = np.arange(lanes, dtype=np.int64)
    works.append((0, 0xFFFFFFFF, *_ranges(line, line, np.full(lanes, exact), EXACT_TOKENS), True))
    return works


def _ranges(line: np.ndarray, lane: np.ndarray, tokens: np.ndarray, each: int) -> tuple[np.ndarray, ...]:
    """Lines, first and last tokens and lanes of the ranges that lines with so many tokens are cut into."""
    first = np.arange(0, max(int(tokens.max(initial=0)), 1), each, dtype=np.int64)
    chosen, which = np.nonzero(first[None] < tokens[:, None])
    ends = np.minimum(first[which] + each, tokens[chosen])
    return line[chosen], first[which], ends, lane[chosen]


_behind: dict[int, tuple[Any, Sequence[torch.Tensor]]] = {}  # on the CPU: address of a table -> the tensors behind it


def upload(numbers: np.ndarray, device: torch.device, held: Sequence[torch.Tensor]) -> torch.Tensor:
    """Numbers (some of them addresses of the tensors in `held`) where the kernels read them, without waiting."""
    host = torch.from_numpy(numbers.astype(np.int64, copy=False))
    if device.type == "cuda":
        return kernels.without_waiting(host, device)
    for address in [address for address, (alive, _) in _behind.items() if alive() is None]:
        del _behind[address]
    _behind[host.data_ptr()] = weakref.ref(host), held
    return host


def reached(*tables: torch.Tensor | None) -> list[torch.Tensor]:
    """The tensors behind tables on the CPU, for the emulator."""
    return [x for table in tables if table is not None for x in _behind[table.data_ptr()][1]]


def masks_of(entries: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    """The kernels' table of masks, each `[b, h, q, n]` booleans that are broadcast, or None; the caller keeps them."""
    rows = []
    for mask in entries:
        if mask is None:
            rows.append([0, 0, 0, 0])
        else:
            steps = [step if size > 1 else 0 for size, step in zip(mask.shape, mask.stride(), strict=True)]
            rows.append([mask.data_ptr(), *steps[:3]])
    return upload(np.array(rows, dtype=np.int64), device, [mask for mask in entries if mask is not None])
