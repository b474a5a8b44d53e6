"""The experiments that are always there: general, repetitive, code."""

from __future__ import annotations

from typing import Any

from ..analysis.prompts import default_prompts
from ..harness.loading import RECALL
from ..integrations.recall_tasks import TASKS
from .experiment import Experiment

#: sizes of a quick test: characters of a prompt, prompts, new tokens
QUICK_CHARACTERS, QUICK_PROMPTS, QUICK_TOKENS = 1200, 1, 16


def builtin_experiments(model: str | None = None, quick: bool = False, **settings: Any) -> list[Experiment]:
    """general (prose), repetitive (letters of one template, a document that comes twice) and code.

    Texts come from the standard library of Python. The recall model has a language of its own instead, in which filler
    with facts stands for prose, a context that comes twice for repetition, and sequences that follow a rule for code.

    Args:
        quick: shorter prompts, fewer of them, fewer new tokens.
        settings: other fields of every experiment.
    """
    prompts = _recall() if model == RECALL else _texts(quick)
    settings = {"max_tokens": QUICK_TOKENS} | settings if quick else settings
    return [
        Experiment(name, own[: QUICK_PROMPTS if quick else None], model=model, **settings)
        for name, own in prompts.items()
    ]


def _texts(quick: bool) -> dict[str, list[Any]]:
    texts = {prompt.name: prompt.text for prompt in default_prompts("any")}
    letters = "\n\n".join(str(text) for name, text in texts.items() if name.startswith("template"))
    groups = {
        "general": [texts["prose 1"], texts["prose 2"]],
        "repetitive": [letters, texts["repeated document"]],
        "code": [texts["code 1"], texts["code 2"]],
    }
    if not quick:
        return groups
    half = str(groups["general"][0])[: QUICK_CHARACTERS // 2]
    return {
        name: [f"{half}\n\n{half}"] if name == "repetitive" else [str(text)[:QUICK_CHARACTERS] for text in own]
        for name, own in groups.items()
    }


def _recall() -> dict[str, list[Any]]:
    def ids(task: str, seed: int, length: int) -> list[int]:
        return list(TASKS[task].make(seed, length).context[0].tolist())

    once = ids("dense", 2, 256)
    return {
        "general": [ids("filler", 0, 512), ids("dense", 1, 512)],
        "repetitive": [once + once[1:]],
        "code": [ids("rule", 3, 512)],
    }
