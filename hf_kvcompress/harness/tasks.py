"""Long-context tasks for any tokenizer and length, and those of the recall model.

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
from ..integrations.recall_tasks import RecallTask
from ..integrations.recall_tasks import needle as recall_needle
from .asking import Question, TaskSample
from .drafts import BUILDERS, Draft, Placed, builder, depth_of


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
    builders = {name: builder(name) for name in (BUILDERS if names is None else names)}
    prose = tokenizer(text[: length * 24], add_special_tokens=False)["input_ids"]
    if len(prose) < length:
        raise ValueError(f"text: expected at least {length} tokens, got {len(prose)}")

    def maker(name: str) -> Callable[[int], TaskSample]:
        def make(seed: int) -> TaskSample:
            draft = builders[name](random.Random(f"{name} {seed}"))
            return _sample(name, tokenizer, prose, draft, length, device)

        return make

    return [Task(name, maker(name)) for name in builders]


def recall_tasks(names: Sequence[str] | None = None, length: int = RECALL_LENGTH, device: Any = "cpu") -> list[Task]:
    """The tasks of the recall model's own language (`hf_kvcompress.integrations.recall_tasks`)."""

    tasks = {name: _recall_task(name) for name in (RECALL_TASKS if names is None else names)}

    def maker(name: str) -> Callable[[int], TaskSample]:
        def make(seed: int) -> TaskSample:
            found = tasks[name].make(seed, length)
            questions = [
                Question(ids.to(device), torch.tensor([right], device=device), _share_of(right), len(right))
                for ids, right in zip(found.questions, found.answers, strict=True)
            ]
            context, stretch = found.context.to(device), found.stretch.to(device)
            return TaskSample(context, questions, stretch, tasks[name].sequential)

        return make

    return [Task(name, maker(name)) for name in tasks]


def _recall_task(name: str) -> RecallTask:
    if name in RECALL_TASKS:
        return RECALL_TASKS[name]
    depth = depth_of(name)
    if depth is None:
        raise ValueError(f"tasks: expected names among {', '.join(RECALL_TASKS)} or needle@DEPTH, got {name!r}")
    return recall_needle(depth)


def _share_of(right: list[int]) -> Callable[[list[int]], float]:
    return lambda given: sum(g == r for g, r in zip(given, right, strict=True)) / len(right)


# -- from text to tokens -------------------------------------------------------------------------------------------


def _sample(name: str, tokenizer: Any, prose: list[int], draft: Draft, length: int, device: Any) -> TaskSample:
    head = tokenizer("")["input_ids"]
    stretch = round(draft.stretch * length)
    room = length - stretch - len(head)
    if draft.body is not None:
        ids = _filled(name, tokenizer, draft.body, room)
    else:
        ids = _woven(name, tokenizer, prose, draft.items, room)
    questions = []
    for question, answers in draft.questions:
        target = _ids(tokenizer, " " + ", ".join(answers))
        asked = torch.tensor([_ids(tokenizer, question)], device=device)
        new_tokens = len(target) + (4 if len(answers) > 1 else 1)
        right = _finds(tokenizer, answers)
        questions.append(Question(asked, torch.tensor([target], device=device), right, new_tokens))
    context, later = (torch.tensor([part], device=device) for part in (head + ids, prose[length - stretch : length]))
    return TaskSample(context, questions, later if stretch else None, draft.sequential)


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
        for ahead in range(at, min(at + 48, room) if depth else 0):  # what is to stand first stands first
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
