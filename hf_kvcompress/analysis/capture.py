"""The keys and values that a model makes while it reads prompts and goes on with them, cut into pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from ..config import expect
from ..rotary import Rotary, rotary_of
from ..shapes import LayerShape, layer_shapes
from .prompts import Prompt

CHUNK = 2048  # tokens that are read at once
TOP_P = 0.95
OnProgress = Callable[[str, int, int], None]


@dataclass
class Reading:
    """One prompt as the model saw it.

    Args:
        ids: `[T]` tokens whose keys and values were made.
        prompt_tokens: of these the prompt's; the others were generated.
        pages: whole pages in it.
        kept: numbers of the pages that are held, ascending.
    """

    name: str
    ids: torch.Tensor
    prompt_tokens: int
    pages: int
    kept: torch.Tensor


@dataclass
class LayerStore:
    """Held tokens of one layer: keys after their rotation `[N, H, D]` and values `[N, H, Dv]`, page after page."""

    shape: LayerShape
    rotary: Rotary | None
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Captured:
    """What was read, and the pages that are held of it: the same ones in every layer.

    Pages begin after the first `sinks` tokens, which a cache keeps apart. Page p holds the tokens
    `sinks + number[p] * page_size` and on of reading `owner[p]`.
    """

    page_size: int
    sinks: int
    readings: list[Reading] = field(default_factory=list)
    layers: dict[int, LayerStore] = field(default_factory=dict)
    #: kind -> why it is left out
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> torch.Tensor:
        counts = torch.tensor([len(reading.kept) for reading in self.readings])
        return torch.arange(len(self.readings)).repeat_interleave(counts)

    @property
    def number(self) -> torch.Tensor:
        return torch.cat([reading.kept for reading in self.readings])

    @property
    def starts(self) -> torch.Tensor:
        """Position of the first token of every page, `[P]`."""
        return self.sinks + self.number * self.page_size

    @property
    def positions(self) -> torch.Tensor:
        """Position of every held token in its own reading, `[N]`."""
        return (self.starts[:, None] + torch.arange(self.page_size)).flatten()

    def slot(self, reading: int, start: int) -> int | None:
        """Where the span of `page_size` tokens from a position on is held in one piece; None if it is not."""
        kept, page = self.readings[reading].kept, self.page_size
        first, offset = divmod(start - self.sinks, page)
        if start < self.sinks:
            return None
        place = int(torch.searchsorted(kept, first))
        last = place + (1 if offset else 0)
        if last >= len(kept) or int(kept[place]) != first or int(kept[last]) != first + (last - place):
            return None
        before = sum(len(own.kept) for own in self.readings[:reading])
        return (before + place) * page + offset


class _Recorder(DynamicCache):
    """A `DynamicCache` that also notes what it is given, before any window takes something away."""

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.taken: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = tuple(x[0].transpose(0, 1).detach().to("cpu", copy=True) for x in (key_states, value_states))
        self.taken.setdefault(layer_idx, []).append(own)  # type: ignore[arg-type]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def capture(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    prompt_tokens: int | None,
    temperature: float,
    seed: int,
    page_size: int,
    sinks: int,
    memory: int,
    on_progress: OnProgress | None = None,
) -> Captured:
    """Let a model read prompts and go on with them, and hold pages of what it cached, `memory` bytes at most.

    Where not all pages fit, each reading keeps a random sample of its pages. One reading is held whole on top of them.

    Raises:
        ValueError: a prompt is longer than the model's window or than nothing at all, or the model caches no keys.
    """
    shapes = {shape.layer: shape for shape in layer_shapes(model.config) if shape.heads and shape.packed}
    if getattr(model.config, "is_encoder_decoder", False) or not shapes:
        raise expect("model", "a decoder with attention layers", model.config.model_type)
    found = Captured(page_size, sinks)
    all_ids = [_ids(prompt, tokenizer, prompt_tokens, model) for prompt in prompts]
    bytes_of_page = page_size * model.dtype.itemsize
    bytes_of_page *= sum(shape.heads * (shape.key_dim + shape.value_dim) for shape in shapes.values())
    most = max(memory // bytes_of_page // len(prompts), 2)
    generator = torch.Generator().manual_seed(seed)
    for number, (prompt, ids) in enumerate(zip(prompts, all_ids, strict=True)):
        if on_progress:
            on_progress("reading", number, len(prompts))
        cache = _Recorder(model.config)
        seen = _read(model, ids, cache, max_tokens, temperature, seed + number)
        pages = max(seen.shape[1] - sinks, 0) // page_size
        kept = torch.arange(pages)
        if pages > most:
            kept = torch.randperm(pages, generator=generator)[:most].sort().values
        found.readings.append(Reading(prompt.name, seen[0].cpu(), min(ids.shape[1], seen.shape[1]), pages, kept))
        _keep(found, cache, shapes, kept, model.config)
    if not len(found.owner):
        longest = max(len(reading.ids) for reading in found.readings)
        raise expect("prompts", f"at least one of {sinks + page_size} tokens, with what is generated", longest)
    return found


def _ids(prompt: Prompt, tokenizer: Any, most: int | None, model: Any) -> torch.Tensor:
    """Token ids `[1, T]`, at most `most` and within the model's window."""
    if isinstance(prompt.text, torch.Tensor):
        ids = prompt.text
    elif tokenizer is None:
        raise expect("tokenizer", "the model's tokenizer, since prompts are strings", None)
    else:
        ids = tokenizer(prompt.text, return_tensors="pt")["input_ids"]
    ids = ids[:, :most].to(model.device)
    if not ids.shape[1]:
        raise ValueError(f"{prompt.name}: expected at least one token, got none")
    window = _window(model)
    if window is not None and ids.shape[1] > window:
        raise ValueError(
            f"{prompt.name}: expected at most {window:,} tokens, the model's window, got {ids.shape[1]:,}; "
            "prompt_tokens (--prompt-tokens) reads the first ones only"
        )
    return ids


def _window(model: Any) -> int | None:
    """Tokens that the model was made for; None if its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


@torch.inference_mode()
def _read(
    model: Any, ids: torch.Tensor, cache: DynamicCache, max_tokens: int, temperature: float, seed: int
) -> torch.Tensor:
    """Read a prompt and go on; the tokens `[1, T]` whose keys are cached."""
    window = _window(model)
    new = max_tokens if window is None else min(max_tokens, window - ids.shape[1])
    first = ids[:, :-1] if new else ids
    for chunk in first.split(CHUNK, dim=1) if first.shape[1] else ():
        model.base_model(input_ids=chunk, past_key_values=cache, use_cache=True)
    if not new:
        return ids
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_p": TOP_P, "top_k": 0}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, **how)
    return out[:, :-1]  # nothing was made of the last token yet


def _keep(found: Captured, cache: _Recorder, shapes: dict[int, LayerShape], kept: torch.Tensor, config: Any) -> None:
    """Move the chosen pages of one reading into the store."""
    for layer, parts in cache.taken.items():
        if layer not in shapes:  # kinds of layers that this package leaves as they are
            continue
        if layer not in found.layers:
            found.layers[layer] = LayerStore(shapes[layer], _rotary(found, config, layer))
        keys, values = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        at = (found.sinks + kept[:, None] * found.page_size + torch.arange(found.page_size)).flatten()
        found.layers[layer].keys.append(keys[at])
        found.layers[layer].values.append(values[at])
        parts.clear()


def _rotary(found: Captured, config: Any, layer: int) -> Rotary | None:
    try:
        return rotary_of(config, layer)
    except ValueError as error:
        found.left_out["key_before_rope"] = str(error)
        return None
