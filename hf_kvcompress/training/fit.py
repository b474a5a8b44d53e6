"""The fit of the learned score to what a teacher says."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from ..config import expect
from ..policies.learned import LearnedConfig, LearnedWeights, Network, feature_size, features, run_network
from ..shapes import LayerShape, layer_shapes
from .teacher import INTERVAL, Lesson, Passage, Target, future_passage, lessons, replay_passage

Teacher = Literal["future", "replay", "both"]
SINKS, RECENT = 4, 32  # tokens at a passage's beginning and before a cut that are no candidates
HELD_OUT = 8  # every so many passages one is held out
LISTS = 4  # of one step
NOISE = 0.1  # added to standardised features: keys and values will be quantized
LEVEL = 0.1  # weight of the squared error, beside the cross entropy of the shares
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerReport:
    """How well a layer's network knows the worth of tokens in the passages held out, beside H2O's accumulated mass.

    loss: (first, last) training loss. rank: Spearman's correlation with the worth. share: part of all worth that is in
    the best quarter of the tokens, by the true worth ("best"), the network and H2O.
    """

    layer: int
    loss: tuple[float, float]
    rank: float
    h2o_rank: float
    share: float
    h2o_share: float
    best_share: float


@dataclass(frozen=True)
class Trained:
    weights: LearnedWeights
    layers: list[LayerReport]


class _List:
    """Candidates of one passage at one cut: features `[H, n, F]`, made anew each time, worth and past mass `[H, n]`."""

    def __init__(self, lesson: Lesson, index: int):
        self.cut, self.which = lesson.cuts[index], slice(SINKS, lesson.cuts[index] - RECENT)
        self.keys, self.values = lesson.keys[:, self.which], lesson.values[:, self.which]
        self.worth, self.past = lesson.worth[index, :, self.which], lesson.past[index, :, self.which]

    @property
    def x(self) -> torch.Tensor:
        ages = self.cut - 1 - torch.arange(self.cut, device=self.keys.device)[self.which]
        return features(self.keys, self.values, ages.expand(self.keys.shape[:2]))


def train_policy(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    teacher: Teacher = "both",
    target: Target = "error",
    tokens: int = 131072,
    length: int = 2560,
    hidden: int = 48,
    epochs: int = 5,
    sliding: bool = False,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Trained:
    """Train a score on keys and values for the policy "learned".

    The keys and values are exact ones; noise on their standardised features stands for quantization.

    Args:
        model: a transformers model; it is left as it was found.
        texts: any texts, the longer the better.
        teacher: "future", "replay" or "both", half of the passages each.
        target: what a token is worth: "mass", the attention it will receive, or "error", the error of the attention's
            output without it, which counts its value as well.
        tokens: of all passages. They are held at once in the model's dtype, as keys and values of the trained layers.
        length: tokens of one passage.
        hidden: width of the network.
        sliding: train the layers with a sliding window as well.
        on_progress: called with what is done, how much of it, and how much there is.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if teacher not in ("future", "replay", "both"):
        raise expect("teacher", "'future', 'replay' or 'both'", teacher)
    if target not in ("mass", "error"):
        raise expect("target", "'mass' or 'error'", target)
    for name, value, least in (("hidden", hidden, 1), ("epochs", epochs, 1), ("length", length, 4 * INTERVAL)):
        if value < least:
            raise expect(name, f"at least {least}", value)
    report = on_progress or (lambda label, done, total: None)
    layers = [s for s in layer_shapes(model.config) if s.packed and (sliding or s.window is None)]
    if not layers:
        raise expect("model", "layers with full attention", model.config.model_type)
    passages = _passages(tokenizer, texts, teacher, tokens, length)
    taught: dict[int, list[Lesson]] = {shape.layer: [] for shape in layers}
    for done, found in enumerate(lessons(model, passages, layers, target)):
        for layer, lesson in found.items():
            taught[layer].append(lesson)
        report("reading", done + 1, len(passages))
    networks, reports = {}, []
    for done, shape in enumerate(layers):
        report(f"layer {shape.layer}", done, len(layers))
        networks[shape.layer], own = fit_layer(shape, taught.pop(shape.layer), hidden, epochs, seed)
        reports.append(own)
    report("done", len(layers), len(layers))
    config = LearnedConfig(
        model_type=model.config.model_type,
        num_layers=len(layer_shapes(model.config)),
        shapes={shape.layer: (shape.heads, shape.key_dim, shape.value_dim) for shape in layers},
        hidden=hidden,
        max_age=max(cut for passage in passages for cut in passage.cuts),
        training={
            "teacher": teacher,
            "target": target,
            "tokens": tokens,
            "length": length,
            "epochs": epochs,
            "seed": seed,
            "texts": [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts],
            "held_out": [asdict(own) for own in reports],
        },
    )
    return Trained(LearnedWeights(config, networks), reports)


