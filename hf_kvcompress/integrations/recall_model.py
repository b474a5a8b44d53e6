"""A small model with four KV heads that looks things up, and tasks on it that tell cache policies apart.

The model is a Llama of 0.6 million parameters, trained from scratch by `eval/train_recall_model.py` on the synthetic
language of `recall_tasks`. With the full cache it answers nearly every question, so what a policy loses is the
policy's doing. It runs in seconds on one CPU core.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hf_kvcompress.integrations.recall_tasks import LENGTH, RecallTask, Sample

#: weights and config, shipped with the package
FOLDER = Path(__file__).parent / "recall_data"


def load_recall_model(folder: str | Path = FOLDER) -> Any:
    """The committed model in float32 and evaluation mode.

    Args:
        folder: where `model.safetensors` and `config.json` are.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def recall(
    model: Any,
    make_cache: Callable[[], Any],
    task: RecallTask,
    seeds: Iterable[int],
    length: int = LENGTH,
    step: int = 1,
) -> float:
    """Share of answer tokens that the model gets right from a cache, decoding greedily.

    The context is prefilled in one go, before any question is seen. Independent questions are asked on copies of the
    cache; a task with `sequential` asks them one after the other on the same one.

    Args:
        make_cache: returns an empty cache.
        seeds: one context each.
        length: tokens before the first question.
        step: tokens of a forward while a stretch (see `Sample`) is fed; 1 is decoding.
    """
    right = total = 0
    for seed in seeds:
        sample = task.make(seed, length)
        cache = prefill(model, make_cache(), sample, step)
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            given = ask(model, cache if task.sequential else copy.deepcopy(cache), question, len(answer))
            right += sum(g == a for g, a in zip(given, answer, strict=True))
            total += len(answer)
    if not total:
        raise ValueError("seeds must name at least one context, got none")
    return right / total


@torch.no_grad()
def prefill(model: Any, cache: Any, sample: Sample, step: int = 1) -> Any:
    """Feeds a sample's context in one go and its stretch in steps; returns the cache."""
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    device = model.device
    model(sample.context.to(device), past_key_values=cache, logits_to_keep=1)
    for part in sample.stretch.split(step, dim=1) if sample.stretch.numel() else ():
        model(part.to(device), past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def ask(model: Any, cache: Any, question: torch.Tensor, tokens: int) -> list[int]:
    """Feeds a question and decodes its answer greedily. The cache then holds both."""
    given: list[int] = []
    ids = question.to(model.device)
    for _ in range(tokens):
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        given.append(int(ids))
    model(ids, past_key_values=cache, logits_to_keep=1)  # the last answer is part of the talk, too
    return given
