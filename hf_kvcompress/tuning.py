"""Codecs layer by layer for a quality target, searched on texts: bits go where they buy the least KL divergence.

Each unit (the keys or the values of a few layers) is first coded alone, everything else exact, and the KL that this
costs is measured through the cache. A greedy path then lowers bits where KL per saved byte is least. KL is not quite
the sum of its parts, so the end of the path is found by measuring whole assignments, never by the sum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from .cache import CompressedCache
from .calibration import Calibration
from .config import CacheConfig, LayerConfig, expect
from .enable import enable
from .planner import describe
from .plans import Plan, calibration_setting
from .scoring import Score, score, tokenize
from .shapes import LayerShape, layer_shapes

CANDIDATES = ("int8", "eqrot4", "eqrot3", "eqrot2")
CALIBRATED = ("int8", "eqrot4", "eqrot3", "pca2")  # with a calibration; values of `pca2` are those of `eqrot2`
EXACT = "identity"
FURTHER_STEPS = 6  # tried behind the end of the path
OnMeasured = Callable[[int, int, str], None]
Found = tuple[list[int], float, float]  # levels, KL and perplexity of an assignment


@dataclass(frozen=True)
class Unit:
    """The keys or the values of some layers: they share a codec."""

    layers: tuple[int, ...]
    role: str  # "keys" or "values"

    def __str__(self) -> str:
        span = f"{self.layers[0]}" + (f"-{self.layers[-1]}" if len(self.layers) > 1 else "")
        return f"{self.role} {span}"


@dataclass(frozen=True)
class Tuned:
    """Settings that meet a quality target on the texts that they were tuned on.

    kl: measured mean KL divergence from the uncompressed model, in nats; perplexity: beside `base_perplexity` without
    compression. costs: the KL that each unit's codecs cost alone. measurements: passes over all texts.
    """

    settings: CacheConfig
    plan: Plan
    target_kl: float
    kl: float
    perplexity: float
    base_perplexity: float
    measurements: int
    costs: dict[str, dict[str, float]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes

    def cache_settings(self) -> dict[str, Any]:
        """Keyword arguments of `CompressedCache(config, **settings)`; also what `save` writes.

        A calibration in memory is not among them: the cache wants it beside them.
        """
        return self.settings.to_dict() | calibration_setting(self.settings, self.plan.calibration)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: settings, what they cost and what was measured on the way."""
        own = ("target_kl", "kl", "perplexity", "base_perplexity", "measurements", "costs")
        return {**{name: getattr(self, name) for name in own}, "plan": self.plan.to_dict()}

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON: `CompressedCache(config, **json.loads(Path(path).read_text()))`."""
        Path(path).write_text(json.dumps(self.cache_settings(), indent=2) + "\n", encoding="utf-8")

    def __rich__(self) -> Any:
        return self.plan.__rich__()


def tune(
    model: Any,
    texts: str | torch.Tensor | Iterable[str | torch.Tensor],
    target_kl: float,
    *,
    candidates: Sequence[str] | None = None,
    calibration: str | Path | Calibration | None = None,
    tokenizer: Any = None,
    prompt_tokens: int = 1024,
    score_tokens: int = 256,
    step: int = 32,
    layers_at_once: int = 1,
    context: int | None = None,
    keep: str | Path | None = None,
    on_measured: OnMeasured | None = None,
) -> Tuned:
    """Find the fewest bits a layer, keys and values apart, whose mean KL stays within `target_kl` on these texts.

    Args:
        model: a causal language model; float32 measures small divergences best.
        texts: strings (then give `tokenizer`) or tensors of token ids `[1, T]`.
        target_kl: mean KL divergence of the next token, in nats; `preset="balanced"` costs about .003.
        candidates: codecs to choose from, mildest first; None takes `CANDIDATES`, or `CALIBRATED` with a calibration.
        calibration: of the model, for the candidates that need one; made of other texts than these.
        prompt_tokens, score_tokens: of each text, the tokens before those that are scored, and those.
        step: tokens of a scored forward.
        layers_at_once: neighbouring layers of one kind that share their codecs; more is coarser and faster.
        context: tokens for which bytes are weighed, None for those measured. The longer, the more full layers count.
        keep: write the settings here as JSON.
        on_measured: called with measurements done, their expected number, and what was measured.

    Raises ValueError if the mildest candidate everywhere already costs more than the target.
    """
    if not target_kl > 0:
        raise expect("target_kl", "a number above 0", target_kl)
    if calibration is not None:
        calibration = Calibration.open(calibration)
    if candidates is None:
        candidates = CANDIDATES if calibration is None else CALIBRATED
    if not candidates:
        raise expect("candidates", "codec names, mildest first", candidates)
    for name in candidates:
        LayerConfig(keys=name, values=name)
        CompressedCache(model.config, codec=name, calibration=calibration)  # tells what a codec lacks at once
    ids = _token_ids(texts, tokenizer, prompt_tokens + score_tokens, model.device)
    shapes = layer_shapes(model.config)
    units = _units(shapes, layers_at_once)
    search = _Search(model, ids, prompt_tokens, step, tuple(candidates), units, target_kl, on_measured, calibration)

    def sized(levels: Sequence[int]) -> Plan:
        settings = search.settings(levels)
        found = describe(shapes, settings, context=context or prompt_tokens + score_tokens, dtype=model.dtype)
        return found if calibration is None else replace(found, calibration=calibration.path)

    costs = search.costs()
    path = _path(units, costs, lambda levels: sized(levels).nbytes)
    best = search.end_of(path)
    best = search.beyond(best, path, lambda levels: sized(levels).nbytes)
    levels, kl, perplexity = best
    settings = search.settings(levels)
    named = {str(u): dict(zip(candidates, own, strict=False)) for u, own in zip(units, costs, strict=True)}
    tuned = Tuned(
        settings, sized(levels), target_kl, kl, perplexity, search.base_perplexity, search.measurements, named
    )
    if keep is not None:
        tuned.save(keep)
    return tuned


@dataclass
class _Search:
    """Measures assignments: `levels[i]` is the number of unit i's candidate, -1 leaves it exact."""

    model: Any
    ids: list[torch.Tensor]
    prompt_tokens: int
    step: int
    candidates: tuple[str, ...]
    units: list[Unit]
    target_kl: float
    on_measured: OnMeasured | None
    calibration: Calibration | None = None
    measurements: int = 0
    expected: int = 0

    def __post_init__(self) -> None:
        config = self.model.config
        self.expected = len(self.units) * len(self.candidates) + 2
        self.references = [self._score(ids, lambda: DynamicCache(config=config), None) for ids in self.ids]
        self._tell("uncompressed")

    @property
    def base_perplexity(self) -> float:
        return _perplexity(self.references)

    def settings(self, levels: Sequence[int]) -> CacheConfig:
        """The cache's settings: what most layers do as the default, the others one by one."""
        chosen: dict[int, dict[str, str]] = {}
        for unit, level in zip(self.units, levels, strict=True):
            name = EXACT if level < 0 else self.candidates[level]
            for layer in unit.layers:
                chosen.setdefault(layer, {})[unit.role] = name
        base = replace(CacheConfig.make().default, eviction=None)
        own = {i: replace(base, keys=names["keys"], values=names["values"]) for i, names in sorted(chosen.items())}
        default = max(own.values(), key=list(own.values()).count)
        return CacheConfig(default, {layer: config for layer, config in own.items() if config != default})

    def measure(self, levels: Sequence[int], label: str) -> tuple[float, float]:
        """Mean KL and perplexity over all texts."""
        settings = self.settings(levels).to_dict()
        config = self.model.config
        with enable(self.model):
            scores = [
                self._score(ids, lambda: CompressedCache(config, **settings, calibration=self.calibration), reference)
                for ids, reference in zip(self.ids, self.references, strict=True)
            ]
        self._tell(label)
        kl = torch.cat([one.kl for one in scores if one.kl is not None]).mean().item()
        # a cache that breaks the model gives NaN: no target allows it
        return (kl if math.isfinite(kl) else math.inf), _perplexity(scores)

    def costs(self) -> list[list[float]]:
        """KL of each unit's candidates, mildest first, everything else exact; those beyond the target are left out."""
        exact = [-1] * len(self.units)
        floor, _ = self.measure(exact, "exact")
        costs = []
        for number, unit in enumerate(self.units):
            own: list[float] = []
            for level, name in enumerate(self.candidates):
                alone = [level if i == number else -1 for i in range(len(self.units))]
                cost = max(self.measure(alone, f"{unit} {name}")[0] - floor, 0.0)
                own.append(max(cost, own[-1] if own else 0.0))
                if cost > self.target_kl:  # fewer bits alone would spend more than there is
                    self.expected -= len(self.candidates) - level - 1
                    break
            costs.append(own)
        return costs

    def end_of(self, path: list[list[int]]) -> Found:
        """The last assignment of a path that meets the target, its KL and its perplexity, by bisection."""
        further = FURTHER_STEPS + len(self.candidates) - 1
        self.expected = self.measurements + 1 + math.ceil(math.log2(max(len(path), 2))) + further
        kl, perplexity = self.measure(path[0], f"all {self.candidates[0]}")
        if kl > self.target_kl:
            raise ValueError(
                f"target_kl: expected at least {kl:.2e}, which {self.candidates[0]} everywhere costs on these texts, "
                f"got {self.target_kl}"
            )
        best, low, high = (path[0], kl, perplexity), 0, len(path)
        while high - low > 1:
            middle = (low + high) // 2
            kl, perplexity = self.measure(path[middle], f"step {middle} of {len(path) - 1}")
            if kl <= self.target_kl:
                best, low = (path[middle], kl, perplexity), middle
            else:
                high = middle
        return best

    def beyond(self, best: Found, path: list[list[int]], nbytes: Callable[[list[int]], int]) -> Found:
        """Better than the end of the path: single later steps that still fit, or one codec everywhere."""
        at = path.index(best[0])
        steps = [
            (unit, level)
            for before, after in zip(path[at + 1 :], path[at + 2 :], strict=False)
            for unit, level in enumerate(after)
            if level != before[unit]
        ]
        for unit, level in steps[:FURTHER_STEPS]:
            levels = [level if i == unit else own for i, own in enumerate(best[0])]
            kl, perplexity = self.measure(levels, f"{self.units[unit]} {self.candidates[level]} as well")
            if kl <= self.target_kl:
                best = levels, kl, perplexity
        for level in range(len(self.candidates) - 1, 0, -1):
            levels = [level] * len(self.units)
            if nbytes(levels) < nbytes(best[0]):
                kl, perplexity = self.measure(levels, f"all {self.candidates[level]}")
                if kl <= self.target_kl:
                    return levels, kl, perplexity
        return best

    def _score(self, ids: torch.Tensor, make_cache: Callable[[], Any], reference: Score | None) -> Score:
        found = score(self.model, ids, make_cache, self.prompt_tokens, self.step, reference=reference)
        return replace(found, cache=None)

    def _tell(self, label: str) -> None:
        self.measurements += 1
        if self.on_measured:
            self.on_measured(self.measurements, max(self.expected, self.measurements), label)