def _passages(tokenizer: Any, texts: Sequence[str], teacher: Teacher, tokens: int, length: int) -> list[Passage]:
    """Passages evenly spread over the texts; both teachers take turns."""
    if not texts:
        raise expect("texts", "at least one text", texts)
    number = math.ceil(tokens / length)
    if number < HELD_OUT:
        raise expect("tokens", f"at least {HELD_OUT * length}, {HELD_OUT} passages of {length}", tokens)
    prefix = torch.tensor(tokenizer("")["input_ids"], dtype=torch.long)
    size = length - len(prefix)
    pieces = [
        piece
        for text in texts
        for piece in torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]).split(size)
        if len(piece) == size
    ]
    if len(pieces) < number:
        raise expect("texts", f"{number} passages of {size} tokens for tokens={tokens}", f"{len(pieces)}")
    passages = []
    for index in range(number):
        ids = torch.cat([prefix, pieces[index * (len(pieces) - 1) // (number - 1)]])[None]
        again = teacher == "replay" or teacher == "both" and index % 2 == 1
        passages.append(replay_passage(ids, len(prefix)) if again else future_passage(ids))
    return passages


def fit_layer(shape: LayerShape, taught: Sequence[Lesson], hidden: int, epochs: int, seed: int) -> tuple[Network, Any]:
    """The network of one layer and its report; every `HELD_OUT`th lesson is only for the report."""
    # Passages of two teachers take turns: a step of HELD_OUT + 1 holds out some of each.
    held = set(range(HELD_OUT - 1, len(taught), HELD_OUT + 1))
    learn = [own for index, lesson in enumerate(taught) if index not in held for own in _lists(lesson)]
    test = [own for index in sorted(held) for own in _lists(taught[index])]
    network, losses = fit(learn, feature_size(shape.key_dim, shape.value_dim), hidden, epochs, seed)
    ranks = [(_rank(run_network(network, one.x), one.worth), _rank(one.past, one.worth)) for one in test]
    shares = [
        tuple(_share(score, one.worth) for score in (run_network(network, one.x), one.past, one.worth)) for one in test
    ]
    rank, h2o_rank = torch.tensor(ranks).mean(0).tolist()
    share, h2o_share, best = torch.tensor(shares).mean(0).tolist()
    return network, LayerReport(shape.layer, losses, rank, h2o_rank, share, h2o_share, best)


def _lists(lesson: Lesson) -> list[_List]:
    return [_List(lesson, index) for index in range(len(lesson.cuts))]


def fit(lists: Sequence[_List], size: int, hidden: int, epochs: int, seed: int) -> tuple[Network, tuple[float, float]]:
    """Fit one network a head to the lists; returns it, the standardisation folded in, with its first and last loss."""
    heads, device = lists[0].x.shape[0], lists[0].x.device
    mean, scale = _moments(lists)
    middle = torch.cat([own.worth for own in lists], dim=1).mean(1)
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(device)

    network = {
        "hidden.weight": drawn(heads, size, hidden) / math.sqrt(size),
        "hidden.bias": torch.zeros(heads, hidden, device=device),
        "out.weight": drawn(heads, hidden) / math.sqrt(hidden),
        "out.bias": middle.clone(),
    }
    losses = []
    with torch.enable_grad():
        parameters = [tensor.requires_grad_() for tensor in network.values()]
        optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2)
        steps = epochs * math.ceil(len(lists) / LISTS)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
        for _ in range(epochs):
            order = torch.randperm(len(lists), generator=random).tolist()
            total = 0.0
            for start in range(0, len(order), LISTS):
                own = [lists[index] for index in order[start : start + LISTS]]
                loss = torch.stack([_loss(network, one, mean, scale, drawn) for one in own]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(own)
            losses.append(total / len(order))
    network = {name: tensor.detach() for name, tensor in network.items()}
    weight = network["hidden.weight"] / scale[..., None]
    network["hidden.bias"] = network["hidden.bias"] - (mean[:, None] @ weight)[:, 0]
    return {**network, "hidden.weight": weight}, (losses[0], losses[-1])


def _moments(lists: Sequence[_List]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation `[H, F]` of the features."""
    count, total, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for own in lists:
        x = own.x.double()
        count, total, squares = count + x.shape[1], total + x.sum(1), squares + x.square().sum(1)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1e-4).float()


def _loss(network: Network, one: _List, mean: torch.Tensor, scale: torch.Tensor, drawn: Any) -> torch.Tensor:
    """Cross entropy of the shares, for which the best count most; a little squared error makes heads comparable."""
    x = (one.x - mean[:, None]) / scale[:, None]
    scores = run_network(network, x + NOISE * drawn(*x.shape))
    true = one.worth.softmax(-1)
    shares = cross_entropy(scores, true) - cross_entropy(one.worth, true)
    return shares + LEVEL * (scores - one.worth).square().mean()


def _rank(score: torch.Tensor, worth: torch.Tensor) -> float:
    """Spearman's correlation, mean over heads."""
    a, b = (x.argsort(-1).argsort(-1).float() for x in (score, worth))
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean().item()


def _share(score: torch.Tensor, worth: torch.Tensor) -> float:
    """Part of all worth in the quarter with the highest scores, mean over heads."""
    best = score.topk(max(score.shape[-1] // 4, 1), dim=-1).indices
    worth = worth.exp()
    return (worth.gather(-1, best).sum(-1) / worth.sum(-1)).mean().item()
