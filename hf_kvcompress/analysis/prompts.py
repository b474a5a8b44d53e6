"""Prompts to look at: from a file of the user, or a mixed set that is always there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..integrations.recall_tasks import TASKS
from ..scoring import read_text, standard_text

SUFFIXES = (".txt", ".json", ".jsonl")
_PAGE_OF_TEXT = 3000  # characters


@dataclass(frozen=True)
class Prompt:
    """A text, or token ids `[1, T]`, with a name for tables."""

    name: str
    text: str | torch.Tensor


def read_prompts(path: str | Path, whole: bool = False) -> list[Prompt]:
    """Prompts of a file.

    .txt: one a line, empty lines left out, or with `whole` the file as one document; .json: a list of strings or of
    objects with a field `prompt` (and, if you like, `name`); .jsonl: one of these a line.

    Raises:
        ValueError: another kind of file, text that is not UTF-8 or no JSON, or an entry without a prompt, with its
            line and field; OSError: no such file.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"prompts-file: expected a file that ends in {', '.join(SUFFIXES)}, got {path.name!r}")
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts-file: expected UTF-8 text in {path.name!r}, got byte {error.start}") from None
    if path.suffix == ".txt" and whole:
        found: list[tuple[str, Any]] = [(path.name, text)]
    elif path.suffix == ".json":
        found = [(f"{path.name}, entry {i}", entry) for i, entry in enumerate(_list(path.name, text), 1)]
    else:
        lines = [(f"{path.name}, line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        found = [(place, line if path.suffix == ".txt" else _json(place, line)) for place, line in lines]
    prompts = [_prompt(place, number, entry) for number, (place, entry) in enumerate(found, 1)]
    if not prompts:
        raise ValueError(f"prompts-file: expected at least one prompt in {path.name!r}, got none")
    return prompts


def as_prompts(given: Sequence[str | torch.Tensor | Prompt]) -> list[Prompt]:
    """What a caller gave, each with a name. Raises ValueError for none, or an empty one."""
    if isinstance(given, str | torch.Tensor | Prompt) or not isinstance(given, Sequence) or not given:
        raise ValueError(f"prompts: expected a list of one prompt or more, got {type(given).__name__} {_short(given)}")
    return [_prompt(f"prompt {number}", number, entry) for number, entry in enumerate(given, 1)]


def default_prompts(tokenizer: Any) -> list[Prompt]:
    """Two passages of prose, two of code, three letters of one template and a document that comes twice.

    All of it from the standard library, so nothing is fetched; without a tokenizer it is the recall model's language.
    """
    if tokenizer is None:
        ids = TASKS["dense"].make(0, 320).context
        repeated = torch.cat([ids, TASKS["filler"].make(1, 45).context, ids[:, 1:]], dim=1)
        return [Prompt("facts", ids), Prompt("filler", TASKS["filler"].make(2, 320).context), Prompt("twice", repeated)]
    prose, code = standard_text("prose"), standard_text("code")
    size = _PAGE_OF_TEXT
    document = prose[8 * size : 9 * size]
    prompts = [Prompt(f"prose {i + 1}", prose[4 * i * size : (4 * i + 1) * size]) for i in range(2)]
    prompts += [Prompt(f"code {i + 1}", code[8 * i * size : (8 * i + 1) * size]) for i in range(2)]
    for number, (name, topic, request) in enumerate(_REQUESTS, 1):
        prompts.append(Prompt(f"template {number}", _TEMPLATE.format(name=name, topic=topic, request=request)))
    twice = f"{document}\n\nThe section again, for reference:\n\n{document}"
    return [*prompts, Prompt("repeated document", twice)]


def _list(name: str, text: str) -> list[Any]:
    entries = _json(name, text)
    if not isinstance(entries, list):
        raise ValueError(f"prompts-file: expected a list in {name!r}, got {type(entries).__name__}")
    return entries


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "line" not in place else ""
        raise ValueError(f"prompts-file: expected JSON in {place}, {line}column {error.colno}: {error.msg}") from None


def _prompt(place: str, number: int, entry: Any) -> Prompt:
    """One checked prompt."""
    if isinstance(entry, Prompt):
        return Prompt(entry.name, _prompt(place, number, entry.text).text)
    name = f"prompt {number}"
    if isinstance(entry, Mapping):
        if "prompt" not in entry:
            got = ", ".join(map(str, entry)) or "none"
            raise ValueError(f"{place}: expected a field 'prompt', got the fields {got}")
        if not isinstance(entry["prompt"], str):
            raise ValueError(f"{place}, field 'prompt': expected a string, got {type(entry['prompt']).__name__}")
        if "name" in entry and not isinstance(entry["name"], str):
            raise ValueError(f"{place}, field 'name': expected a string, got {type(entry['name']).__name__}")
        name, entry = entry.get("name", name), entry["prompt"]
    if isinstance(entry, torch.Tensor):
        if entry.ndim != 2 or entry.shape[0] != 1 or not entry.shape[1] or entry.is_floating_point():
            raise ValueError(f"{place}: expected token ids [1, T], got {list(entry.shape)} {entry.dtype}")
        return Prompt(name, entry)
    if not isinstance(entry, str):
        raise ValueError(f"{place}: expected a string or an object with 'prompt', got {type(entry).__name__}")
    if not entry.strip():
        raise ValueError(f"{place}: expected a prompt, got an empty one")
    return Prompt(name, entry)


def _short(given: object) -> str:
    text = repr(given)
    return text if len(text) < 40 else text[:37] + "..."


_TEMPLATE = """You answer letters to a public library. Be brief, be kind, and follow the rules of the house.

Rules of the house
1. Books are lent for four weeks. They can be renewed twice, unless somebody else has asked for them.
2. A book that is late costs twenty cents a day, at most the price of the book. Children pay nothing.
3. Whoever loses a book replaces it, or pays what a new copy costs and three euros for the label and the entry.
4. The reading room is open from nine to eight, on Saturdays until five. On Sundays only the garden is open.
5. Interlibrary loans take about ten days and cost two euros; for pupils and students the library pays.
6. Rooms for groups of up to twelve can be had for two hours. They are booked at the desk, in person or by telephone.
7. Food stays outside; water in closed bottles may come in. Telephones are silent in all rooms but the hall.
8. Complaints go to the head librarian, who answers within a week and in writing.

Examples
Letter: Good morning, I have had a novel for three weeks and am not done with it. May I keep it longer?
Answer: Of course. We have renewed it for four weeks, and once more after that if nobody waits for it.
Letter: My daughter spilled tea over a picture book. It can still be read. What do we do?
Answer: Thank you for telling us. Bring it to the desk; if pages stick together we replace it, else it stays in use.
Letter: Can our choir meet in the library on Sunday?
Answer: Not in the rooms, which are closed on Sundays, but the garden is open and has a roof by the east wall.

Now answer this letter. It comes from {name} and is about {topic}.
Letter: {request}
Answer:"""
_REQUESTS = (
    (
        "Mrs Adler",
        "a lost book",
        "I cannot find the atlas that I borrowed in March, and I have looked in every room. What does it cost me?",
    ),
    (
        "a pupil called Ben",
        "an interlibrary loan",
        "For school I need a book on bridges that you do not have. Can you get it, how long does it take, who pays?",
    ),
    (
        "Dr Okafor",
        "a room for a reading group",
        "Ten of us would like to talk about a play every other Thursday evening. How do we book, and may we bring tea?",
    ),
)
