"""Long-context tasks for any tokenizer and length, after RULER (arXiv 2404.06654), and those of the recall model.

Each question begins a sentence that the context holds in the same form, so that models which follow no instructions
complete it. A sample follows from its seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..integrations.recall_tasks import LENGTH as RECALL_LENGTH
from ..integrations.recall_tasks import TASKS as RECALL_TASKS
from .asking import Question, TaskSample
from .words import CITIES, COLOURS, JOBS, NAMES, WORDS

#: an item stands at this part of the context, which is filled up with prose
Placed = tuple[float, str]
NUMBER = "\n\nThe magic number of {key} is {value}. Remember it: the magic number of {key} is {value}.\n\n"
ASKED = "\n\nThe magic number of {key} is"
LIST = "\n\nThe magic numbers of {key} are {value}. Remember them: the magic numbers of {key} are {value}.\n\n"
LIST_ASKED = "\n\nThe magic numbers of {key} are"


@dataclass(frozen=True)
class Draft:
    """A sample as text. `items` stand in the prose; without prose, `body` makes the context for a number of words."""

    questions: Sequence[tuple[str, Sequence[str]]]
    items: Sequence[Placed] = ()
    body: Callable[[int], str] | None = None


@dataclass(frozen=True)
class Task:
    """A task by name. `make(seed)` gives its sample; equal seeds give equal samples."""

    name: str
    make: Callable[[int], TaskSample]


def text_tasks(
    tokenizer: Any, text: str, length: int, names: Sequence[str] | None = None, device: Any = "cpu"
) -> list[Task]:
    """The tasks called `names` (default all) as contexts of `length` tokens with prose from `text`.

    Raises:
        ValueError: an unknown name, or a text shorter than the contexts.
    """
    chosen = tuple(BUILDERS) if names is None else tuple(names)
    for name in chosen:
        if name not in BUILDERS:
            raise ValueError(f"tasks: expected names among {', '.join(BUILDERS)}, got {name!r}")
    prose = tokenizer(text[: length * 24], add_special_tokens=False)["input_ids"]
    if len(prose) < length:
        raise ValueError(f"text: expected at least {length} tokens, got {len(prose)}")

    def maker(name: str) -> Callable[[int], TaskSample]:
        def make(seed: int) -> TaskSample:
            draft = BUILDERS[name](random.Random(f"{name} {seed}"))
            return _sample(name, tokenizer, prose, draft, length, device, sequential=name == "turns")

        return make

    return [Task(name, maker(name)) for name in chosen]


def recall_tasks(names: Sequence[str] | None = None, length: int = RECALL_LENGTH, device: Any = "cpu") -> list[Task]:
    """The tasks of the recall model's own language (`hf_kvcompress.integrations.recall_tasks`)."""

    def maker(name: str) -> Callable[[int], TaskSample]:
        def make(seed: int) -> TaskSample:
            found = RECALL_TASKS[name].make(seed, length)
            questions = [
                Question(ids.to(device), torch.tensor([right], device=device), _share_of(right), len(right))
                for ids, right in zip(found.questions, found.answers, strict=True)
            ]
            context, stretch = found.context.to(device), found.stretch.to(device)
            return TaskSample(context, questions, stretch, RECALL_TASKS[name].sequential)

        return make

    for name in names or ():
        if name not in RECALL_TASKS:
            raise ValueError(f"tasks: expected names among {', '.join(RECALL_TASKS)}, got {name!r}")
    return [Task(name, maker(name)) for name in names or RECALL_TASKS]


def _share_of(right: list[int]) -> Callable[[list[int]], float]:
    return lambda given: sum(g == r for g, r in zip(given, right, strict=True)) / len(right)


# -- from text to tokens -------------------------------------------------------------------------------------------


def _sample(
    name: str, tokenizer: Any, prose: list[int], draft: Draft, length: int, device: Any, sequential: bool
) -> TaskSample:
    head = tokenizer("")["input_ids"]
    ids = _woven(name, tokenizer, prose, draft.items, length - len(head))
    if draft.body is not None:
        ids = _filled(name, tokenizer, draft.body, length - len(head))
    questions = []
    for question, answers in draft.questions:
        target = _ids(tokenizer, " " + ", ".join(answers))
        asked = torch.tensor([_ids(tokenizer, question)], device=device)
        room = len(target) + (4 if len(answers) > 1 else 1)
        questions.append(Question(asked, torch.tensor([target], device=device), _finds(tokenizer, answers), room))
    return TaskSample(torch.tensor([head + ids], device=device), questions, None, sequential)


def _finds(tokenizer: Any, answers: Sequence[str]) -> Callable[[list[int]], float]:
    """Part of the answers that occur in what was decoded; tokenizers may put spaces between digits."""
    wanted = ["".join(text.split()).lower() for text in answers]

    def score(given: list[int]) -> float:
        text = "".join(tokenizer.decode(given).split()).lower()
        return sum(text.startswith(w) if len(wanted) == 1 else w in text for w in wanted) / len(wanted)

    return score


def _woven(name: str, tokenizer: Any, prose: list[int], items: Sequence[Placed], length: int) -> list[int]:
    """Exactly `length` tokens: prose with the items in it, each at the first line end after its depth."""
    pieces = [(depth, _ids(tokenizer, text)) for depth, text in sorted(items)]
    room = length - sum(len(ids) for _, ids in pieces)
    if room < 0:
        raise ValueError(f"length: expected at least {length - room} tokens for task {name!r}, got {length}")
    found: list[int] = []
    start = 0
    for depth, ids in pieces:
        at = max(start, round(depth * room))
        for ahead in range(at, min(at + 48, room)):
            if ahead and "\n" in tokenizer.decode([prose[ahead - 1]]):
                at = ahead
                break
        found += prose[start:at] + ids
        start = at
    return found + prose[start:room]


