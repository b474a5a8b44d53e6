"""The language of the recall model: token ids, and a generator for each task.

A context is a walk through *filler* with *pairs* woven in. A pair is three tokens, `book key value`. A question is
`ASK book key`, the answer is the value. There is no tokenizer: a sequence is made of the ids below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

BOS, ASK, SEE, WHICH = 1, 2, 3, 12
RULES = range(4, 8)
BOOKS = range(8, 12)
FILLER = range(16, 48)
KEYS = range(48, 240)
VALUES = range(240, 304)
VOCABULARY = 304
#: context tokens that the model was trained for; questions come on top
LENGTH = 512
#: evaluation uses the seeds below this, training those from it on
FIRST_TRAINING_SEED = 1_000_000

Random = np.random.Generator
#: tokens, and what is known among them, by offset
Item = tuple[list[int], dict[int, int]]


@dataclass(frozen=True)
class Sample:
    """One context and its questions.

    Attributes:
        context: `[1, T]`, prefilled in one go.
        questions: `[1, q]` each, asked after the context and the stretch.
        answers: token ids of each answer.
        stretch: `[1, S]`, decoded between context and questions; mostly empty.
        hints: what the model can know already inside the context, by position. Only training uses it.
    """

    context: torch.Tensor
    questions: list[torch.Tensor]
    answers: list[list[int]]
    stretch: torch.Tensor
    hints: dict[int, int] = field(default_factory=dict)


@dataclass
class Draft:
    """A sample before it becomes tensors. `items` come in order, with filler between them."""

    items: list[Item]
    questions: list[list[int]]
    answers: list[list[int]]
    head: list[int] = field(default_factory=lambda: [BOS])
    stretch: int = 0


Builder = Callable[[Random, int, int], Draft]


@dataclass(frozen=True)
class RecallTask:
    """A task: makes samples from seeds.

    Attributes:
        name: as in tables.
        build: draws pairs and questions for a length.
        questions: how many a sample has.
        sequential: ask them one after the other on one cache, not each on a copy.
    """

    name: str
    build: Builder
    questions: int = 8
    sequential: bool = False

    def make(self, seed: int, length: int = LENGTH, questions: int | None = None) -> Sample:
        """The sample of a seed. Equal arguments give equal samples.

        Args:
            length: tokens before the first question, the stretch included.
            questions: overrides the task's number.
        """
        if length < 32:
            raise ValueError(f"length must be at least 32, got {length}")
        rng = np.random.default_rng([seed, length])
        draft = self.build(rng, length, self.questions if questions is None else questions)
        ids, hints = _weave(rng, draft, length - draft.stretch)
        stretch = _walk(rng, draft.stretch)
        return Sample(
            torch.tensor([ids]),
            [torch.tensor([question]) for question in draft.questions],
            draft.answers,
            torch.tensor([stretch], dtype=torch.long),
            hints,
        )


@cache
def _successors() -> list[list[int]]:
    """Four filler tokens that may follow each filler token; the first is the likeliest."""
    rng = np.random.default_rng(7)
    return [[FILLER[int(i)] for i in rng.choice(len(FILLER), 4, replace=False)] for _ in FILLER]


def _walk(rng: Random, length: int) -> list[int]:
    """Filler: a Markov chain of low entropy."""
    if not length:
        return []
    table, token = _successors(), FILLER[int(rng.integers(len(FILLER)))]
    walk = []
    for choice in np.searchsorted([0.7, 0.85, 0.95], rng.random(length)).tolist():
        token = table[token - FILLER.start][choice]
        walk.append(token)
    return walk


def _weave(rng: Random, draft: Draft, length: int) -> tuple[list[int], dict[int, int]]:
    """Spreads a draft's items, in order, over filler."""
    spare = length - len(draft.head) - sum(len(tokens) for tokens, _ in draft.items)
    if spare < 0:
        raise ValueError(f"items must fit {length} tokens, got {-spare} too many")
    cuts = np.sort(rng.integers(0, spare + 1, len(draft.items))).tolist()
    filler = _walk(rng, spare)
    ids, hints, start = list(draft.head), {}, 0
    for (tokens, known), cut in zip(draft.items, cuts, strict=True):
        ids += filler[start:cut]
        hints.update({len(ids) + offset: token for offset, token in known.items()})
        ids += tokens
        start = cut
    return ids + filler[start:], hints


def _pick(rng: Random, tokens: range, count: int) -> list[int]:
    """`count` different tokens."""
    return (rng.choice(len(tokens), count, replace=False) + tokens.start).tolist()


def _draw(rng: Random, tokens: range, count: int) -> list[int]:
    """`count` tokens, repeats allowed."""
    return rng.integers(tokens.start, tokens.stop, count).tolist()


def _pairs(rng: Random, count: int) -> list[list[int]]:
    """Pairs with different keys."""
    columns = _draw(rng, BOOKS, count), _pick(rng, KEYS, count), _draw(rng, VALUES, count)
    return [list(pair) for pair in zip(*columns, strict=True)]


