"""Questions on a compressed context: asked greedily, and scored by the likelihood of the right answer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Question:
    """What is asked after the context.

    Args:
        ids: `[1, q]`.
        target: `[1, a]`, the right answer's tokens.
        score: part of the answer that is right, from the tokens that were decoded.
        new_tokens: tokens to decode.
        is_open: what comes after the right answer's tokens counts too.
    """

    ids: torch.Tensor
    target: torch.Tensor
    score: Callable[[list[int]], float]
    new_tokens: int
    is_open: bool = False


@dataclass(frozen=True)
class TaskSample:
    """One context `[1, T]` and its questions.

    Args:
        stretch: `[1, S]`, decoded between the context and the questions; may be empty.
        sequential: the questions are asked one after the other on one cache, not each on a copy of it.
    """

    context: torch.Tensor
    questions: Sequence[Question]
    stretch: torch.Tensor | None = None
    sequential: bool = False


@dataclass(frozen=True)
class Answered:
    """What one cache made of a sample; lists have one entry a question.

    score: part of the answers that are right. nll: of the right answers' tokens, in nats, mean over all of them.
    logits: `[N, V]` at the right answers' places, for later caches to compare with. tokens: the greedy answers.
    """

    score: float
    nll: float
    logits: torch.Tensor
    tokens: list[list[int]]


@torch.inference_mode()
def answer(model: Any, sample: TaskSample, make_cache: Callable[[], Any], step: int = 32) -> Answered:
    """Ask about a context that has been read.

    Args:
        make_cache: gives a cache that holds the context (`Prompt.through`).
        step: tokens of a pass while the stretch is fed; 1 is decoding.
    """
    if not sample.questions:
        raise ValueError("sample: expected at least one question, got none")
    reader = Reader(model, make_cache)
    if sample.stretch is not None:
        for part in sample.stretch.split(step, dim=1) if sample.stretch.numel() else ():
            reader.feed(part)
    scores, decoded, logits, losses = [], [], [], []
    for question in sample.questions:
        told = torch.cat([question.ids, question.target], 1)
        after = reader.fork()
        seen = after.feed(told, keep=question.target.shape[1] + 1)[0, :-1]
        target = question.target[0].to(seen.device)
        losses.append(torch.nn.functional.cross_entropy(seen.float(), target, reduction="none"))
        logits.append(seen.cpu())
        if not question.is_open and torch.equal(seen.argmax(-1), target):  # what decoding would give, in one pass
            given = target.tolist()
        else:
            after = reader if sample.sequential else reader.fork()
            given = _decode(question, after, sample.sequential)
        if sample.sequential:
            reader = after
        decoded.append(given)
        scores.append(question.score(given))
    nll = torch.cat(losses).mean().item()
    return Answered(sum(scores) / len(scores), nll, torch.cat(logits), decoded)


class Reader:
    """A model and a cache that it goes on reading through; `fork` gives another one that has read the same."""

    def __init__(self, model: Any, make_cache: Callable[[], Any]):
        self.model, self.make_cache, self.cache = model, make_cache, make_cache()
        self._passes: list[torch.Tensor] = []

    def feed(self, ids: torch.Tensor, keep: int = 1) -> torch.Tensor:
        """Logits `[1, keep, V]` of the last tokens of one pass over ids `[1, q]`."""
        self._passes.append(ids)
        only = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        ids = ids.to(self.model.device)
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **only).logits[:, -keep:]

    def fork(self) -> Reader:
        other = copy.copy(self)
        other._passes = list(self._passes)
        try:
            other.cache = copy.deepcopy(self.cache)
        except RuntimeError:  # quantized tensors of other libraries cannot be copied: read it all again
            other.cache, other._passes = self.make_cache(), []
            for ids in self._passes:
                other.feed(ids)
        return other


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL(reference || other) over positions, in nats, from `[N, V]` logits each."""
    base, own = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (base.exp() * (base - own)).sum(-1).mean().item()


def _decode(question: Question, reader: Reader, goes_on: bool) -> list[int]:
    """Greedy. If the talk goes on, the cache then holds the question and the whole answer."""
    ids = question.ids
    given: list[int] = []
    for _ in range(question.new_tokens):
        ids = reader.feed(ids)[:, -1:].argmax(-1)
        given.append(int(ids))
    if goes_on:
        reader.feed(ids)
    return given
