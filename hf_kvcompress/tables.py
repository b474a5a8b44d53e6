"""The candidates of an eviction round, whichever tier they are in."""

from __future__ import annotations

import math

import torch

from .lanes import LanePages
from .ops.select import highest
from .tiers import Tail


class Tables:
    """The candidates of both tiers in the order of positions: columns of `own` are of the first, of `back` of the tail.

    Both are `[L, N]` on the host, -1 where the other tier has the token.
    """

    def __init__(self, pages: LanePages, tail: Tail | None, own: torch.Tensor, back: torch.Tensor):
        self.pages, self.tail = pages, tail
        at = pages.look_up("positions", own, -1).long()
        self.own, self.back, self.positions = own, back, at
        if tail is None:
            return
        at = torch.cat([at, tail.pages.look_up("positions", back, -1).long().to(at.device)], dim=1)
        far = torch.iinfo(torch.long).max
        order = torch.where(at < 0, far, at).argsort(dim=1)
        nothing = torch.full_like(back, -1), torch.full_like(own, -1)
        self.own = torch.cat([own, nothing[0]], dim=1).gather(1, order.cpu())
        self.back = torch.cat([nothing[1], back], dim=1).gather(1, order.cpu())
        self.positions = at.gather(1, order)

    def decode(self, role: str) -> torch.Tensor:
        first = self.pages.decode(role, self.own)
        return first if self.tail is None else first + self.tail.pages.decode(role, self.back).to(first.device)

    def masses(self) -> torch.Tensor:
        first = self.pages.look_up("mass", self.own, 0.0)
        if self.tail is None:
            return first
        return first + self.tail.pages.look_up("mass", self.back, 0.0).to(first.device)

    def without_rash_returns(self, order: torch.Tensor, clear: int | None = None) -> torch.Tensor:
        """Let no more than a page of each lane's best tokens come back at a time: each move packs a token anew.

        With `clear` only those among the lane's `clear` best.
        """
        if self.tail is None or self.back.shape[1] == 0:
            return order
        away = (self.back >= 0).to(order.device)
        best = order.masked_fill(~away, -math.inf).topk(min(self.pages.page_size, order.shape[1]), dim=1).indices
        allowed = torch.zeros_like(away).scatter_(1, best, True)
        if clear is not None:
            allowed &= highest(order, clear)
        return order.masked_fill(away & ~allowed, -math.inf)
