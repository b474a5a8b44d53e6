"""What tells one model's keys and values from another's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .codecs.registry import FAMILIES, parse
from .config import CacheConfig
from .policies.settings import HOST
from .shards import part_of

_ROPE = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")


def of_model(config: Any) -> dict[str, Any] | None:
    """A model's type, sizes and RoPE settings, and a rank's part of it, JSON-ready; None without a config."""
    if config is None:
        return None
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    told = {"model_type": config.model_type}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        told[name] = getattr(text, name, None)
    if (part := part_of(config)) is not None:
        told["part"] = part
    told["rope"] = {name: value for name in _ROPE if (value := getattr(text, name, None)) is not None}
    return json.loads(json.dumps(told, default=str, sort_keys=True))


def of_codecs(settings: CacheConfig) -> dict[str, int]:
    """Every codec that the settings name, with the version of what it packs."""
    layers = [settings.default, *settings.layers.values()]
    names = {name for layer in layers for name in (layer.keys, layer.values)}
    names |= {tier for layer in layers if layer.eviction is not None for tier in layer.eviction.tiers}
    return {name: version(name) for name in sorted(names - {HOST})}


def asks_for_calibration(settings: CacheConfig) -> bool:
    """Whether a codec of the settings needs one."""
    return any(FAMILIES[parse(name)[0]][0].wants_context for name in of_codecs(settings))


def of_calibration(settings: CacheConfig, calibration: Any) -> str | None:
    """The fingerprint of a cache's calibration, None where no codec of the settings asks for one."""
    return calibration.fingerprint if calibration is not None and asks_for_calibration(settings) else None


def version(codec: str) -> int:
    """The format version of a codec by name."""
    return max(kind.format_version for kind in FAMILIES[parse(codec)[0]])


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """The names whose values are not the same."""
    return [name for name in sorted({*expected, *got}) if expected.get(name) != got.get(name)]
