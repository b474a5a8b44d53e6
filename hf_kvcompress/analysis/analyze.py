"""`analyze`: how redundant the keys and values of a model are on given prompts, and what that is worth."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..codecs.base import Role
from ..config import PAGE_SIZES, LayerConfig, expect
from ..environment import versions
from ..harness.specs import CacheSpec
from ..policies.settings import parse_bytes
from .across_layers import LayerNeighbours
from .capture import Captured, OnProgress, capture
from .distributions import EDGES
from .heads import Plan, measure_head
from .measured import LEAST, PRESETS, cpac, measure_alone, measure_batch
from .neighbours import SCOPES
from .prompts import Prompt, as_prompts, default_prompts
from .recommend import recommend
from .repeats import find_repeats, shared_prefix
from .report import SCHEMA, SCHEMA_VERSION, AnalysisReport
from .savings import Savings, total
from .similar import SimilarPages
from .views import KINDS, role_kind, views

THRESHOLDS = (0.8, 0.9, 0.95)
ROLES: tuple[Role, ...] = ("key", "value")


def analyze(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | torch.Tensor | Prompt] | None = None,
    *,
    max_tokens: int = 64,
    prompt_tokens: int | None = None,
    temperature: float = 1.0,
    page_size: int = 32,
    thresholds: Sequence[float] = THRESHOLDS,
    measured_prompts: int = 4,
    target_kl: float = 0.01,
    max_pairs: int = 256,
    memory: int | str = "1GB",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> AnalysisReport:
    """Let a model read prompts and go on with them, and report how alike the pages of its keys and values are.

    Every layer and head is looked at, keys before and after their rotary embedding and values apart, beside the same
    tokens in random places. Then what sharing pages could save is added up, and caches are measured on the prompts.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's; None if all prompts are token ids.
        prompts: texts, token ids `[1, T]` or `Prompt`s with names; None takes a mixed set of this package.
        max_tokens: tokens generated after each prompt, as many as the model's window allows; 0 only reads.
        prompt_tokens: read so many tokens of each prompt at most; None reads all of it.
        temperature: of the generation, drawn from the likeliest 95 %; 0 always takes the likeliest token.
        page_size: tokens of a page.
        thresholds: cosines for which savings are added up and, from `CPACCache`, measured.
        measured_prompts: prompts that caches are measured on; 0 measures nothing.
        target_kl: mean KL divergence of the next token, in nats, that the recommended cache may cost.
        max_pairs: random pairs, and repeated spans, that are compared for each head.
        memory: bytes of pages that are held; of more pages a random sample is looked at.
        seed: of sampling, generation and the baseline. Equal arguments give equal reports.
        on_progress: called with what is done, steps done and steps in all.

    Raises:
        ValueError: naming the argument or prompt: none, an empty one, or one beyond the model's window.
    """
    begun = time.perf_counter()
    chosen = _checked_thresholds(thresholds)
    for name, value, least in (
        ("max_tokens", max_tokens, 0), ("measured_prompts", measured_prompts, 0),
        ("max_pairs", max_pairs, 1), ("prompt_tokens", 1 if prompt_tokens is None else prompt_tokens, 1),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise expect(name, f"a whole number of at least {least}", value)
    if page_size not in PAGE_SIZES:
        raise expect("page_size", f"one of {', '.join(map(str, PAGE_SIZES))}", page_size)
    if not temperature >= 0:
        raise expect("temperature", "a number of at least 0", temperature)
    base = LayerConfig()
    captured = capture(
        model,
        tokenizer,
        default_prompts(tokenizer) if prompts is None else as_prompts(prompts),
        max_tokens=max_tokens,
        prompt_tokens=prompt_tokens,
        temperature=temperature,
        seed=seed,
        page_size=page_size,
        sinks=base.sink_length,
        memory=_bytes(memory),
        on_progress=on_progress,
    )
    with torch.inference_mode():
        found = _look(captured, chosen, max_pairs, seed, base, tokenizer, on_progress)
    alone, batch = _measure(model, captured, chosen, measured_prompts, on_progress)
    lengths = [len(reading.ids) for reading in captured.readings]
    prefixes = shared_prefix([reading.ids for reading in captured.readings])
    return AnalysisReport(
        {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "settings": {
                "max_tokens": max_tokens,
                "prompt_tokens": prompt_tokens,
                "temperature": temperature,
                "page_size": page_size,
                "sink_length": base.sink_length,
                "residual_length": base.residual_length,
                "thresholds": list(chosen),
                "measured_prompts": measured_prompts,
                "target_kl": target_kl,
                "max_pairs": max_pairs,
                "memory": memory,
                "seed": seed,
                "codec": base.keys,
            },
            "versions": versions(),
            "model": _model(model, captured),
            "prompts": _prompts(captured, prefixes),
            "left_out": captured.left_out,
            **found,
            "measured": {"alone": alone, "batch": batch},
            "recommendation": recommend(model.config, model.dtype, alone, batch, prefixes, lengths, target_kl),
            "seconds": round(time.perf_counter() - begun, 1),
        }
    )


def _look(
    captured: Captured, thresholds: tuple[float, ...], max_pairs: int, seed: int, base: LayerConfig, tokenizer: Any,
    on_progress: OnProgress | None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that is found in the pages themselves."""
    repeats = find_repeats(captured)
    plan = Plan.of(captured, thresholds, max_pairs, seed, repeats)
    savings, neighbours = Savings(plan, base.keys, base.residual_length), LayerNeighbours(captured.page_size)
    similar = SimilarPages(captured)
    rows: list[dict[str, Any]] = []
    histograms: dict[str, dict[str, torch.Tensor]] = {}
    for done, layer in enumerate(sorted(captured.layers)):
        if on_progress:
            on_progress(f"layer {layer}", done, len(captured.layers))
        for view in views(captured, layer, seed):
            neighbours.add(view)
            for role in ROLES:
                if view.kind == role_kind(captured.layers[layer], role):
                    savings.add(view, role)
            for head in range(view.tokens.shape[0]):
                result = measure_head(plan, view, head)
                rows.append(result.row)
                similar.add(view.kind, result.similar)
                own = histograms.setdefault(view.kind, {})
                for name, counts in result.histograms().items():
                    own[name] = own.get(name, 0) + counts
        captured.layers[layer].keys.clear()
        captured.layers[layer].values.clear()
    pages = len(captured.owner)
    return {
        "kinds": [kind for kind in KINDS if kind in histograms],
        "text": {
            "pages": pages,
            **{f"repeated_{scope}": len({r.page for r in repeats[scope]}) / pages for scope in SCOPES},
            "jaccard_tokens": similar.jaccard_of_random_pairs(max_pairs, seed),
        },
        "histograms": {
            "edges": list(EDGES),
            **{kind: {name: counts.tolist() for name, counts in own.items()} for kind, own in histograms.items()},
        },
        "heads": rows,
        "neighbouring_layers": neighbours.rows,
        "similar_pages": similar.most(tokenizer),
        "savings": {"codec": base.keys, "total": total(savings.rows), "layers": savings.rows},
    }


