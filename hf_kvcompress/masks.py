"""What a mask says about tokens at given positions, evaluated where tokens really are instead of as a dense matrix.

transformers hands a mask function to whoever builds the mask; `kvcompress_mask` keeps that function with the 2-D
padding mask, and the attention asks it about the slots a layer holds. Causal, sliding, chunked, image-block and custom
masks are all exact this way, and layers and rows may hold different tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .handles import LazyTensor


@dataclass(frozen=True)
class Lines:
    """Slots that are not the same for all heads: line i is of row `rows[i]` and key-value head `heads[i]` of `of`."""

    rows: torch.Tensor
    heads: torch.Tensor
    of: int


@dataclass(frozen=True)
class Slots:
    """A run of a layer's slots: `positions(device)` gives `[B or 1, n]`, -1 where a row holds no token.

    `key` is the same for equal runs of different layers (None: no other layer has it), `past` says that all of them
    come before the first query, `full` that no row is empty in any of them. With `lines` positions are `[lines, n]`;
    with `rows` they are `[E, n]`, entry i being of row `rows[i]`.
    """

    positions: Callable[[torch.device], torch.Tensor]
    key: Hashable
    past: bool
    full: bool
    lines: Lines | None = None
    rows: torch.Tensor | None = None


class MaskPlan:
    """The mask of one forward pass.

    Args:
        arguments: what transformers passed to the mask function (lengths, offsets, `mask_function`, the 2-D mask).
    """

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        self.batch: int = arguments["batch_size"]
        self.q_length = int(arguments["q_length"])
        self.device = arguments.get("device", "cpu")
        self.function: Callable = arguments.get("mask_function", causal_mask_function)
        self.padding: torch.Tensor | None = arguments.get("attention_mask")
        self._dense: torch.Tensor | None = None
        self._answers: dict[Hashable, torch.Tensor | None] = {}
        self._no_padding: bool | None = None

    @cached_property
    def start(self) -> int:
        """Position of the first query."""
        return int(self.arguments.get("q_offset", 0))

    @property
    def no_padding(self) -> bool:
        """No token of the 2-D mask is hidden. One look at the mask a pass, none in a decode step on an accelerator."""
        if self._no_padding is None:
            look = self.padding is not None and self._may_wait
            self._no_padding = self.padding is None or (look and bool(self.padding.all()))
        return self._no_padding

    @property
    def _may_wait(self) -> bool:
        # A decode step on an accelerator must not wait for it: there the mask is applied without being looked at.
        return self.q_length > 1 or torch.device(self.device).type == "cpu"

    def dense(self) -> torch.Tensor | None:
        """The mask that plain sdpa would get, None where it may rely on `is_causal`."""
        if self._dense is None:
            self._dense = sdpa_mask(**self.arguments)
        return self._dense

    def kept(self) -> list[torch.Tensor] | None:
        """For each row the indices of this pass's tokens that are no padding; None if none is."""
        if self.no_padding or not self._may_wait:
            return None
        assert self.padding is not None
        new = self.padding[:, self.start : self.start + self.q_length].cpu()
        return None if bool(new.all()) else [row.nonzero()[:, 0] for row in new]

    def allowed(self, slots: Slots, which: slice) -> torch.Tensor | None:
        """Which of these queries may see the tokens in these slots, None if all see all.

        `[B or 1, 1 or H, q, n]` booleans, or `[lines, 1, q, n]`.
        """
        if slots.past and slots.full and self.causal and self.no_padding:
            return None
        if slots.key is None:
            return self._evaluate(slots, which)
        key = (slots.key, which.start, which.stop)
        if key not in self._answers:
            self._answers[key] = self._evaluate(slots, which)
        return self._answers[key]

    @property
    def causal(self) -> bool:
        """A query sees all that comes before it, and itself."""
        return self.function is causal_mask_function

    def _evaluate(self, slots: Slots, which: slice) -> torch.Tensor | None:
        positions = slots.positions(torch.device(self.device))
        clamped = positions.clamp(min=0)
        rows = torch.arange(self.batch, device=positions.device)
        if slots.lines is not None:
            rows = slots.lines.rows.to(positions.device)
        elif slots.rows is not None:
            rows = slots.rows.to(positions.device)
        queries = torch.arange(self.q_length, device=positions.device)[which] + self.start
        heads = torch.zeros(1, dtype=torch.long, device=positions.device)
        if self.arguments.get("use_vmap", False):
            answer = self._vmapped(rows, heads, queries, clamped.expand(len(rows), -1))
        else:
            answer = self.function(
                rows[:, None, None, None], heads[None, :, None, None], queries[:, None], clamped[:, None, None]
            )
            answer = answer.expand(answer.shape[0], answer.shape[1], len(queries), positions.shape[1])
        answer = answer & (positions >= 0)[:, None, None]
        if not self.no_padding:
            assert self.padding is not None
            seen = self.padding.shape[1]  # tokens behind the mask's end do not exist for transformers either
            at = clamped.clamp(max=seen - 1).expand(len(rows), -1)
            shown = self.padding[rows[:, None], at] & (clamped < seen)
            answer = answer & shown[:, None, None]
        return None if self._may_wait and bool(answer.all()) else answer

    def _vmapped(
        self, rows: torch.Tensor, heads: torch.Tensor, queries: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        # A user's own function may index tensors with scalars: map it over one index at a time, as transformers does.
        function = self.function
        for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, 0)):
            function = torch.vmap(function, in_dims=dims)
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        with TransformGetItemToIndex():
            return function(rows, heads, queries, positions)


