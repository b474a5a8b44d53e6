"""Rotary position embeddings, from a model's config: how keys came to be rotated, and how to take it back."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .config import expect
from .shapes import layer_shapes

# Model types whose pairing of channels is known. Channel i turns with i + R / 2, R being the channels that turn ...
_HALVES = """arcee exaone4 falcon_h1 gemma gemma2 gemma3_text gemma3n_text gemma4_text gpt_oss granite lfm2 llama
ministral mistral mixtral olmo olmo2 olmo3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2"""
_HALVES_PARTIAL = "gpt_neox phi phi3 qwen3_next stablelm"
# ... or with its neighbour.
_NEIGHBOURS = "cohere cohere2 ernie4_5 helium llama4_text"
_NEIGHBOURS_PARTIAL = "glm glm4"
HALVES = frozenset((_HALVES + " " + _HALVES_PARTIAL).split())
NEIGHBOURS = frozenset((_NEIGHBOURS + " " + _NEIGHBOURS_PARTIAL).split())
PARTIAL = frozenset((_HALVES_PARTIAL + " " + _NEIGHBOURS_PARTIAL).split())
#: whose frequencies do not depend on the length of the text
KINDS = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True, eq=False)
class Rotary:
    """How a layer turns its queries and keys: pairs of channels, by the position times a frequency.

    Args:
        frequencies: `[R / 2]` float32, of the first R channels; the others do not turn. None turns nothing.
        neighbours: channels 2 i and 2 i + 1 are a pair, else i and i + R / 2.
        scaling: factor on what turns (yarn's).
    """

    frequencies: torch.Tensor | None
    neighbours: bool = False
    scaling: float = 1.0
    _on: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    def apply(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Turn `x` `[..., T, D]` float32 to its positions `at` `[..., T]` (whole numbers, broadcast)."""
        return self._turn(x, at, 1.0, self.scaling)

    def undo(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """What `apply` made `x` `[..., T, D]` of, at the positions `at` `[..., T]`."""
        return self._turn(x, at, -1.0, 1 / self.scaling)

    def pairs(self, dim: int) -> tuple[int, ...]:
        """The channels of a head of `dim`, those that turn first and each beside its partner."""
        turning = 0 if self.frequencies is None else 2 * len(self.frequencies)
        first = list(range(turning))
        if not self.neighbours:
            first = [channel for i in range(turning // 2) for channel in (i, i + turning // 2)]
        return (*first, *range(turning, dim))

    def turns(self, tokens: int, device: torch.device) -> torch.Tensor:
        """What positions 0, 1 ... `tokens - 1` turn each pair by, `[tokens, R / 2]` complex64, scaling included."""
        assert self.frequencies is not None
        room = 1 << max(tokens - 1, 1).bit_length()
        return _turns_of(tuple(self.frequencies.tolist()), self.scaling, device, room)[:tokens]

    def turn_back(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """`undo`, lengths kept: `x @ apply(k, at + d).mT` is `turn_back(x, at) @ apply(k, d).mT`."""
        return self._turn(x, at, -1.0, 1.0)

    def storages_held(self) -> dict[Hashable, int]:
        """Nothing that a cache counts: it belongs to the model."""
        return {}

    def _turn(self, x: torch.Tensor, at: torch.Tensor, sign: float, scaling: float) -> torch.Tensor:
        if self.frequencies is None:
            return x
        if x.device not in self._on:  # a decode step copies nothing
            self._on[x.device] = self.frequencies.to(x.device)
        angles = at[..., None].to(x.device, torch.float32) * self._on[x.device]  # as the models do
        cos, sin = angles.cos().mul_(scaling), angles.sin_().mul_(sign * scaling)
        turning = 2 * len(self.frequencies)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if self.neighbours:
            first, second = (slice(start, turning, 2) for start in (0, 1))
        else:
            first, second = slice(0, turning // 2), slice(turning // 2, turning)
        a, b = x[..., first], x[..., second]
        torch.mul(a, cos, out=out[..., first]).sub_(b * sin)
        torch.mul(b, cos, out=out[..., second]).add_(a * sin)
        out[..., turning:] = x[..., turning:]
        return out


@lru_cache(maxsize=16)  # layers share it: a model has one or two rotations
@torch.inference_mode(False)
def _turns_of(frequencies: tuple[float, ...], scaling: float, device: torch.device, tokens: int) -> torch.Tensor:
    at = torch.arange(tokens, device=device, dtype=torch.float32)
    angles = at[:, None] * torch.tensor(frequencies, device=device)
    return torch.polar(torch.full_like(angles, scaling), angles)


def rotary_of(config: Any, layer_index: int) -> Rotary:
    """The rotation of a layer's keys.

    Raises ValueError, naming what is unknown, for a model whose rotation is not known exactly.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kind = getattr(text, "model_type", type(text).__name__)
    shapes = layer_shapes(config)
    own = [shape.layer for shape in shapes if shape.heads]
    if layer_index not in own:
        raise expect("layer_index", f"a layer that stores keys, one of {own}", layer_index)
    if getattr(text, "kv_lora_rank", None):
        raise expect("config", "a model that caches its keys, not latent attention (MLA)", kind)
    parameters = _parameters(text, kind, layer_index)
    if parameters is not None and "mrope_section" in parameters:
        raise expect("config", "a model with one position a token, not M-RoPE", kind)
    if kind not in HALVES | NEIGHBOURS:
        raise expect("config", "a model type whose rotary pairing is known", kind)
    if parameters is None or not _turns(text, kind, layer_index):
        return Rotary(None)
    frequencies, scaling = _frequencies(text, kind, layer_index, parameters, shapes[layer_index].key_dim)
    if 2 * len(frequencies) > shapes[layer_index].key_dim:
        size = shapes[layer_index].key_dim
        raise expect("config", f"at most {size} rotated channels in layer {layer_index}", 2 * len(frequencies))
    return Rotary(frequencies.to("cpu", torch.float32), kind in NEIGHBOURS, float(scaling))


def _layer_type(text: Any, index: int) -> str | None:
    types = getattr(text, "layer_types", None)
    return types[index] if types and index < len(types) else None


def _parameters(text: Any, kind: str, index: int) -> dict[str, Any] | None:
    """The settings of a layer's rotation, None where it does not rotate."""
    given = getattr(text, "rope_parameters", None)
    if not given:
        raise expect("config", "a model with rotary position embeddings (rope_parameters)", kind)
    if _is_nested(text, given):
        own = given.get(_layer_type(text, index))
        return None if own is None else dict(own)
    return dict(given)


def _is_nested(text: Any, given: dict[str, Any]) -> bool:
    """Whether the settings are given by layer type."""
    return bool(set(getattr(text, "layer_types", None) or ()) & set(given))


def _turns(text: Any, kind: str, index: int) -> bool:
    """False for layers that leave out the rotation that others of the model have."""
    if kind in ("llama4_text", "smollm3"):
        return bool(text.no_rope_layers[index])
    if kind == "cohere2" or (kind == "exaone4" and text.sliding_window is not None):
        return _layer_type(text, index) == "sliding_attention"
    return True


def _frequencies(text: Any, kind: str, index: int, parameters: dict[str, Any], dim: int) -> tuple[torch.Tensor, float]:
    name = parameters.get("rope_type", parameters.get("type", "default"))
    if name not in KINDS:
        raise expect("config", f"a rotation of one of {', '.join(KINDS)} in layer {index}", name)
    if name != "default":
        nested = _is_nested(text, text.rope_parameters)
        found: tuple[torch.Tensor, float] = ROPE_INIT_FUNCTIONS[name](
            text, torch.device("cpu"), **({"layer_type": _layer_type(text, index)} if nested else {})
        )
        return found
    turning = int(dim * parameters.get("partial_rotary_factor", 1.0)) if kind in PARTIAL else dim
    exponents = torch.arange(0, turning, 2, dtype=torch.int64).float() / turning
    return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