def _filled(name: str, tokenizer: Any, body: Callable[[int], str], length: int) -> list[int]:
    """The longest body of at most `length` tokens."""
    low, high = 0, length
    while low < high:  # tokens grow with the number of words
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(_ids(tokenizer, body(middle))) <= length else (low, middle - 1)
    if low < 8:
        raise ValueError(f"length: expected room for at least 8 words of task {name!r}, got {length} tokens")
    return _ids(tokenizer, body(low))


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


# -- the tasks -----------------------------------------------------------------------------------------------------


def _number(rng: random.Random) -> str:
    return "".join(rng.choices("123456789", k=5))


def _needles(rng: random.Random, count: int, asked: int) -> Draft:
    """`count` keys with a number each; `asked` of them are asked for."""
    keys, values = rng.sample(WORDS, count), [_number(rng) for _ in range(count)]
    depths = [rng.uniform(0.05, 0.85)] if count == 1 else [(i + 0.5) / count * 0.9 for i in range(count)]
    items = [(d, NUMBER.format(key=k, value=v)) for d, k, v in zip(depths, keys, values, strict=True)]
    chosen = rng.sample(range(count), asked)
    return Draft([(ASKED.format(key=keys[i]), [values[i]]) for i in chosen], items)


def _multivalue(rng: random.Random) -> Draft:
    """One key with three numbers, and another one beside it."""
    key, other = rng.sample(WORDS, 2)
    lists = {k: [_number(rng) for _ in range(3)] for k in (key, other)}
    places = zip((0.3, 0.6), rng.sample((key, other), 2), strict=True)
    items = [(d, LIST.format(key=k, value=", ".join(lists[k]))) for d, k in places]
    return Draft([(LIST_ASKED.format(key=key), lists[key])], items)


def _tracking(rng: random.Random) -> Draft:
    """A number goes from name to name; the last one's value is asked for. Another chain runs beside it."""
    names = rng.sample(NAMES, 6)
    items = []
    values = [_number(rng), _number(rng)]
    for chain, value in zip((names[:3], names[3:]), values, strict=True):
        depth = rng.uniform(0.05, 0.2)
        items.append((depth, f"\n\nThe number of {chain[0]} is {value}.\n\n"))
        for before, after in zip(chain, chain[1:], strict=False):
            depth += rng.uniform(0.1, 0.3)
            told = f"\n\n{after} got the number of {before}: the number of {after} is the number of {before}.\n\n"
            items.append((min(depth, 0.9), told))
    return Draft([(f"\n\nSo the number of {names[2]} is", [values[0]])], items)


def _common(rng: random.Random) -> Draft:
    """A list in which one word comes far more often than any other."""
    words = rng.sample(WORDS, 60)

    def body(count: int) -> str:
        own = random.Random(words[0])
        listed = [words[0] if i % 3 == 0 else own.choice(words[1:]) for i in range(count)]
        return "\n\nA list of words: " + ", ".join(listed) + "."

    return Draft([("\n\nThe word that comes most often in the list is", [words[0]])], body=body)


def _frequent(rng: random.Random) -> Draft:
    """Made-up words, the more seldom the later in their order (Zipf); the three first ones are asked for."""
    letters = "bdfgklmnprstvz"
    made = list({"".join(rng.choice(letters) + rng.choice("aeiou") for _ in range(3)) for _ in range(40)})
    made.sort()
    rng.shuffle(made)

    def body(count: int) -> str:
        own = random.Random(made[0])
        drawn = own.choices(made, [(i + 1) ** -2.0 for i in range(len(made))], k=count)
        return "\n\nA text in code: " + " ".join([*made[:3], *drawn]) + "."

    return Draft([("\n\nThe three words that come most often in the text are", made[:3])], body=body)


def _qa(rng: random.Random) -> Draft:
    """Questions on one of many people, each described in a paragraph."""
    names = rng.sample(NAMES, 8)
    cities, jobs, colours = rng.sample(CITIES, 8), rng.sample(JOBS, 8), rng.sample(COLOURS, 8)
    items = []
    for index, (name, city, job, colour) in enumerate(zip(names, cities, jobs, colours, strict=True)):
        told = f"\n\n{name} was born in {city}. {name} works as a {job}. The house of {name} is {colour}.\n\n"
        items.append(((index + 0.5) / len(names) * 0.95, told))
    who = rng.randrange(8)
    asked = rng.choice([("was born in", cities), ("works as a", jobs)])
    return Draft([(f"\n\nTo sum up, {names[who]} {asked[0]}", [asked[1][who]])], items)


BUILDERS: dict[str, Callable[[random.Random], Draft]] = {
    "needle": lambda rng: _needles(rng, 1, 1),
    "needle-multikey": lambda rng: _needles(rng, 4, 1),
    "needle-multivalue": _multivalue,
    "needle-multiquery": lambda rng: _needles(rng, 4, 4),
    "tracking": _tracking,
    "common-words": _common,
    "frequent-words": _frequent,
    "qa": _qa,
    "turns": lambda rng: _needles(rng, 3, 2),
}