def _path(units: list[Unit], costs: list[list[float]], nbytes: Callable[[list[int]], int]) -> list[list[int]]:
    """Assignments from the mildest to the smallest; each step saves bytes for the least KL a byte."""
    start = [0] * len(units)
    whole = nbytes(start)

    def saved(unit: int, level: int) -> int:
        return whole - nbytes([level if i == unit else 0 for i in range(len(units))])

    savings = [[saved(unit, level) for level in range(len(own))] for unit, own in enumerate(costs)]
    path, levels = [start], start
    while True:
        moves = [
            ((costs[u][to] - costs[u][at]) / (savings[u][to] - savings[u][at]), u, to)
            for u, at in enumerate(levels)
            for to in range(at + 1, len(costs[u]))
            if savings[u][to] > savings[u][at]
        ]
        if not moves:
            return path
        _, unit, to = min(moves)
        levels = [to if i == unit else level for i, level in enumerate(levels)]
        path.append(levels)


def _units(shapes: Sequence[LayerShape], at_once: int) -> list[Unit]:
    if at_once < 1:
        raise expect("layers_at_once", "at least 1", at_once)
    groups: list[list[LayerShape]] = []
    for shape in shapes:
        if not shape.packed:
            continue
        near = groups[-1] if groups else None
        if near and len(near) < at_once and near[-1].layer == shape.layer - 1 and near[-1].kind == shape.kind:
            near.append(shape)
        else:
            groups.append([shape])
    if not groups:
        raise expect("model", "a model with attention layers", "one without")
    return [Unit(tuple(s.layer for s in group), role) for group in groups for role in ("keys", "values")]


def _token_ids(texts: Any, tokenizer: Any, length: int, device: torch.device) -> list[torch.Tensor]:
    found = []
    for text in [texts] if isinstance(texts, str | torch.Tensor) else texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise expect("tokenizer", "the model's tokenizer, since texts are strings", None)
            found.append(tokenize(tokenizer, text, length, device))
        elif text.ndim == 2 and text.shape[0] == 1 and text.shape[1] >= length:
            found.append(text[:, :length].to(device))
        else:
            raise expect("texts", f"strings or token ids [1, {length} or more]", tuple(text.shape))
    if not found:
        raise expect("texts", "at least one text", texts)
    return found


def _perplexity(scores: Iterable[Score]) -> float:
    return math.exp(torch.cat([one.nll for one in scores]).mean().item())
