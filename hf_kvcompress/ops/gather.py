"""Gathering tokens out of packed runs into new ones, not a code changed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from . import kernels
from .library import register
from .packing import pack, unpack

K = TypeVar("K", bound=Hashable)
_AT_ONCE = 1 << 16  # tokens that the reference picks at once
_PLAIN, _LAST, _BITS = 0, 1, 2


@dataclass(frozen=True)
class Layout:
    """How a field holds tokens: `[n, T, ...]`, or `[n, ..., T // tokens]` with `tokens_last`.

    With `tokens` above 1 a byte holds that many codes of one channel, packed along the tokens of a page as in
    `ops.packing`. `absent` is what a place without a token gets (an int32 or a float32); by default anything.
    """

    tokens: int = 1
    tokens_last: bool = False
    absent: int | float | None = None


def gather_tokens(
    parts: Sequence[Mapping[K, torch.Tensor]],
    layouts: Mapping[K, Layout],
    index: torch.Tensor,
    page: int,
    out: Mapping[K, torch.Tensor] | None = None,
) -> dict[K, torch.Tensor]:
    """The tokens at `index` `[n, T]` int64 of all those in `parts`, of every field in `layouts`.

    The fields of a part are those of `[m, T']` tokens, numbered on from those of the part before; -1 is no token. T and
    every T' are multiples of `page`. The result goes into `out` where given, else into new tensors.
    """
    n, tokens = index.shape
    if tokens % page:
        raise ValueError(f"index: expected a multiple of {page} columns, got {tokens}")
    if out is None:
        out = {name: _empty(parts[0][name], layout, n, tokens) for name, layout in layouts.items()}
    if kernels.serves(index) and index.numel():
        _by_kernel(parts, layouts, index, page, out)
        return dict(out)
    step = max(_AT_ONCE // max(tokens, 1), 1)
    for start in range(0, n, step):
        some = index[start : start + step]
        needed, local = _narrow(parts, layouts, some)
        for name, layout in layouts.items():
            picked = _pick([part[name] for part in needed], layout, local, page)
            if layout.absent is not None:
                picked.masked_fill_(some < 0, layout.absent)
            out[name][start : start + step] = picked
    return dict(out)


def _empty(like: torch.Tensor, layout: Layout, n: int, tokens: int) -> torch.Tensor:
    shape = (*like.shape[1:-1], tokens // layout.tokens) if layout.tokens_last else (tokens, *like.shape[2:])
    return like.new_empty(n, *shape)


def _shape(part: Mapping[K, torch.Tensor], layouts: Mapping[K, Layout]) -> tuple[int, int]:
    """Lines of a part, and tokens of each."""
    name, layout = next(iter(layouts.items()))
    return part[name].shape[0], part[name].shape[-1 if layout.tokens_last else 1] * layout.tokens


def _narrow(
    parts: Sequence[Mapping[K, torch.Tensor]], layouts: Mapping[K, Layout], index: torch.Tensor
) -> tuple[list[dict[K, torch.Tensor]], torch.Tensor]:
    """Only the lines that `index` needs, and where its tokens are in them; -1 becomes some other token."""
    shapes = [_shape(part, layouts) for part in parts]
    sizes = torch.tensor([capacity for lines, capacity in shapes for _ in range(lines)], device=index.device)
    starts, index = sizes.cumsum(0) - sizes, index.clamp(min=0)
    line = torch.searchsorted(starts, index, right=True) - 1
    used = torch.zeros_like(sizes, dtype=torch.bool)
    used[line] = True
    local = (torch.where(used, sizes, 0).cumsum(0) - sizes)[line] + index - starts[line]
    needed = []
    for part, own in zip(parts, used.split([lines for lines, _ in shapes]), strict=True):
        wanted = own.nonzero()[:, 0]
        if len(wanted):
            fewer = len(wanted) < len(own)
            needed.append({name: part[name].index_select(0, wanted) if fewer else part[name] for name in layouts})
    return needed, local


def _pick(fields: Sequence[torch.Tensor], layout: Layout, index: torch.Tensor, page: int) -> torch.Tensor:
    """The tokens at `index` of one field."""
    if layout.tokens == 1:
        tokens = [t.movedim(-1, 1) if layout.tokens_last else t for t in fields]
        chosen = torch.cat([t.flatten(0, 1) for t in tokens])[index]
        return chosen.movedim(1, -1) if layout.tokens_last else chosen
    bits, channels = 8 // layout.tokens, fields[0].shape[1]
    paged = [t.transpose(0, 1).unflatten(-1, (-1, page * bits // 8)) for t in fields]
    codes = torch.cat([unpack((t,), bits, page).reshape(channels, -1) for t in paged], dim=1)
    chosen = codes.index_select(1, index.flatten()).view(channels, index.shape[0], -1, page)
    return pack(chosen, bits)[0].flatten(2).transpose(0, 1)


def _by_kernel(
    parts: Sequence[Mapping[K, torch.Tensor]],
    layouts: Mapping[K, Layout],
    index: torch.Tensor,
    page: int,
    out: Mapping[K, torch.Tensor],
) -> None:
    fields = [part[name].contiguous() for name in layouts for part in parts]
    targets = [out[name] for name in layouts]
    tokens, last = [own.tokens for own in layouts.values()], [own.tokens_last for own in layouts.values()]
    fills = [_bits(own.absent) for own in layouts.values()]
    gather_into(index.contiguous(), fields, targets, tokens, last, fills, page)


def _bits(number: int | float | None) -> int:
    """The 32 bits of an int32 or float32, -1 for None."""
    if number is None:
        return -1
    dtype = torch.float32 if isinstance(number, float) else torch.int32
    return int(torch.tensor(number, dtype=dtype).view(torch.int32)) & 0xFFFFFFFF


@register("Tensor index, Tensor[] fields, Tensor(a!)[] out, int[] tokens, bool[] tokens_last, int[] fills, int page")
def gather_into(
    index: torch.Tensor,
    fields: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    tokens: Sequence[int],
    tokens_last: Sequence[bool],
    fills: Sequence[int],
    page: int,
) -> None:
    """`gather_tokens` by the kernel; `fields`: every part of the first field of `out`, every part of the second, ..."""
    n, length = index.shape
    parts = len(fields) // len(out)
    shapes = [(t.shape[0], t.shape[-1 if tokens_last[0] else 1] * tokens[0]) for t in fields[:parts]]
    starts = [0]
    for lines, capacity in shapes:
        starts.append(starts[-1] + lines * capacity)
    directory = [*starts, *(capacity for _, capacity in shapes)]
    for number, target in enumerate(out):
        own = fields[number * parts : (number + 1) * parts]
        directory += _entry(Layout(tokens[number], tokens_last[number]), fills[number], target, own)
    table = kernels.without_waiting(torch.tensor(directory, dtype=torch.int64), index.device)
    kernel = kernels.load("gather_tokens.cu", "gather_tokens")
    args: list[kernels.Argument] = [index, table, parts, len(out), length, page]
    kernel((n, length // page), 128, args, shared=12 * page, like=index, reached=[*fields, *out])


def _entry(layout: Layout, fill: int, out: torch.Tensor, fields: Sequence[torch.Tensor]) -> list[int]:
    """A field's line of the kernel's directory."""
    if not out.is_contiguous():
        raise ValueError(f"out: expected contiguous tensors, got strides {out.stride()}")
    addresses = [t.data_ptr() for t in (out, *fields)]
    unit, count = out.element_size(), out[0].numel() // out.shape[-1 if layout.tokens_last else 1]
    if layout.tokens > 1:
        kind, unit = _BITS, 8 // layout.tokens
    elif layout.tokens_last:
        kind = _LAST
    else:
        kind, whole = _PLAIN, count * unit
        unit = next(u for u in (16, 4, 2, 1) if all(x % u == 0 for x in (whole, *addresses)))
        count = whole // unit
    return [kind, count, unit, int(fill >= 0), max(fill, 0), *addresses]
