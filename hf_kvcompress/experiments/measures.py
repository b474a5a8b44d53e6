"""The units of one experiment: the harness's own measures, on prompts of the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..harness.loading import Bench
from ..harness.specs import Entrant
from ..harness.suites import Suite
from ..harness.units import Run, Unit, Values, units
from ..scoring import Choose, greedy
from .experiment import Experiment

#: a prompt of fewer tokens has too few to score
LEAST_SCORED = 64
#: of a prompt's end, at most so many tokens and at most a quarter of it are scored
MOST_SCORED = 256
TIMED = 32
NOTHING = Suite(
    "experiment", scored=2, stepped=0, windows=1, probed=0, generated=0, timed=0, repeats=1, tasks=(), task_lengths=()
)


@dataclass(frozen=True)
class PromptBench(Bench):
    """A bench whose only passage is one prompt `[1, T]`, and on which tokens may be drawn."""

    ids: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.long))
    temperature: float = 0.0
    seed: int = 0

    def passages(self, text: str, number: int, length: int) -> list[torch.Tensor]:
        return [self.ids.to(self.model.device)] * number

    def chooser(self) -> Choose:
        return drawn(self.temperature, self.seed) if self.temperature else greedy


def drawn(temperature: float, seed: int) -> Choose:
    """Draws tokens by their probabilities, with noise that depends on the seed and the number of draws alone.

    So two caches draw the same tokens for as long as their logits are close (Gumbel-max, arXiv 1411.0030).
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: torch.Tensor) -> int:
        noise = torch.empty(logits.shape[-1]).exponential_(generator=generator).log().neg()
        return int((logits[0].float().cpu() / temperature + noise).argmax())

    return choose


def units_of(
    experiment: Experiment, model: Any, scoring_model: Any, tokenizer: Any, prompts: Sequence[torch.Tensor]
) -> list[Unit]:
    """Answers of every prompt, perplexity and KL of its end if it is long enough, and speed on the longest one.

    Units are told apart by the prompt's number, which stands where the harness has a seed: spreads are over prompts.

    Args:
        prompts: `[1, T]` each.
    """
    longest = max(range(len(prompts)), key=lambda index: prompts[index].shape[1])
    kept: dict[Any, Any] = {}  # of all prompts: what the harness keeps of the last one
    found: list[Unit] = []
    for index, ids in enumerate(prompts):
        length = ids.shape[1]
        bench = PromptBench(
            model, scoring_model, tokenizer, ("prompt",), (), kept, ids, experiment.temperature, experiment.seed + index
        )
        answers = replace(
            NOTHING,
            prompt=length - 1,
            generated=experiment.max_tokens,
            timed=min(TIMED, experiment.max_tokens) if index == longest else 0,
        )
        own = [unit for unit in units(bench, answers) if unit.measure in ("generation", "speed")]
        if length >= LEAST_SCORED:
            scored = min(MOST_SCORED, length // 4)
            quality = replace(NOTHING, prompt=length - scored, scored=scored)
            own += [unit for unit in units(bench, quality) if unit.measure == "perplexity"]
        for unit in own:
            prepare = _with_tokens(unit.prepare) if unit.measure == "generation" else unit.prepare
            found.append(replace(unit, seed=index, prepare=prepare))
    return sorted(found, key=lambda unit: unit.alone)  # clocks last, as in the harness


def _with_tokens(prepare: Callable[[], Run]) -> Callable[[], Run]:
    """The same measure, whose values have the tokens of the answer."""

    def prepared() -> Run:
        run = prepare()

        def with_tokens(entrant: Entrant, reference: Any) -> tuple[Values, Any]:
            values, left = run(entrant, reference)
            return {**values, "tokens": list(left[0].tokens)}, left

        return with_tokens

    return prepared
