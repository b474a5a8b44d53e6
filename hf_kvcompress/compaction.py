"""Giving back the memory of evicted tokens: what a row's lanes keep is gathered into one new block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .blocks import Block
from .codecs.base import Packed
from .lane_reading import LINE
from .lanes import LINE_COST, LanePages
from .ops.gather import Layout, gather_tokens

AT_ONCE = 1 << 23  # numbers that are unpacked at once


@dataclass(frozen=True)
class Rewrite:
    """New values `[n, D]` float32 of the tokens that are kept and marked, in the order of the table."""

    marked: torch.Tensor  # [L, N] booleans
    values: torch.Tensor


def compact(
    pages: LanePages,
    rows: Sequence[int],
    table: torch.Tensor,
    keep: torch.Tensor,
    rewrite: Rewrite | None = None,
) -> None:
    """Keep of the rows' tokens in `table` `[len(rows) * H, N]` only those where `keep` is true.

    Codecs that pack every token by itself give the very same codes; tokens of the others are read back and packed anew,
    all that stay in one go.
    """
    found = _lay_out(pages, rows, table, keep)
    blocks = []
    if found is not None:
        lines, source, order = found
        block = _gather(pages, lines, source)
        if rewrite is not None:
            _rewrite_values(pages, block, (source >= 0).nonzero()[rewrite.marked[keep][order]], rewrite, order, keep)
        blocks.append(block)
    _remove(pages, rows)
    pages.blocks += blocks


def gather_block(pages: LanePages, rows: Sequence[int], table: torch.Tensor) -> Block | None:
    """A block of its own with the tokens in `table` `[len(rows) * H, N]`, which stay where they are as well."""
    found = _lay_out(pages, rows, table, table >= 0)
    return None if found is None else _gather(pages, found[0], found[1])


Line = tuple[int, int, int]  # lane, epoch, tokens


def _lay_out(
    pages: LanePages, rows: Sequence[int], table: torch.Tensor, keep: torch.Tensor
) -> tuple[list[Line], torch.Tensor, torch.Tensor] | None:
    """Lines for the tokens to keep, their numbers `[lines, capacity]` (-1 for none), and the order they come in."""
    kept = table[keep]
    if len(kept) == 0:
        return None
    lanes = torch.tensor([row * pages.heads + head for row in rows for head in range(pages.heads)])
    lane = lanes[:, None].expand_as(table)[keep]
    epochs = torch.tensor([block.epochs[line] for block, line in pages.lines()])[kept >> LINE]
    order = (lane * (int(epochs.max()) + 1) + epochs).argsort(stable=True)  # a line has one statistic
    lines, capacity = _cut(lane[order], epochs[order], pages.page_size)
    source = torch.full((len(lines), capacity), -1, dtype=torch.long)
    first = 0
    for number, (_, _, count) in enumerate(lines):
        source[number, :count] = kept[order[first : first + count]]
        first += count
    return lines, source, order


def _rewrite_values(
    pages: LanePages,
    block: Block,
    places: torch.Tensor,
    rewrite: Rewrite,
    order: torch.Tensor,
    keep: torch.Tensor,
) -> None:
    """Pack the new values of the tokens at `places` `[n, 2]` (line, place in it) anew; the others stay as they are."""
    if len(places) == 0:
        return
    codec, device = pages.codecs["value"], pages.device
    rank = torch.full(keep.shape, -1)
    rank[rewrite.marked] = torch.arange(len(rewrite.values))
    numbers = rank[keep][order]
    values = rewrite.values[numbers[numbers >= 0].to(device)]
    lines, line = places[:, 0].unique(return_inverse=True)
    within = torch.arange(len(places)) - torch.searchsorted(line, line)
    page = pages.page_size
    length = -(-int(within.max() + 1) // page) * page
    dense = torch.zeros(len(lines), length, codec.dim, device=device)
    dense[line.to(device), within.to(device)] = values
    epochs = torch.tensor([block.epochs[i] for i in lines.tolist()], device=device)
    segment = pages.statistics.of("value", epochs)
    if codec.token_wise:
        n, capacity = len(block.lanes), block.capacity
        index = torch.arange(n * capacity).view(n, capacity)
        index[places[:, 0], places[:, 1]] = n * capacity + line * length + within
        parts = [block.packed["value"], codec.encode(dense, segment)]
        block.packed["value"] = codec.gather(parts, index.to(device))
        return
    whole = {name: t[:, None, None] for name, t in block.packed["value"].items()}
    read = codec.decode(whole)[:, 0, 0]
    read[places[:, 0].to(device), places[:, 1].to(device)] = values
    block.packed["value"] = codec.encode(read, {})


def _cut(lane: torch.Tensor, epoch: torch.Tensor, page: int) -> tuple[list[Line], int]:
    """Lines `(lane, epoch, tokens)` for tokens sorted by lane and epoch, and the capacity that wastes least."""
    pairs, counts = torch.stack([lane, epoch], dim=1).unique_consecutive(dim=0, return_counts=True)
    longest = -(-int(counts.max()) // page) * page
    options = {longest, *(page << i for i in range(16) if page << i < longest)}
    capacity = min(options, key=lambda c: (int((-(-counts // c)).sum()) * (c + LINE_COST), -c))
    lines = []
    for (own_lane, own_epoch), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        for start in range(0, count, capacity):
            lines.append((own_lane, own_epoch, min(capacity, count - start)))
    return lines, capacity


def _gather(pages: LanePages, lines: list[Line], source: torch.Tensor) -> Block:
    block = pages.new_block([lane for lane, _, _ in lines], [epoch for _, epoch, _ in lines], source.shape[1])
    block.counts = [count for _, _, count in lines]
    layouts = {"positions": Layout(absent=-1)}
    if block.mass is not None:
        layouts["mass"] = Layout(absent=0.0)
    whole = [role for role, codec in pages.codecs.items() if codec.token_wise]
    for role in whole:
        layouts |= {f"{role} {name}": layout for name, layout in pages.codecs[role].layouts.items()}
    parts = [_fields(old, layouts) for old in pages.blocks]
    gather_tokens(parts, layouts, pages.flat(source).to(pages.device), pages.page_size, out=_fields(block, layouts))
    step = max(AT_ONCE // (source.shape[1] * pages.codecs["key"].dim), 1)
    for role in pages.codecs.keys() - set(whole):
        for start in range(0, len(lines), step):
            part = source[start : start + step]
            for name, entry in _pack_again(pages, role, part, block, start).items():
                block.packed[role][name][start : start + len(part)] = entry
    return block


def _fields(block: Block, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Some of a block's tensors by name, those of a role as "role field"."""
    every = {f"{role} {name}": tensor for role, packed in block.packed.items() for name, tensor in packed.items()}
    every["positions"] = block.positions
    if block.mass is not None:
        every["mass"] = block.mass
    return {name: every[name] for name in names}


