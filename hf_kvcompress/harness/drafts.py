"""What the text tasks ask: sentences, lists and questions, before they become tokens.

After RULER (arXiv 2404.06654), and after what tells cache policies apart: dense pairs, keys that are nearly alike, a
rule at the start, blocks that repeat, and a fact that is asked for long after.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

from .words import CITIES, COLOURS, JOBS, NAMES, WORDS

#: an item stands at this part of the context, which is filled up with prose
Placed = tuple[float, str]
NUMBER = "\n\nThe magic number of {key} is {value}. Remember it: the magic number of {key} is {value}.\n\n"
ASKED = "\n\nThe magic number of {key} is"
LIST = "\n\nThe magic numbers of {key} are {value}. Remember them: the magic numbers of {key} are {value}.\n\n"
LIST_ASKED = "\n\nThe magic numbers of {key} are"


@dataclass(frozen=True)
class Draft:
    """A sample as text.

    Args:
        questions: each with the answers that count as right.
        items: stand in the prose.
        body: makes the context for a number of words, without prose.
        sequential: the questions are asked one after the other on one cache.
        stretch: this part of the context is decoded as prose before the questions.
    """

    questions: Sequence[tuple[str, Sequence[str]]]
    items: Sequence[Placed] = ()
    body: Callable[[int], str] | None = None
    sequential: bool = False
    stretch: float = 0.0


def _number(rng: random.Random) -> str:
    return "".join(rng.choices("123456789", k=5))


def _of_keys(rng: random.Random, keys: Sequence[str], asked: int, **others: Any) -> Draft:
    """Keys with a number each, evenly spread over the first nine tenths; `asked` of them are asked for."""
    values = [_number(rng) for _ in keys]
    told = [NUMBER.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    items = [((index + 0.5) / len(keys) * 0.9, text) for index, text in enumerate(told)]
    chosen = rng.sample(range(len(keys)), asked)
    return Draft([(ASKED.format(key=keys[i]), [values[i]]) for i in chosen], items, **others)


def _needles(rng: random.Random, count: int, asked: int, **others: Any) -> Draft:
    return _of_keys(rng, rng.sample(WORDS, count), asked, **others)


def needle(rng: random.Random, depth: float | None = None, stretch: float = 0.0) -> Draft:
    """One number, at a depth from 0 to 1 of the context; without one, anywhere in its first 85 %."""
    key, value = rng.choice(WORDS), _number(rng)
    at = rng.uniform(0.05, 0.85) if depth is None else depth
    return Draft([(ASKED.format(key=key), [value])], [(at, NUMBER.format(key=key, value=value))], stretch=stretch)


def _near(rng: random.Random) -> Draft:
    """Keys that differ from others in one word only, side by side in one list."""
    words, colours = rng.sample(WORDS, 6), rng.sample(COLOURS, 2)
    told = [(f"{colour} {word}", _number(rng)) for word in words for colour in colours]
    key, value = rng.choice(told)
    listed = "".join(f"{k}: {v}\n" for k, v in told)
    return Draft([(f"\n{key}:", [value])], [(rng.uniform(0.05, 0.6), f"\n\n{listed}\n")])


def _pairs(rng: random.Random) -> Draft:
    """Nothing but pairs: no token is filler, so what is dropped is lost."""
    firsts, seconds = rng.sample(WORDS, 80), rng.sample(WORDS, 80)
    keys = [f"{a} {b}" for a in firsts for b in seconds]
    rng.shuffle(keys)
    depth, (key, *others), value = rng.uniform(0.05, 0.85), keys, _number(rng)
    told = [f"{other}: {_number(rng)}" for other in others]

    def body(count: int) -> str:
        at = round(depth * count)
        return "\n" + "\n".join([*told[:at], f"{key}: {value}", *told[at : count - 1]]) + "\n"

    return Draft([(f"{key}:", [value])], body=body)


def _rule(rng: random.Random) -> Draft:
    """The first sentence says which numbers count. It is asked for, then a number of that kind."""
    (right, other), keys = rng.sample(COLOURS, 2), rng.sample(WORDS, 2)
    sentence = "The {colour} number of {key} is {value}."
    items: list[Placed] = [
        (0.0, f"Rule: only the {right} numbers count. Remember: only the {right} numbers count.\n\n")
    ]
    answers = {}
    for index, (key, colour) in enumerate((k, c) for k in keys for c in rng.sample((right, other), 2)):
        answers[key, colour] = _number(rng)
        told = sentence.format(colour=colour, key=key, value=answers[key, colour])
        items.append((0.1 + 0.2 * index, f"\n\n{told} Remember it: {told[0].lower()}{told[1:]}\n\n"))
    asked = f"\n\nThe {right} number of {keys[0]} is"
    return Draft([("\n\nRule: only the", [right]), (asked, [answers[keys[0], right]])], items, sequential=True)


def _blocks(rng: random.Random) -> Draft:
    """Notices that come again and again around a number that comes once: one is continued, the number asked for."""
    words, value = rng.sample(WORDS, 13), _number(rng)
    notices, key = (words[:6], words[6:12]), words[12]
    items = [((i + 0.5) / 8 * 0.9, f"\n\nNotice {i % 2 + 1}: {' '.join(notices[i % 2])}.\n\n") for i in range(8)]
    items.append((0.4, NUMBER.format(key=key, value=value)))
    which = rng.randrange(2)
    asked = f"\n\nNotice {which + 1}: {' '.join(notices[which][:3])}"
    return Draft([(asked, [" ".join(notices[which][3:])]), (ASKED.format(key=key), [value])], items)


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


#: by name, in the order of tables
BUILDERS: dict[str, Callable[[random.Random], Draft]] = {
    "needle": needle,
    "needle-multikey": partial(_needles, count=4, asked=1),
    "needle-multivalue": _multivalue,
    "needle-multiquery": partial(_needles, count=4, asked=4),
    "tracking": _tracking,
    "common-words": _common,
    "frequent-words": _frequent,
    "qa": _qa,
    "turns": partial(_needles, count=3, asked=2, sequential=True),
    "pairs": _pairs,
    "near": _near,
    "rule": _rule,
    "blocks": _blocks,
    "dormant": partial(needle, stretch=0.25),
}
AT = "needle@"


def builder(name: str) -> Callable[[random.Random], Draft]:
    """By name; `needle@0.3` is a needle at that depth. Raises ValueError for an unknown name."""
    if name in BUILDERS:
        return BUILDERS[name]
    depth = depth_of(name)
    if depth is None:
        near = get_close_matches(name, BUILDERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"tasks: expected names among {', '.join(BUILDERS)} or {AT}DEPTH, got {name!r}{hint}")
    return partial(needle, depth=depth)


def depth_of(name: str) -> float | None:
    """The depth in `needle@0.3`; None for another name."""
    try:
        depth = float(name.removeprefix(AT)) if name.startswith(AT) else -1.0
    except ValueError:
        return None
    return depth if 0.0 <= depth <= 1.0 else None
