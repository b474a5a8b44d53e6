"""What a model's config says of its layers: which hold keys and values, how many heads, of what size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import expect

SLIDING = ("sliding_attention", "chunked_attention", "hybrid_sliding", "reference_sliding_attention")
PACKED = ("full_attention", "hybrid", "sliding_attention", "chunked_attention")
NO_TOKENS = {"linear_attention": "linear", "conv": "linear", "mamba": "linear", "moe": "none", "mlp": "none"}


@dataclass(frozen=True)
class LayerShape:
    """One layer: `kind` is full, sliding, linear (a state of fixed size), shared (reads another's) or none.

    packed: `CompressedCache` stores it; other layers stay as transformers has them.
    """

    layer: int
    kind: str
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    query_heads: int = 0
    window: int | None = None
    packed: bool = False

    def tokens_at(self, context: int) -> int:
        """Tokens that an uncompressed `DynamicCache` holds after `context` tokens."""
        if not self.heads:
            return 0
        return context if self.window is None else min(context, self.window - 1)

    def __str__(self) -> str:
        return self.kind if self.window is None else f"{self.kind} {self.window}"


def layer_shapes(config: Any) -> tuple[LayerShape, ...]:
    """Every decoder layer of a model, from its config (any object with transformers' names)."""
    if not hasattr(config, "get_text_config") and not hasattr(config, "num_hidden_layers"):
        raise expect("config", "a model's config, such as model.config", type(config).__name__)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    number = text.num_hidden_layers
    single = _single(text, number)
    kinds = getattr(text, "layer_types", None) or [_kind(own) for own in single]
    if len(kinds) < number:
        raise expect("config", f"layer_types of {number} layers", f"{len(kinds)}")
    first_shared = number - (getattr(text, "num_kv_shared_layers", None) or 0)
    return tuple(
        LayerShape(index, "shared") if index >= first_shared else _shape(index, kinds[index], single[index])
        for index in range(number)
    )


def _single(text: Any, number: int) -> list[Any]:
    """A config for each layer: transformers' own where layers differ, else the same for all."""
    own = getattr(text, "per_layer_config", None)
    if own is None:
        return [text] * number
    found = list(own.values()) if isinstance(own, dict) else list(own)
    return found if len(found) == number else [text] * number


def _kind(own: Any) -> str:
    if getattr(own, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(own, "attention_chunk_size", None) is None else "chunked_attention"


def _shape(index: int, kind: str, own: Any) -> LayerShape:
    if kind in NO_TOKENS:
        return LayerShape(index, NO_TOKENS[kind])
    window = None
    if kind in SLIDING:
        window = own.attention_chunk_size if kind == "chunked_attention" else own.sliding_window
    query_heads = _of_layer(own, "num_attention_heads", index)
    heads = _of_layer(own, "num_key_value_heads", index) or query_heads
    dim = _of_layer(own, "head_dim", index) or _of_layer(own, "d_kv", index) or own.hidden_size // query_heads
    latent, rope = getattr(own, "kv_lora_rank", None), getattr(own, "qk_rope_head_dim", None)
    sizes = (heads, dim, dim)
    if latent and rope:  # latent attention keeps one compressed "key" and one rotated "value" for all heads
        sizes = (1, latent, rope)
    return LayerShape(index, "full" if window is None else "sliding", *sizes, query_heads, window, kind in PACKED)


def _of_layer(own: Any, name: str, index: int) -> Any:
    """A setting of one layer; some models have a list with an entry a layer."""
    value = getattr(own, name, None)
    return value[index] if isinstance(value, list | tuple) else value