def _pack_again(pages: LanePages, role: str, source: torch.Tensor, block: Block, start: int) -> Packed:
    """Tokens that were packed together, read back and packed with their new neighbours."""
    dense = pages.decode(role, source)
    counts = torch.tensor(block.counts[start : start + len(source)], device=dense.device)
    # A place without a token repeats the line's last one, which widens no group's range.
    last = dense[torch.arange(len(source), device=dense.device), counts - 1]
    dense = torch.where((source < 0).to(dense.device)[..., None], last[:, None], dense)
    epochs = torch.tensor(block.epochs[start : start + len(source)], device=dense.device)
    segment = pages.statistics.of(role, epochs)
    if role == "key":
        lanes = block.lanes[start : start + len(source)]
        segment |= {
            name: at[:, 0, 0] for name, at in pages.places(lanes, pages.look_up("positions", source, -1)).items()
        }
    return pages.codecs[role].encode(dense, segment)


def _remove(pages: LanePages, rows: Sequence[int]) -> None:
    """Take the rows' lines out of all blocks."""
    gone = set(rows)
    blocks = []
    for block in pages.blocks:
        left = [line for line, lane in enumerate(block.lanes) if lane // pages.heads not in gone]
        if len(left) == len(block.lanes):
            blocks.append(block)
        elif left:
            blocks.append(block.select(left, [block.lanes[line] for line in left]))
    pages.blocks = blocks
    kept = {id(block) for block in blocks}
    pages.open = [at if at is not None and id(at[0]) in kept else None for at in pages.open]
