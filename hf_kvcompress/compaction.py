"""Giving back the memory of evicted tokens: what a row's lanes keep is gathered into one new block."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .codecs.base import Packed
from .lanes import INSIDE, LINE, LINE_COST, Block, LanePages

AT_ONCE = 1 << 23  # numbers that are unpacked at once


def compact(pages: LanePages, rows: Sequence[int], table: torch.Tensor, keep: torch.Tensor) -> None:
    """Keep of the rows' tokens in `table` `[len(rows) * H, N]` only those where `keep` is true.

    Codecs that pack every token by itself give the very same codes; tokens of the others are read back and packed anew,
    all that stay in one go.
    """
    kept = table[keep]
    lanes = torch.tensor([row * pages.heads + head for row in rows for head in range(pages.heads)])
    lane = lanes[:, None].expand_as(table)[keep]
    epochs = torch.tensor([block.epochs[line] for block, line in pages.lines()])[kept >> LINE]
    blocks = []
    if len(kept):
        lines, capacity = _lay_out(lane, epochs, pages.page_size)
        source = torch.full((len(lines), capacity), -1, dtype=torch.long)
        first = 0
        for number, (_, _, count) in enumerate(lines):
            source[number, :count] = kept[first : first + count]
            first += count
        blocks.append(_gather(pages, lines, source))
    _remove(pages, rows)
    pages.blocks += blocks


def _lay_out(lane: torch.Tensor, epoch: torch.Tensor, page: int) -> tuple[list[tuple[int, int, int]], int]:
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


def _gather(pages: LanePages, lines: list[tuple[int, int, int]], source: torch.Tensor) -> Block:
    block = pages.new_block([lane for lane, _, _ in lines], [epoch for _, epoch, _ in lines], source.shape[1])
    block.counts = [count for _, _, count in lines]
    block.positions.copy_(pages.look_up("positions", source, -1))
    if block.mass is not None:
        block.mass.copy_(pages.look_up("mass", source, 0.0))
    step = max(AT_ONCE // (source.shape[1] * pages.codecs["key"].dim), 1)
    for start in range(0, len(lines), step):
        part = source[start : start + step]
        for role, codec in pages.codecs.items():
            picked = _pick(pages, role, part) if codec.token_wise else _pack_again(pages, role, part, block, start)
            for name, entry in picked.items():
                block.packed[role][name][start : start + len(part)] = entry
    return block


def _pick(pages: LanePages, role: str, source: torch.Tensor) -> Packed:
    """The packed tokens in `source` `[n, T]`; places without one are copies of some other token."""
    needed = (source[source >= 0] >> LINE).unique()
    parts, local = [], torch.zeros(int(needed.max()) + 1, dtype=torch.long)
    first = tokens = 0
    for block in pages.blocks:
        own = needed[(needed >= first) & (needed < first + len(block.lanes))]
        if len(own):
            index = (own - first).to(pages.device)
            parts.append({name: t.index_select(0, index) for name, t in block.packed[role].items()})
            local[own] = tokens + torch.arange(len(own)) * block.capacity
            tokens += len(own) * block.capacity
        first += len(block.lanes)
    at = local[source.clamp(min=0) >> LINE] + (source & INSIDE)
    return pages.codecs[role].gather(parts, at.masked_fill_(source < 0, 0).to(pages.device))


def _pack_again(pages: LanePages, role: str, source: torch.Tensor, block: Block, start: int) -> Packed:
    """Tokens that were packed together, read back and packed with their new neighbours."""
    dense = pages.decode(role, source)
    counts = torch.tensor(block.counts[start : start + len(source)], device=dense.device)
    # A place without a token repeats the line's last one, which widens no group's range.
    last = dense[torch.arange(len(source), device=dense.device), counts - 1]
    dense = torch.where((source < 0).to(dense.device)[..., None], last[:, None], dense)
    epochs = torch.tensor(block.epochs[start : start + len(source)], device=dense.device)
    segment = {name: t[epochs] for name, t in pages.statistics[role].items()}
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
