"""One experiment, and how a file of them is read and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..analysis.prompts import read_prompts
from ..harness.loading import DTYPES
from ..harness.specs import CacheSpec
from .lines import Fields, read_json

DEFAULT_CACHES = ("balanced", "tiny", "CPACCache")
_NAME = re.compile(r"\w[\w .-]*")

#: a text, or token ids
PromptText = str | tuple[int, ...]


@dataclass(frozen=True)
class Experiment:
    """Prompts that a model goes on with, once through each cache.

    Args:
        name: of its folder and in tables.
        prompts: texts, or lists of token ids.
        model: name or folder; "recall" is the small model of this package; None that of the demo extra.
        max_tokens: new tokens of each prompt.
        temperature: 0 takes the most likely token; above, tokens are drawn with the same noise for every cache.
        max_model_len: most tokens of a prompt and its answer; None takes what the model was made for.
        caches: specs as `kvcompress eval --cache` takes them; the uncompressed one always runs.
        seed: of the noise.
        dtype: of the model: auto, bfloat16, float16 or float32.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    name: str
    prompts: Sequence[PromptText | Sequence[int]]
    model: str | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    max_model_len: int | None = None
    caches: Sequence[str] = DEFAULT_CACHES
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            optional = name in ("model", "max_model_len") and value is None
            if not optional:
                check(name, list(value) if isinstance(value, tuple) else value)
        own = tuple(p if isinstance(p, str) else tuple(p) for p in self.prompts)
        object.__setattr__(self, "prompts", own)
        object.__setattr__(self, "caches", tuple(str(CacheSpec.parse(spec)) for spec in self.caches))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `Experiment(**found)` reads it back."""
        prompts = [p if isinstance(p, str) else list(p) for p in self.prompts]
        return {**asdict(self), "prompts": prompts, "caches": list(self.caches)}


# -- checks --------------------------------------------------------------------------------------------------------


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list | tuple) and bool(value) and all(_is_whole(token, 0) for token in value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) and one.strip() for one in value)


#: field -> what is expected, and whether a value is that
CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": (
        "letters, digits, spaces, '.', '_' or '-', a letter or digit first",
        lambda v: isinstance(v, str) and _NAME.fullmatch(v) is not None,
    ),
    "model": ("the name or folder of a model", lambda v: isinstance(v, str) and bool(v.strip())),
    "prompts": (
        "a list of one prompt or more, each a text or a list of token ids",
        lambda v: isinstance(v, list) and bool(v) and all(map(_is_prompt, v)),
    ),
    "prompts_file": ("a .txt, .json or .jsonl file", lambda v: isinstance(v, str) and bool(v.strip())),
    "max_tokens": ("a whole number of at least 2", lambda v: _is_whole(v, 2)),
    "temperature": (
        "a number of at least 0",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float("inf"),
    ),
    "max_model_len": ("a whole number of at least 1", lambda v: _is_whole(v, 1)),
    "caches": ("a list of one cache or more", _texts),
    "seed": ("a whole number of at least 0", lambda v: _is_whole(v, 0)),
    "dtype": ("auto, bfloat16, float16 or float32", lambda v: v in ("auto", *DTYPES)),
}


def check(name: str, value: Any) -> None:
    """Raise ValueError for a value that a field cannot have."""
    expected, is_right = CHECKS[name]
    if not is_right(value):
        shown = repr(value)
        raise ValueError(f"{name}: expected {expected}, got {shown if len(shown) < 60 else shown[:57] + '...'}")
    if name == "caches":
        for spec in value:
            CacheSpec.parse(spec)


# -- files ---------------------------------------------------------------------------------------------------------


def read_experiments(path: str | Path, model: str | None = None, **defaults: Any) -> list[Experiment]:
    """The experiments of a JSON file: a list of objects, or an object whose field `experiments` is one.

    Args:
        model, defaults: fields of experiments that do not have them.

    Raises:
        ValueError: a mistake, with its line and field; OSError: no such file.
    """
    path = Path(path)
    place = path.name
    found = read_json(_text(path), place)
    if isinstance(found, Mapping) and "experiments" in found:
        if len(found) > 1:
            other = next(name for name in found if name != "experiments")
            raise ValueError(f"{place}: line {found.lines[other]}, field {other!r}: expected 'experiments' alone")  # type: ignore
        found = found["experiments"]
    if not isinstance(found, list) or not found:
        got = "an empty list" if found == [] else type(found).__name__
        raise ValueError(f"{place}: line 1, field 'experiments': expected a list of one experiment or more, got {got}")
    experiments: list[Experiment] = []
    for number, one in enumerate(found, 1):
        if not isinstance(one, Fields):
            raise ValueError(f"{place}: experiment {number}: expected an object, got {type(one).__name__}")
        experiment = _experiment(one, path, {"model": model, **defaults})
        if experiment.name.lower() in {other.name.lower() for other in experiments}:  # folders of some systems
            raise ValueError(
                f"{place}: line {one.lines['name']}, field 'name': expected each once, got {one['name']!r}"
            )
        experiments.append(experiment)
    return experiments


def _experiment(given: Fields, path: Path, defaults: Mapping[str, Any]) -> Experiment:
    place = path.name
    for name, value in given.items():
        where = f"{place}: line {given.lines[name]}, field {name!r}"
        if name not in CHECKS:
            near = get_close_matches(name, CHECKS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: expected one of {', '.join(CHECKS)}{hint}")
        try:
            check(name, value)
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix(name + ': ')}") from None
    values = dict(given)
    for name in ("name", *(() if "prompts_file" in values else ("prompts",))):
        if name not in values:
            raise ValueError(
                f"{place}: line {given.line}, field {name!r}: expected it, got {', '.join(values) or 'none'}"
            )
    if "prompts_file" in values:
        file = path.parent / values.pop("prompts_file")
        if not file.is_file():
            line = given.lines["prompts_file"]
            raise ValueError(f"{place}: line {line}, field 'prompts_file': expected a file, got {str(file)!r}")
        values["prompts"] = [*values.get("prompts", ()), *(prompt.text for prompt in read_prompts(file))]
    return Experiment(**{**defaults, **values})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: expected UTF-8 text, got byte {error.start}") from None
