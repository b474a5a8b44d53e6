"""Learning a model's key basis from a few thousand tokens of any text.

What counts is the error of attention, so tokens are weighed with the attention that they receive from afar, p (1 - p)
summed over queries, and directions with the second moment of the queries, to the power one half: whole it leaned on
few directions too much, and without either KL was three to five times higher on texts that were not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from .calibration import LEVELS, Calibration, CalibrationConfig, describe_rotation, model_type, refuse
from .codecs.channel_bits import MOST_BITS
from .enable import watching
from .rotary import Rotary, rotary_of
from .scoring.oracle import attention_weights
from .shapes import LayerShape, layer_shapes
from .watching import AttentionCall

FAR = 16  # tokens nearer to a query are exact when it reads them
SINKS = 4
DISTANCES = 48  # at which the queries' moment is taken
QUERIES = 1024  # of a passage, for that moment
RIDGE, POWER, ATTENTION_POWER = 0.3, 0.5, 0.5
FLOOR = 0.02  # of the mean weight: tokens that nobody looked at may be looked at in another text
ROUNDS = 40
OnPassage = Callable[[int, int], None]


def calibrate(
    model: Any,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    tokens: int = 8192,
    length: int = 2048,
    rotated: bool = False,
    on_progress: OnPassage | None = None,
) -> Calibration:
    """Learn the keys' basis of a model.

    Args:
        model: a causal language model, in evaluation mode.
        texts: any texts in the languages of use; those to be scored later should not be among them.
        tokenizer: the model's.
        tokens: read in all, spread evenly over the texts.
        length: tokens of a passage.
        rotated: take keys as the cache gets them, for models whose rotation is not known.

    Raises ValueError for a model whose rotation is not known, unless `rotated`.
    """
    shapes = [shape for shape in layer_shapes(model.config) if shape.heads and shape.packed]
    if getattr(model.config, "is_encoder_decoder", False) or not shapes:
        raise ValueError(f"model: expected a decoder with attention layers, got {model_type(model.config)!r}")
    rotations: dict[int, Rotary] = {
        shape.layer: Rotary(None) if rotated else rotary_of(model.config, shape.layer) for shape in shapes
    }
    gathered = {shape.layer: _Layer(shape, rotations[shape.layer]) for shape in shapes}

    def watch(call: AttentionCall) -> None:
        if call.layer in gathered:
            gathered[call.layer].add(call)

    passages = _passages(texts, tokenizer, tokens, length)
    for number, ids in enumerate(passages):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode(), watching(model, watch):
            model.base_model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
        if on_progress:
            on_progress(number + 1, len(passages))
    with torch.inference_mode():
        layers = {layer: own.solve(layer) for layer, own in gathered.items()}
    config = CalibrationConfig(
        model_type=model_type(model.config),
        num_layers=len(layer_shapes(model.config)),
        shapes={shape.layer: (shape.heads, shape.key_dim) for shape in shapes},
        rotations={shape.layer: describe_rotation(model.config, shape.layer) for shape in shapes},
        rotated=rotated,
        made_of={
            "tokens": sum(ids.numel() for ids in passages),
            "texts": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    )
    return Calibration(config, layers)


def calibration_of_keys(config: Any, keys: torch.Tensor) -> Calibration:
    """A calibration that fits keys `[N, D]` before their rotation, the same in every layer and head.

    For speed without a model: keys that were drawn have no queries and no attention to be weighed with.
    """
    shapes = [shape for shape in layer_shapes(config) if shape.heads and shape.packed]
    even, plain = torch.ones(len(keys), dtype=torch.float64), torch.eye(keys.shape[1], dtype=torch.float64)
    own = _solve_head(keys.double(), even, plain)
    about = CalibrationConfig(
        model_type=model_type(config),
        num_layers=len(layer_shapes(config)),
        shapes={shape.layer: (shape.heads, shape.key_dim) for shape in shapes},
        rotations={shape.layer: describe_rotation(config, shape.layer) for shape in shapes},
        rotated=False,
        made_of={"keys": len(keys)},
    )
    return Calibration(
        about,
        {s.layer: {name: part.expand(s.heads, *part.shape) for name, part in own.items()} for s in shapes},
    )


def _passages(texts: Sequence[str], tokenizer: Any, tokens: int, length: int) -> list[torch.Tensor]:
    """Passages `[1, length]`, equally many of each text, evenly spread, with the tokenizer's special tokens."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts: expected one text or more in a list, got {texts if not texts else 'a string'!r}")
    prefix = tokenizer("")["input_ids"]
    size, each = length - len(prefix), max(tokens // length // len(texts), 1)
    found = []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < size * each:
            raise ValueError(f"texts: expected at least {size * each} tokens in text {number}, got {len(ids)}")
        step = (len(ids) - size) // each
        found += [torch.tensor([prefix + ids[i * step : i * step + size]]) for i in range(each)]
    return found


class _Layer:
    """What is gathered of one layer: keys `[H, N, D]`, their weights `[H, N]`, and the queries' moment `[H, D, D]`."""

    def __init__(self, shape: LayerShape, rotary: Rotary):
        self.heads, self.dim, self.window, self.rotary = shape.heads, shape.key_dim, shape.window, rotary
        self.keys: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        self.moment = torch.zeros(self.heads, self.dim, self.dim, dtype=torch.float64)
        self.passes = 0

    def add(self, call: AttentionCall) -> None:
        """Note one pass over a whole passage."""
        if call.key.shape[1] != self.heads or call.key.shape[3] != self.dim:
            got = f"{call.key.shape[1]} of size {call.key.shape[3]}"
            raise refuse(f"{self.heads} key-value heads of size {self.dim} at the attention of layer {call.layer}", got)
        tokens = call.key.shape[2]
        at = torch.arange(tokens, device=call.key.device)
        keys = self.rotary.undo(call.key[0].float(), at)[:, SINKS:]
        self.keys.append(keys.half().cpu())
        far, reach = at[:, None] - at >= FAR, min(tokens, self.window or tokens) - 1
        weights = []
        for head in range(self.heads):
            p = attention_weights(call, head)  # [G, q, n]
            weights.append((p * (1 - p)).mul_(far).sum((0, 1))[SINKS:])
        self.weights.append(torch.stack(weights).cpu())
        queries = call.query[0].float().unflatten(0, (self.heads, -1))  # [H, G, q, D]
        queries = self.rotary.undo(queries[:, :, :: max(tokens // QUERIES, 1)], at[:: max(tokens // QUERIES, 1)])
        self.moment += self._moment(queries.flatten(1, 2), reach).cpu()
        self.passes += 1

    def _moment(self, queries: torch.Tensor, reach: int) -> torch.Tensor:
        """Second moment of queries `[H, n, D]` as keys meet them, on average over distances up to `reach`."""
        if self.rotary.frequencies is None:
            return (queries.mT @ queries).double() / queries.shape[1]
        total = torch.zeros_like(self.moment, device=queries.device)
        step = max(queries.shape[1] // DISTANCES, 1)
        distances = torch.linspace(min(FAR, reach), reach, DISTANCES).long().to(queries.device)
        for number, distance in enumerate(distances):
            some = self.rotary.apply(queries[:, number % step :: step], distance.view(1))
            total += (some.mT @ some).double() / some.shape[1]
        return total / DISTANCES

    def solve(self, layer: int) -> dict[str, torch.Tensor]:
        """The parts of a calibration, each `[H, ...]` float32."""
        if not self.passes:
            raise refuse(f"attention in layer {layer}", "none")
        keys, weights = torch.cat(self.keys, 1).double(), torch.cat(self.weights, 1).double()
        parts = [_solve_head(*each) for each in zip(keys, weights, self.moment / self.passes, strict=True)]
        return {name: torch.stack([own[name] for own in parts]).float() for name in parts[0]}


def _solve_head(keys: torch.Tensor, weights: torch.Tensor, moment: torch.Tensor) -> dict[str, torch.Tensor]:
    """One head: keys `[N, D]`, weights `[N]`, moment `[D, D]`, all float64."""
    weights = (weights / weights.mean().clamp(min=1e-30) + FLOOR).pow(ATTENTION_POWER)
    weights = weights / weights.sum()
    mean = weights @ keys
    centred = keys - mean
    values, vectors = torch.linalg.eigh(moment / moment.diagonal().mean().clamp(min=1e-30))
    metric = (values.clamp(min=0) + RIDGE).pow(POWER / 2)
    weigh, unweigh = (vectors * metric) @ vectors.mT, (vectors / metric) @ vectors.mT
    seen = centred @ weigh
    _, basis = torch.linalg.eigh((seen * weights[:, None]).mT @ seen)
    basis = basis.flip(1)  # most energy first
    levels, loss = _levels((seen @ basis).mT.contiguous(), weights)
    loss *= 1e4 / loss.max().clamp(min=1e-30)  # float16 has to hold the file's numbers
    return {"mean": mean, "to": weigh @ basis, "back": basis.mT @ unweigh, "levels": levels, "loss": loss}


def _levels(z: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd-Max levels of each channel `[D, N]` at 1 to 6 bits, `[D, 126]`, and the loss at 0 to 6, `[D, 7]`."""
    z, order = z.sort(1)
    w = weights[order]
    sums = [torch.nn.functional.pad(x.cumsum(1), (1, 0)) for x in (w, w * z)]
    energy = (w * z.square()).sum(1)
    levels, loss = z.new_empty(len(z), LEVELS), z.new_empty(len(z), MOST_BITS + 1)
    loss[:, 0] = energy
    for bits in range(1, MOST_BITS + 1):
        n = 2**bits
        quantiles = (torch.arange(n, dtype=z.dtype) + 0.5).div_(n).expand(len(z), n).contiguous()
        found = z.gather(1, torch.searchsorted(sums[0][:, 1:].contiguous(), quantiles).clamp(max=z.shape[1] - 1))
        for _ in range(ROUNDS):
            edges = torch.searchsorted(z, ((found[:, 1:] + found[:, :-1]) / 2).contiguous())
            edges = torch.nn.functional.pad(torch.nn.functional.pad(edges, (1, 0)), (0, 1), value=z.shape[1])
            mass, first = (x.gather(1, edges).diff(dim=1) for x in sums)
            found = torch.where(mass > 0, first / mass.clamp(min=1e-300), found).sort(1).values
        levels[:, n - 2 : 2 * n - 2] = found
        edges = torch.searchsorted(z, ((found[:, 1:] + found[:, :-1]) / 2).contiguous())
        edges = torch.nn.functional.pad(torch.nn.functional.pad(edges, (1, 0)), (0, 1), value=z.shape[1])
        mass, first = (x.gather(1, edges).diff(dim=1) for x in sums)
        loss[:, bits] = energy + (mass * found.square() - 2 * first * found).sum(1)
    return levels, loss.clamp(min=0)