class DenseMask:
    """A mask that is a tensor already: a user's own 4-D mask, boolean or additive, for positions from `offset` on."""

    no_padding, causal = True, False

    def __init__(self, mask: torch.Tensor, offset: int):
        self.mask, self.offset = mask, offset

    def dense(self) -> torch.Tensor:
        return self.mask

    def allowed(self, slots: Slots, which: slice) -> torch.Tensor:
        """`[B or 1, 1 or Hq, q, n]`, or `[lines, 1 or G, q, n]`, boolean or additive."""
        positions = slots.positions(self.mask.device)
        mask = self.mask[:, :, which]
        if slots.lines is not None:
            mask = self._of_lines(mask, slots.lines)
        elif slots.rows is not None and mask.shape[0] > 1:
            mask = mask[slots.rows]
        columns = (positions - self.offset).clamp(0, mask.shape[-1] - 1)[:, None, None]
        rows = max(mask.shape[0], positions.shape[0])
        mask = mask.expand(rows, -1, -1, -1)
        picked = mask.gather(3, columns.expand(rows, mask.shape[1], mask.shape[2], -1))
        # What the mask does not cover is no longer (or not yet) to be seen; -1 marks a slot without a token.
        empty = ((positions < self.offset) | (positions >= self.offset + mask.shape[-1]))[:, None, None]
        if picked.dtype == torch.bool:
            return picked & ~empty
        return picked.masked_fill(empty, float("-inf"))

    @staticmethod
    def _of_lines(mask: torch.Tensor, lines: Lines) -> torch.Tensor:
        """Each line's own part of the mask, `[lines, 1 or G, q, T]`."""
        rows = lines.rows if mask.shape[0] > 1 else torch.zeros_like(lines.rows)
        if mask.shape[1] == 1:
            return mask[rows]
        return mask.unflatten(1, (lines.of, -1))[rows, lines.heads]


class CausalMask:
    """No mask at all, as sdpa reads it: causal if the module says so, else everything is visible."""

    no_padding = True

    def __init__(self, q_length: int, q_offset: int, causal: bool, device: torch.device):
        self.q_length, self.q_offset, self.causal, self.device = q_length, q_offset, causal, device

    def dense(self) -> None:
        return None

    def allowed(self, slots: Slots, which: slice) -> torch.Tensor | None:
        if slots.full and (slots.past or not self.causal):
            return None
        positions = slots.positions(self.device)
        answer = (positions >= 0)[:, None, None]
        if self.causal:
            queries = torch.arange(self.q_length, device=positions.device)[which] + self.q_offset
            answer = answer & (positions[:, None, None] <= queries[:, None])
        return answer


Mask = MaskPlan | DenseMask | CausalMask


@torch.compiler.disable
def kvcompress_mask(**arguments: Any) -> torch.Tensor:
    """Mask function of the "kvcompress" attention: a tensor that holds the plan and becomes a dense mask if touched."""
    begin = getattr(arguments.get("q_offset"), "begin_forward", None)
    if isinstance(arguments.get("q_offset"), torch.Tensor):  # a static cache moves it on before the mask is needed
        arguments["q_offset"] = arguments["q_offset"].clone()
    plan = MaskPlan(arguments)
    shape = (plan.batch, 1, plan.q_length, int(arguments["kv_length"]))

    def dense() -> torch.Tensor:
        mask = sdpa_mask(**{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        assert mask is not None  # only the skips give None
        return mask

    if begin is not None:  # the offset came from one of our caches, which wants to know what is padding
        begin(plan)
    return LazyTensor(shape, torch.bool, torch.device(plan.device), dense, plan, "mask")