def _measure(
    model: Any, captured: Captured, thresholds: tuple[float, ...], prompts: int, on_progress: OnProgress | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Presets and CPAC at every threshold on single prompts, CPAC beside its codec on a batch of them."""
    if not prompts:
        return [], []
    rotated = "key_before_rope" in captured.left_out
    presets = [CacheSpec(name) for name in PRESETS]
    sharing = [cpac(threshold, rotated) for threshold in thresholds]
    plain = [CacheSpec("balanced")]
    long = min(prompts, sum(len(reading.ids) >= LEAST for reading in captured.readings))
    steps, total_steps = 0, long * (1 + len(presets) + len(sharing)) + 2 + len(sharing)

    def on_step(name: str) -> None:
        nonlocal steps
        if on_progress:
            on_progress(f"measuring {name}", steps, total_steps)
        steps += 1

    alone = measure_alone(model, captured, [*presets, *sharing], prompts, on_step)
    return alone, measure_batch(model, captured, [*plain, *sharing], on_step)


def _bytes(memory: int | str) -> int:
    try:
        found = parse_bytes(memory) if isinstance(memory, str) else memory
    except ValueError:
        found = 0
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise expect("memory", "bytes, as a whole number or such as '64MB'", memory)
    return found


def _checked_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    chosen = tuple(sorted(set(thresholds)))
    if not chosen or not all(isinstance(t, int | float) and 0 < t <= 1 for t in chosen):
        raise expect("thresholds", "cosines above 0 and at most 1", thresholds)
    return chosen


def _model(model: Any, captured: Captured) -> dict[str, Any]:
    shapes = [store.shape for _, store in sorted(captured.layers.items())]
    return {
        "name": getattr(model.config, "_name_or_path", "") or model.config.model_type,
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": [
            {"layer": s.layer, "kind": s.kind, "window": s.window, "heads": s.heads, "key_dim": s.key_dim,
             "value_dim": s.value_dim}
            for s in shapes
        ],
    }  # fmt: skip


def _prompts(captured: Captured, prefixes: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "name": reading.name,
            "prompt_tokens": reading.prompt_tokens,
            "generated_tokens": len(reading.ids) - reading.prompt_tokens,
            "pages": reading.pages,
            "pages_held": len(reading.kept),
            "shared_prefix": prefix,
            "sha256": hashlib.sha256(str(reading.ids.tolist()).encode()).hexdigest()[:16],
        }
        for reading, prefix in zip(captured.readings, prefixes, strict=True)
    ]
