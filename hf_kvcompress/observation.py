"""What one pass's attention says about the tokens it read: the mass that each received."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .blocks import Block

LONGEST_DRAFT = 64  # newest tokens of a pass that may be taken back, with past recording on


def draft_slots(length: int, which: slice) -> torch.Tensor:
    """Where the mass of each query of the block `which` goes in a pass of `length`: its own slot, 1 .. LONGEST_DRAFT.

    Queries too old to be taken back share slot 0.
    """
    queries = torch.arange(length)[which]
    return (queries - length + LONGEST_DRAFT + 1).clamp(min=0)


@dataclass
class Observation:
    """Attention mass of one pass over the query group, float32.

    exact: `[B, H, n]` of sinks and recent window; new: `[B, H, q]` of the pass's own tokens; blocks: `[n, capacity]` of
    sealed ones. In a pass that may be cropped each has an axis of `draft_slots` before its last one.
    """

    draft: bool = False
    exact: torch.Tensor | None = None
    new: torch.Tensor | None = None
    blocks: list[tuple[Block, torch.Tensor]] = field(default_factory=list)

    def add(self, run: object, mass: torch.Tensor) -> None:
        """Add the mass that a run ("exact", "new" or a block) received from further queries."""
        if isinstance(run, Block):
            for number, (block, before) in enumerate(self.blocks):
                if block is run:
                    self.blocks[number] = (block, before + mass)
                    return
            self.blocks.append((run, mass))
        elif run == "exact":
            self.exact = mass if self.exact is None else self.exact + mass
        else:
            self.new = mass if self.new is None else self.new + mass

    def without_newest(self, queries: int) -> Observation:
        """Less what the newest `queries` queries of a draft paid; the new tokens are as many fewer."""

        def rest(mass: torch.Tensor | None) -> torch.Tensor | None:
            return None if mass is None else mass[..., : mass.shape[-2] - queries, :]

        new = rest(self.new)
        blocks = [(block, mass[..., : mass.shape[-2] - queries, :]) for block, mass in self.blocks]
        return Observation(True, rest(self.exact), None if new is None else new[..., : new.shape[-1] - queries], blocks)

    def total(self) -> Observation:
        """Summed over the queries."""
        if not self.draft:
            return self
        exact, new = (None if mass is None else mass.sum(-2) for mass in (self.exact, self.new))
        return Observation(False, exact, new, [(block, mass.sum(-2)) for block, mass in self.blocks])