def _asked(rng: Random, pairs: list[list[int]], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Questions and answers on pairs drawn without replacement, as far as they go."""
    order = [int(i) for _ in range(-(-count // len(pairs))) for i in rng.permutation(len(pairs))][:count]
    return [[ASK, *pairs[i][:2]] for i in order], [[pairs[i][2]] for i in order]


def _plain(items: list[list[int]]) -> list[Item]:
    return [(item, {}) for item in items]


def _spread(share: float) -> Builder:
    """Pairs with different keys that fill a share of the context."""

    def build(rng: Random, length: int, questions: int) -> Draft:
        pairs = _pairs(rng, min(len(KEYS), max(1, int((length - 1) * share / 3))))
        return Draft(_plain(pairs), *_asked(rng, pairs, questions))

    return build


def _near(rng: Random, length: int, questions: int) -> Draft:
    """Every key stands in all four books: only the book tells the values apart."""
    keys = _pick(rng, KEYS, max(1, length // 24))
    pairs = [[book, key, *_draw(rng, VALUES, 1)] for key in keys for book in BOOKS]
    rng.shuffle(pairs)
    return Draft(_plain(pairs), *_asked(rng, pairs, questions))


def _rule(rng: Random, length: int, questions: int) -> Draft:
    """The second token says which book counts. `ASK WHICH` makes the model name it, then a key is asked for in it."""
    keys = _pick(rng, KEYS, max(1, length // 24))
    rule, *others = _pick(rng, BOOKS, len(BOOKS))
    pairs, decoys = ([[book, key, *_draw(rng, VALUES, 1)] for key in keys] for book in (rule, others[0]))
    items = pairs + decoys
    rng.shuffle(items)
    asked, answers = [], []
    for (_, *question), answer in zip(*_asked(rng, pairs, -(-questions // 2)), strict=True):
        asked += [[ASK, WHICH], question[1:]]
        answers += [[rule], answer]
    return Draft(_plain(items), asked[:questions], answers[:questions], head=[BOS, RULES[rule - BOOKS.start]])


def _blocks(rng: Random, length: int, questions: int) -> Draft:
    """Blocks that come again and again between pairs that come once. Half of the questions continue a block."""
    size = min(24, max(6, length // 20))
    count = max(1, min(3, length // 128))
    repeats = max(2, min(4, length // (2 * count * size)))
    pairs = _pairs(rng, max(1, length // 32))
    taken = {key for _, key, _ in pairs}
    free = [key for key in rng.permutation(KEYS).tolist() if key not in taken]
    blocks = [free[i * size : (i + 1) * size] for i in range(count)]
    items: list[Item] = []
    seen = set()
    for i in rng.permutation(count * repeats + len(pairs)).tolist():
        if i >= count * repeats:
            items.append((pairs[i - count * repeats], {}))
            continue
        block = blocks[i % count]
        items.append((block, dict(enumerate(block[1:])) if i % count in seen else {}))
        seen.add(i % count)
    asked, answers = _asked(rng, pairs, questions - questions // 2)
    for i in range(questions // 2):
        start = int(rng.integers(0, size - 5))
        block = blocks[i % count]
        asked.append(block[start : start + 2])
        answers.append(block[start + 2 : start + 6])
    return Draft(items, asked, answers)


def _mentioned(rng: Random, length: int, questions: int) -> Draft:
    """Some keys are mentioned again, without their value. Only those are asked for."""
    pairs = _pairs(rng, max(4, length // 20))
    hot = pairs[: max(2, len(pairs) // 4)]
    events: list[tuple[float, Item]] = []
    for pair in pairs:
        times = sorted(rng.random(3 if pair in hot else 1).tolist())
        events.append((times[0], (pair, {})))
        events += [(time, ([SEE, *pair[:2]], {2: pair[2]})) for time in times[1:]]
    events.sort(key=lambda event: event[0])
    return Draft([item for _, item in events], *_asked(rng, hot, questions))


def _dormant(rng: Random, length: int, questions: int) -> Draft:
    """The pairs come early; then filler is decoded for as long as the context was."""
    pairs = _pairs(rng, max(1, length // 24))
    return Draft(_plain(pairs), *_asked(rng, pairs, questions), stretch=length // 2)


def needle(depth: float | None = None) -> RecallTask:
    """One pair in filler, at a depth from 0 to 1; without one, anywhere."""

    def build(rng: Random, length: int, questions: int) -> Draft:
        pairs = _pairs(rng, 1)
        at = rng.random() if depth is None else depth
        lead = _walk(rng, int(at * (length - 4)))
        tail = _walk(rng, length - 4 - len(lead))
        return Draft(_plain([lead + pairs[0] + tail]), *_asked(rng, pairs, questions))

    return RecallTask("needle" if depth is None else f"needle@{depth:g}", build, questions=1)


#: by name, in the order of tables
TASKS: dict[str, RecallTask] = {
    task.name: task
    for task in (
        needle(),
        RecallTask("dense", _spread(1.0)),
        RecallTask("filler", _spread(0.125)),
        RecallTask("turns", _spread(0.25), sequential=True),
        RecallTask("mentioned", _mentioned),
        RecallTask("blocks", _blocks),
        RecallTask("near", _near),
        RecallTask("rule", _rule, sequential=True),
        RecallTask("dormant", _dormant),
    )
}
