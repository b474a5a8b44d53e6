"""Units of work: one measure of one sample through every cache, the uncompressed one first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..measure import tensor_bytes
from ..scoring import Decoded, Score, decode, load_text, score
from .agreement import first_divergence, rouge_l
from .asking import Answered, TaskSample, answer, divergence
from .attention_error import AttentionProbe
from .loading import Bench
from .records import record_tasks
from .specs import Entrant
from .speed import peak_bytes, percentile, timed
from .suites import Suite
from .tasks import Task, recall_tasks, text_tasks

#: numbers and lists of numbers by name
Values = dict[str, Any]
#: measures one cache; gets what the uncompressed one left behind, None for itself, and leaves something behind
Run = Callable[[Entrant, Any], tuple[Values, Any]]
PARTS = 8  # of the scored text, for KL by position
PROFILED = 4  # decoded tokens of the run whose memory is watched


@dataclass(frozen=True)
class Unit:
    """One measure of one sample.

    Args:
        measure, name, seed: identify it in a run.
        prepare: makes the sample and returns what measures a cache on it.
        alone: measures time, so nothing else should run beside it.
    """

    measure: str
    name: str
    seed: int
    prepare: Callable[[], Run]
    alone: bool = False

    @property
    def key(self) -> str:
        return f"{self.measure}/{self.name}/{self.seed}"


def units(bench: Bench, suite: Suite) -> list[Unit]:
    """All units of a suite, those that measure time last."""
    found: list[Unit] = []
    for text in bench.texts:
        label = Path(text).stem if bench.tokenizer is not None else "recall"
        modes = {"chunk": (suite.chunk, suite.scored), "step": (1, suite.stepped)}
        for seed in range(suite.windows):
            for mode, (step, length) in modes.items() if suite.scored else ():
                if length:
                    prepare = partial(_perplexity, bench, text, suite, seed, step, length)
                    found.append(Unit("perplexity", f"{mode}:{label}", seed, prepare))
            if suite.probed:
                found.append(Unit("attention", label, seed, partial(_attention, bench, text, suite, seed)))
            if suite.generated:
                found.append(Unit("generation", label, seed, partial(_generation, bench, text, suite, seed)))
    for length in suite.task_lengths:
        for task in [*_tasks(bench, suite, length), *_records(bench, length)]:
            name = task.name if len(suite.task_lengths) == 1 else f"{task.name}@{length}"
            found += [Unit("task", name, s, partial(_task, bench, task, s)) for s in range(suite.task_seeds)]
    if suite.timed:
        for seed in range(suite.repeats):
            prepare = partial(_speed, bench, bench.texts[0], suite, seed)
            found.append(Unit("speed", "decode", seed, prepare, alone=True))
    return found


def _tasks(bench: Bench, suite: Suite, length: int) -> list[Task]:
    if suite.tasks == () or not suite.task_seeds:
        return []
    device = bench.model.device
    if bench.tokenizer is None:
        return recall_tasks(suite.tasks, length, device)
    return text_tasks(bench.tokenizer, load_text(bench.texts[0]), length, suite.tasks, device)


def _records(bench: Bench, length: int) -> list[Task]:
    if bench.records and bench.tokenizer is None:
        raise ValueError("records: expected none for a model without a tokenizer")
    return record_tasks(bench.tokenizer, bench.records, length, bench.model.device)


# -- the measures --------------------------------------------------------------------------------------------------


def _passage(bench: Bench, text: str, suite: Suite, seed: int) -> torch.Tensor:
    """A prompt and what follows it, for every measure alike, so that the prompt is read once for all of them."""
    return bench.passages(text, suite.windows, suite.prompt + max(suite.scored, suite.stepped, suite.probed, 1))[seed]


def _perplexity(bench: Bench, text: str, suite: Suite, seed: int, step: int, length: int) -> Run:
    ids = _passage(bench, text, suite, seed)[:, : suite.prompt + length]
    model = bench.scoring_model
    prompt = bench.prompt(model, ids[:, : suite.prompt + 1])

    def run(entrant: Entrant, reference: Score | None) -> tuple[Values, Score]:
        with entrant.around(model):
            make = partial(prompt.through, entrant.make)
            got = score(model, ids, make, suite.prompt, step, reference=reference, prefilled=True)
        parts = [] if got.kl is None else [part.mean().item() for part in got.kl.tensor_split(min(PARTS, len(got.kl)))]
        values = {
            "perplexity": got.perplexity,
            "nll": got.nll.mean().item(),
            "kl": got.mean_kl,
            "top1": got.top1_agreement,
            "kl_by_position": parts,
            "positions": len(got.nll),
        }
        return values, got

    return run


def _attention(bench: Bench, text: str, suite: Suite, seed: int) -> Run:
    ids = _passage(bench, text, suite, seed)
    prompt = bench.prompt(bench.scoring_model, ids[:, : suite.prompt + 1])
    probe = AttentionProbe(prompt, ids[:, suite.prompt :][:, : suite.probed])

    def run(entrant: Entrant, reference: Any) -> tuple[Values, Any]:
        with entrant.around(bench.scoring_model):
            errors = probe.errors(entrant.make)
        numbers = list(errors.values())
        if not numbers:  # the model's attention cannot be watched
            return {}, True
        mean, worst = sum(numbers) / len(numbers), max(numbers)
        return {"error": mean, "worst": worst, "by_layer": {str(i): e for i, e in errors.items()}}, True

    return run


def _generation(bench: Bench, text: str, suite: Suite, seed: int) -> Run:
    ids = _passage(bench, text, suite, seed)[:, : suite.prompt + 1]
    prompt = bench.prompt(bench.model, ids)

    def run(entrant: Entrant, reference: tuple[Decoded, int] | None) -> tuple[Values, tuple[Decoded, int]]:
        with entrant.around(bench.model):
            make, choose = partial(prompt.through, entrant.make), bench.chooser()
            got = decode(bench.model, ids[:, :-1], prompt.last, make, suite.generated, prefilled=True, choose=choose)
        nbytes = got.cache.nbytes if hasattr(got.cache, "nbytes") else tensor_bytes(got.cache)
        base, whole = reference or (got, nbytes)
        values = {
            "nbytes": nbytes,
            "ratio": whole / nbytes,
            "first_divergence": first_divergence(base.tokens, got.tokens),
            "same_tokens": sum(a == b for a, b in zip(base.tokens, got.tokens, strict=True)) / len(got.tokens),
        }
        if bench.tokenizer is not None:
            texts = [bench.tokenizer.decode(tokens) for tokens in (base.tokens, got.tokens)]
            rouge = rouge_l(*texts)
            values |= {} if rouge is None else {"rouge_l": rouge}
        return values, (got, nbytes)

    return run


def _task(bench: Bench, task: Task, seed: int) -> Run:
    sample: TaskSample = task.make(seed)
    prompt = bench.prompt(bench.model, torch.cat([sample.context, sample.questions[0].ids[:, :1]], 1))

    def run(entrant: Entrant, reference: Answered | None) -> tuple[Values, Answered]:
        with entrant.around(bench.model):
            got = answer(bench.model, sample, partial(prompt.through, entrant.make))
        base = reference or got
        values = {
            "score": got.score,
            "answer_nll": got.nll,
            "kl": divergence(base.logits, got.logits) if reference else 0.0,
            "same_answers": sum(a == b for a, b in zip(base.tokens, got.tokens, strict=True)) / len(got.tokens),
        }
        return values, got

    return run


def _speed(bench: Bench, text: str, suite: Suite, seed: int) -> Run:
    ids = bench.passages(text, 1, suite.prompt + 1)[0]

    def run(entrant: Entrant, reference: Any) -> tuple[Values, Any]:
        with entrant.around(bench.model):
            got = timed(bench.model, ids, entrant.make, suite.timed)
            peak = None
            if seed == 0:  # it does not change from one time to the next
                work = partial(decode, bench.model, ids[:, :-1], ids[:, -1:], entrant.make, PROFILED)
                peak = peak_bytes(work, bench.model.device)
        steps = {f"step_ms_p{p}": 1000 * percentile(got.step_seconds, p / 100) for p in (50, 90, 99)}
        values = {"prefill_rate": got.prefill_rate, "decode_rate": got.decode_rate, **steps}
        return values if peak is None else {**values, "peak_bytes": peak}, True

    return run


def slice_of(found: list[Unit], index: int, count: int) -> list[Unit]:
    """What process `index` of `count` does: every count-th unit, and for the first one all that measure time."""
    shared = [unit for unit in found if not unit.alone]
    return shared[index::count] + ([unit for unit in found if unit.alone] if index == 0 else [])
