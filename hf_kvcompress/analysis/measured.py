"""What caches cost and save on the prompts themselves: run, not estimated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..cpac import CPACCache
from ..harness.loading import scoring_copy
from ..harness.specs import BASELINE, CacheSpec, Entrant
from ..measure import tensor_bytes
from ..scoring import Score, score
from ..scoring.replay import Prompt as ReadPrompt
from .capture import Captured

PRESETS = ("near-lossless", "balanced", "small", "tiny")
SCORED = 128  # tokens of a prompt that are scored, or a quarter of it
LEAST = 160  # tokens: shorter ones have next to nothing packed
ROWS = 8
LONGEST_ROW = 1024
ROW_SCORED = 32
OnStep = Callable[[str], None]


def cpac(threshold: float, rotated: bool) -> CacheSpec:
    """`CPACCache` with a threshold; `rotated` for models whose rotation is not known."""
    return CacheSpec("CPACCache", {"similarity_threshold": threshold, **({"frame": "rotated"} if rotated else {})})


def measure_alone(
    model: Any, captured: Captured, specs: Sequence[CacheSpec], prompts: int, on_step: OnStep
) -> list[dict[str, Any]]:
    """Each prompt in a cache of its own: `prompts` of them, the last tokens of each scored behind the others.

    Perplexity and KL by `scoring.score`, in float32 where the model is small enough; bytes in the model's own dtype,
    against a `DynamicCache` at the same place. Rows are JSON-ready; none if all prompts are shorter than 160 tokens.
    """
    texts = _chosen(captured, prompts)
    if not texts:
        return []
    scoring_model = scoring_copy(model)
    entrants = _entrants(model, specs)
    scores: list[list[Score]] = [[] for _ in entrants]
    nbytes = [0] * len(entrants)
    shared: list[list[float | None]] = [[] for _ in entrants]
    for number, text in enumerate(texts):
        ids = text.to(model.device)
        length = ids.shape[1] - min(SCORED, ids.shape[1] // 4)
        prompt, whole = ReadPrompt(scoring_model, ids[:, : length + 1]), None
        if scoring_model is not model:
            whole = ReadPrompt(model, ids)
        reference: Score | None = None
        for i, entrant in enumerate(entrants):
            on_step(f"{entrant.name}, prompt {number + 1}")
            with entrant.around(scoring_model):
                make = partial(prompt.through, entrant.make)
                found = score(scoring_model, ids, make, length, reference=reference, prefilled=True)
            cache = found.cache
            if whole is not None:
                with entrant.around(model), torch.inference_mode():
                    cache = whole.through(entrant.make)
                    # until the next token transformers' sliding layers hold the prompt that their window is a view of
                    model.base_model(input_ids=whole.last, past_key_values=cache, use_cache=True)
            nbytes[i] += tensor_bytes(cache)
            shared[i].append(shared_pages(cache))
            reference = reference or found
            scores[i].append(replace(found, logits=None, cache=None))
    rows: list[dict[str, Any]] = []
    for i, entrant in enumerate(entrants):
        row = _row(entrant.name, specs[i - 1] if i else None, scores[i], nbytes[i], shared[i], rows)
        rows.append({**row, "prompts": len(texts), "tokens": sum(ids.shape[1] for ids in texts)})
    return rows


@torch.inference_mode()
def measure_batch(model: Any, captured: Captured, specs: Sequence[CacheSpec], on_step: OnStep) -> list[dict[str, Any]]:
    """Prompts as rows of one batch, cut to the shortest of them (up to 8 rows of 1,024 tokens); 32 tokens are scored.

    Rows that begin alike share pages here, which prompts in caches of their own cannot.
    """
    texts = [reading.ids for reading in captured.readings if len(reading.ids) >= LEAST][:ROWS]
    if len(texts) < 2:
        return []
    length = min(LONGEST_ROW, *map(len, texts))
    ids = torch.stack([own[:length] for own in texts]).to(model.device)
    prompt = length - ROW_SCORED
    entrants = _entrants(model, specs)
    rows: list[dict[str, Any]] = []
    base = torch.empty(0)
    for number, entrant in enumerate(entrants):
        on_step(f"{entrant.name}, batch")
        cache = entrant.make()
        with entrant.around(model):
            model.base_model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
            logits = model(input_ids=ids[:, prompt:], past_key_values=cache, use_cache=True).logits
        log_probs = logits[:, :-1].float().log_softmax(-1)
        del logits
        nll = -log_probs.gather(2, ids[:, prompt + 1 :, None]).flatten().cpu()
        kl = None if number == 0 else (base.exp() * (base - log_probs)).sum(-1).flatten().cpu()
        agree = None if number == 0 else (base.argmax(-1) == log_probs.argmax(-1)).flatten().cpu()
        base = log_probs if number == 0 else base
        found = Score(nll, kl, agree, None, None, 0.0, 0.0)
        spec = specs[number - 1] if number else None
        rows.append(_row(entrant.name, spec, [found], tensor_bytes(cache), [shared_pages(cache)], rows))
    return [{**row, "prompts": len(texts), "tokens": ids.numel()} for row in rows]


def shared_pages(cache: Any) -> float | None:
    """Share of the packed pages that are stored by another one; None for caches that share none."""
    if not isinstance(cache, CPACCache):
        return None
    found = cache.get_compression_stats()
    return found["compressed_blocks"] / max(found["compressed_blocks"] + found["plain_blocks"], 1)


def _chosen(captured: Captured, prompts: int) -> list[torch.Tensor]:
    """Token ids `[1, T]` of so many prompts, spread evenly over those that are long enough."""
    fits = [reading.ids[None] for reading in captured.readings if len(reading.ids) >= LEAST]
    count = min(prompts, len(fits))
    return [fits[i * (len(fits) - 1) // max(count - 1, 1)] for i in range(count)]


def _entrants(model: Any, specs: Sequence[CacheSpec]) -> list[Entrant]:
    """The uncompressed cache, then the others."""
    return [CacheSpec.parse(BASELINE).entrant(model.config), *(spec.entrant(model.config) for spec in specs)]


def _row(
    name: str, spec: CacheSpec | None, scores: list[Score], nbytes: int, shared: list[float | None],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    perplexity = math.exp(torch.cat([own.nll for own in scores]).mean())
    kl = [own.kl for own in scores if own.kl is not None]
    agree = [own.agree for own in scores if own.agree is not None]
    first = rows[0] if rows else {"nbytes": nbytes, "perplexity": perplexity}
    pages = [own for own in shared if own is not None]
    return {
        "cache": name,
        "spec": None if spec is None else spec.to_dict(),
        "nbytes": nbytes,
        "ratio": first["nbytes"] / nbytes,
        "perplexity": perplexity,
        "perplexity_change": perplexity / first["perplexity"] - 1,
        "kl": torch.cat(kl).mean().item() if kl else 0.0,
        "top1_agreement": torch.cat(agree).float().mean().item() if agree else 1.0,
        "scored": sum(len(own.nll) for own in scores),
        "pages_shared": sum(pages) / len(pages) if pages else None,
    }
