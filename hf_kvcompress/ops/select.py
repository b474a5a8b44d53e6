"""Choosing the best tokens of every lane, the same whatever stands beside.

Of equal ones the last stay. A score of -inf or NaN never stays, however few others there are.
"""

from __future__ import annotations

import torch

from . import kernels
from .library import register

MANY = 8192  # tokens from which on a lane gets the larger block


@register("Tensor scores, Tensor k, Tensor? ranges, Tensor? positions, Tensor(a!)? kept, Tensor(b!)? mask")
def select_into(
    scores: torch.Tensor,
    k: torch.Tensor,
    ranges: torch.Tensor | None,
    positions: torch.Tensor | None,
    kept: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    """Write what stays of `scores` `[L, N]` to `kept` `[L, width]` int32, to `mask` `[L, N]` booleans, or to both."""
    lanes, tokens = scores.shape
    if lanes == 0:
        return
    kernel = kernels.load("select_tokens.cu", "select_tokens", DOUBLE=int(scores.dtype == torch.float64))
    range_count, width = 0 if ranges is None else ranges.shape[1], 0 if kept is None else kept.shape[1]
    args: list[kernels.Argument] = [scores, positions, ranges, k, kept, mask, tokens, range_count, width]
    kernel((lanes,), 512 if tokens >= MANY else 128, args, like=scores)


def highest(scores: torch.Tensor, number: int) -> torch.Tensor:
    """Booleans like `scores` `[L, N]` float32 or float64: the `number` highest of each row."""
    if kernels.serves(scores):
        scores = scores.contiguous()
        k = torch.full((scores.shape[0],), max(number, 0), dtype=torch.int32, device=scores.device)
        mask = torch.empty_like(scores, dtype=torch.bool)
        select_into(scores, k, None, None, None, mask)
        return mask
    number = min(number, scores.shape[1])
    if number <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    least = scores.topk(number, dim=1).values[:, -1:]
    return _last_of_equals(scores, least, number) & (scores > -torch.inf)


def select_tokens(
    scores: torch.Tensor,
    k: torch.Tensor,
    width: int,
    ranges: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indices `[L, width]` int32 of the `k` `[L]` best tokens of each lane, rising, then -1.

    The host reads nothing. Where `k` is above `width`, `width` tokens stay.

    Args:
        scores: `[L, N]` float32.
        k: int32, tokens that stay in each lane.
        width: columns of the result.
        ranges: `[L, R, 3]` int32, start, end and level (-127 to 127) of protected positions; where several hold a token
            the last one counts. Tokens of a higher level stay before all others, the newest first, and those of a level
            below 0 never do. Others have level 0, where the score decides.
        positions: `[L, N]` int32, -1 where there is no token; the columns' numbers by default.
    """
    _check(scores, k, ranges, positions)
    if kernels.serves(scores):
        kept = torch.empty(scores.shape[0], width, dtype=torch.int32, device=scores.device)
        select_into(scores, k, ranges, positions, kept, None)
        return kept
    lanes, tokens = scores.shape
    keys = _keys(scores, ranges, positions)
    if tokens == 0 or width == 0:
        return torch.full((lanes, width), -1, dtype=torch.int32, device=scores.device)
    number = k.long().clamp(0, min(width, tokens))[:, None]
    least = keys.sort(dim=1, descending=True).values.gather(1, (number - 1).clamp(min=0))
    stays = _last_of_equals(keys, least, number) & (keys > 0) & (number > 0)
    order = (~stays).to(torch.int8).argsort(dim=1, stable=True)[:, :width].to(torch.int32)
    kept = order.masked_fill(torch.arange(order.shape[1], device=order.device) >= stays.sum(1, keepdim=True), -1)
    return torch.nn.functional.pad(kept, (0, width - kept.shape[1]), value=-1)


def _last_of_equals(keys: torch.Tensor, least: torch.Tensor, number: torch.Tensor | int) -> torch.Tensor:
    """What is above `least` `[L, 1]`, and as many of what equals it as make `number`, the last ones."""
    above, equal = keys > least, keys == least
    wanted = number - above.sum(1, keepdim=True)
    return above | (equal & (equal.flip(1).cumsum(1).flip(1) <= wanted))


def _keys(scores: torch.Tensor, ranges: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
    """Whole numbers `[L, N]` that order like the tokens, 0 for those that never stay."""
    if positions is None:
        positions = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device).expand(scores.shape)
    level = torch.zeros(scores.shape, dtype=torch.long, device=scores.device)
    if ranges is not None:
        for one in ranges.long().unbind(1):
            start, end, own = one[:, :, None].unbind(1)
            level = torch.where((positions >= start) & (positions < end), own, level)
    bits = scores.view(torch.int32).long()
    rank = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)) + (1 << 31)
    rank = torch.where(level > 0, positions.long(), rank)
    hopeless = (level == 0) & ~(scores > -torch.inf)
    return (((level + 128) << 32) + rank).masked_fill_((level < 0) | hopeless | (positions < 0), 0)


def _check(scores: torch.Tensor, k: torch.Tensor, ranges: torch.Tensor | None, positions: torch.Tensor | None) -> None:
    if scores.dim() != 2 or scores.dtype != torch.float32:
        raise ValueError(f"scores: expected [L, N] float32, got {tuple(scores.shape)} {scores.dtype}")
    lanes, tokens = scores.shape
    expected: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {"k": (k, (lanes,))}
    if ranges is not None:
        expected["ranges"] = (ranges, (lanes, ranges.shape[1] if ranges.dim() == 3 else 0, 3))
    if positions is not None:
        expected["positions"] = (positions, (lanes, tokens))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int32:
            raise ValueError(f"{name}: expected {list(shape)} int32, got {list(tensor.shape)} {tensor.dtype}")
    for name, tensor in {"scores": scores, **{name: tensor for name, (tensor, _) in expected.items()}}.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
