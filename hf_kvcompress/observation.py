"""What one pass's attention says about the tokens it read: the mass that each received."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .lanes import Block


@dataclass
class Observation:
    """Attention mass of one pass over the query group, float32, summed over queries or one entry each.

    exact: `[B, H, n]` of sinks and recent window; new: `[B, H, q]` of the pass's own tokens; blocks: `[n, capacity]` of
    sealed ones. With `by_query` each has an axis of queries before its last one, so that a pass can still be cropped.
    """

    by_query: bool = False
    exact: torch.Tensor | None = None
    new: torch.Tensor | None = None
    blocks: list[tuple[Block, torch.Tensor]] = field(default_factory=list)

    def add(self, run: object, mass: torch.Tensor) -> None:
        """Add the mass that a run ("exact", "new" or a block) received from further queries."""
        if isinstance(run, Block):
            for number, (block, before) in enumerate(self.blocks):
                if block is run:
                    self.blocks[number] = (block, self._join(before, mass))
                    return
            self.blocks.append((run, mass))
        elif run == "exact":
            self.exact = self._join(self.exact, mass)
        else:
            self.new = self._join(self.new, mass)

    def _join(self, before: torch.Tensor | None, mass: torch.Tensor) -> torch.Tensor:
        if before is None:
            return mass
        return torch.cat([before, mass], dim=-2) if self.by_query else before + mass

    def of_first(self, queries: int) -> Observation:
        """Summed over the first `queries` queries; the new tokens are as many."""
        if not self.by_query:
            return self

        def total(mass: torch.Tensor | None) -> torch.Tensor | None:
            return None if mass is None else mass[..., :queries, :].sum(-2)

        new = total(self.new)
        blocks = [(block, mass[..., :queries, :].sum(-2)) for block, mass in self.blocks]
        return Observation(False, total(self.exact), None if new is None else new[..., :queries], blocks)
