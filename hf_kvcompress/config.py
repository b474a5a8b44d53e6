"""Settings of a compressed cache: validated, frozen, JSON-ready."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from .codecs.registry import FAMILIES, parse
from .policies.layer_budgets import layer_weights, share_tokens
from .policies.settings import HOST, EvictionConfig, parse_bytes

#: keys and values codec of each preset; bits per number at head size 256
PRESETS: dict[str, dict[str, str]] = {
    "near-lossless": {"keys": "int8", "values": "int8"},
    "balanced": {"keys": "eqrot4", "values": "eqrot4"},
    "small": {"keys": "eqrot3", "values": "eqrot3"},
    "tiny": {"keys": "eqrot3", "values": "eqrot2"},
}
#: the `policy` that keeps every token
NO_POLICY = "none"
PAGE_SIZES = (8, 16, 32, 64, 128)
PAGE_SIZE = 32
ENVIRONMENT = "HF_KVCOMPRESS_"


def expect(name: str, expected: str, got: object) -> ValueError:
    """The error of this package for a bad argument."""
    return ValueError(f"{name}: expected {expected}, got {got!r}")


def choose(name: str, value: object, known: tuple[str, ...]) -> str:
    """`value` if it is one of the known names; else a ValueError that lists them and names the nearest."""
    if isinstance(value, str) and value in known:
        return value
    near = get_close_matches(str(value), known, n=1)
    raise (
        expect(name, f"one of {', '.join(known)}", value)
        if not near
        else ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}; did you mean {near[0]!r}?")
    )


def _codec(argument: str, name: object) -> tuple[str, float]:
    """Family and bits of a codec's name; an error names the argument that it came in."""
    try:
        return parse(name)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(str(error).replace("codec:", f"{argument}:", 1)) from None


@dataclass(frozen=True)
class LayerConfig:
    """How one layer is compressed.

    Args:
        keys, values: codec names.
        page_size: tokens that are packed at once (8, 16, 32, 64 or 128); None takes 32, or the group size of codecs
            whose groups run along tokens.
        group_size: numbers that share a scale, in codecs with groups.
        residual_length: newest tokens that always stay exact.
        sink_length: first tokens that always stay exact, in layers with full attention.
        sliding: "compress" packs the window of sliding layers, "exact" leaves it to transformers' own layer, "evict"
            packs it and lets the policy evict there as well.
        eviction: which tokens stay, None for all.
    """

    keys: str = "eqrot4"
    values: str = "eqrot4"
    page_size: int | None = None
    group_size: int = 64
    residual_length: int = 32
    sink_length: int = 4
    sliding: str = "compress"
    eviction: EvictionConfig | None = None

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            _codec(name, getattr(self, name))
        for name, least in (("group_size", 1), ("residual_length", 1), ("sink_length", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise expect(name, f"a whole number of at least {least}", value)
        if self.tokens_per_page not in PAGE_SIZES:
            name = "group_size" if self.page_size is None else "page_size"
            raise expect(name, f"one of {', '.join(map(str, PAGE_SIZES))}", self.tokens_per_page)
        if self._groups_of_tokens and self.tokens_per_page % self.group_size:
            raise expect("group_size", f"a divisor of page_size {self.tokens_per_page}", self.group_size)
        choose("sliding", self.sliding, ("compress", "exact", "evict"))
        if self.eviction is not None:
            self._check_eviction(self.eviction)

    def _check_eviction(self, eviction: EvictionConfig) -> None:
        if isinstance(eviction.budget, int) and eviction.budget < self.least_budget:
            raise expect(
                "budget",
                f"at least {self.least_budget} tokens: sink_length {self.sink_length}, residual_length "
                f"{self.residual_length} and a page of {self.tokens_per_page}, twice",
                eviction.budget,
            )
        for tier in eviction.tiers:
            if tier != HOST:
                _codec("demote_to", tier)
        if isinstance(eviction.keep_exact, int) and eviction.keep_exact and not self.token_wise:
            raise expect("keep_exact", f"0 beside {self.keys}, which packs tokens together", eviction.keep_exact)

    @property
    def token_wise(self) -> bool:
        """Every token is packed by itself."""
        return all(FAMILIES[_codec(name, getattr(self, name))[0]][0].token_wise for name in ("keys", "values"))

    @property
    def least_budget(self) -> int:
        """Tokens that a layer with a policy can always hold to: what is exact, a page being filled and one sealed."""
        return self.sink_length + self.residual_length + 2 * self.tokens_per_page

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the settings of eviction beside the others, as `CacheConfig.make` takes them."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "eviction"}
        return {**own, **({"policy": NO_POLICY} if self.eviction is None else self.eviction.to_dict())}

    @property
    def _groups_of_tokens(self) -> bool:
        """A codec's groups run along the tokens of a page."""
        return bool({_codec(name, getattr(self, name))[0] for name in ("keys", "values")} & {"channel", "kivi"})

    @property
    def tokens_per_page(self) -> int:
        """`page_size`, or what it is when none is given."""
        if self.page_size is not None:
            return self.page_size
        return max(self.group_size, PAGE_SIZE) if self._groups_of_tokens else PAGE_SIZE


@dataclass(frozen=True)
class CacheConfig:
    """Settings of the whole cache: what every layer does, and what single layers do otherwise.

    Args:
        default: every layer, but for
        layers: single ones by number.
        budget_bytes: bytes that the whole cache may hold, or None.
        layer_budget: how the layers that evict share the budget: "uniform", "pyramid", "pyramid:BETA", or weights.
    """

    default: LayerConfig = field(default_factory=LayerConfig)
    layers: Mapping[int, LayerConfig] = field(default_factory=dict)
    budget_bytes: int | None = None
    layer_budget: str | tuple[float, ...] = "uniform"

    def for_layer(self, index: int) -> LayerConfig:
        return self.layers.get(index, self.default)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` reads back."""
        own = self.default.to_dict()
        if self.budget_bytes is not None:
            own["budget"] = f"{self.budget_bytes}B"
        shares = self.layer_budget if isinstance(self.layer_budget, str) else list(self.layer_budget)
        return {**own, "layer_budget": shares, "layers": {str(i): layer.to_dict() for i, layer in self.layers.items()}}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> CacheConfig:
        return cls.make(**settings)

    @classmethod
    def make(
        cls,
        preset: str | None = None,
        codec: str | None = None,
        layers: Mapping[int | str, Mapping[str, Any]] | None = None,
        num_layers: int | None = None,
        layer_budget: str | Sequence[float] = "uniform",
        **settings: Any,
    ) -> CacheConfig:
        """From what a user writes; the rest comes from the preset, then from HF_KVCOMPRESS_*, then the default.

        Raises ValueError naming the argument, what was expected and what came.
        """
        for name in settings:
            if name not in KNOWN:
                choose("argument", name, (*KNOWN, "preset", "codec", "layers", "layer_budget"))
        base = {**_from_environment(), **({} if preset is None else PRESETS[_preset(preset)])}
        given = {**base, **_with_codec(codec, settings)}
        budget_bytes = parse_bytes(given.pop("budget")) if isinstance(given.get("budget"), str) else None
        if budget_bytes is not None:
            given.setdefault("policy", DEFAULT_POLICY)
        default = _layer_config(LayerConfig(), given)
        overrides = {}
        for index, override in (layers or {}).items():
            number = _layer_number(index, num_layers)
            if isinstance(override, LayerConfig):
                overrides[number] = override
                continue
            if not isinstance(override, Mapping):
                raise expect(f"layers[{index}]", "a mapping of settings, such as {'codec': 'int8'}", override)
            override = dict(override)
            preset_of_layer = override.pop("preset", None)
            named = {} if preset_of_layer is None else PRESETS[_preset(preset_of_layer)]
            for name in override:
                if name not in KNOWN and name != "codec":
                    choose(f"layers[{index}]", name, (*KNOWN, "codec", "preset"))
            own = {**named, **_with_codec(override.pop("codec", None), override)}
            overrides[number] = _layer_config(default, own)
        shares = layer_budget if isinstance(layer_budget, str) else tuple(layer_budget)
        layer_weights(shares, 1 if isinstance(shares, str) else len(shares))
        return cls(default, overrides, budget_bytes, shares)


def with_shares(layers: Sequence[LayerConfig], weights: Sequence[float]) -> list[LayerConfig]:
    """The layers with their weight's part of the budget: tokens no fewer than a layer needs, ratios up to 1."""
    evictions = [layer.eviction for layer in layers]
    budgets = [None if own is None else own.budget for own in evictions]
    scaled = [None if b is None else b * weight for b, weight in zip(budgets, weights, strict=True)]
    counted = [i for i, budget in enumerate(budgets) if isinstance(budget, int)]
    tokens = share_tokens([scaled[i] or 0.0 for i in counted], [layers[i].least_budget for i in counted])
    shares: list[int | float | None] = [None if share is None else min(share, 1.0) for share in scaled]
    for i, share in zip(counted, tokens, strict=True):
        shares[i] = share
    return [
        layer if own is None else replace(layer, eviction=replace(own, budget=share))
        for layer, own, share in zip(layers, evictions, shares, strict=True)
    ]


#: what scores tokens where a budget is given and no policy
DEFAULT_POLICY = "h2o"
_OF_EVICTION = tuple(f.name for f in fields(EvictionConfig))
KNOWN = (*(f.name for f in fields(LayerConfig) if f.name != "eviction"), *_OF_EVICTION)


def _layer_config(base: LayerConfig, given: Mapping[str, Any]) -> LayerConfig:
    """`base` with the settings given, those of eviction sorted into their own object."""
    eviction = base.eviction
    wanted = {name: value for name, value in given.items() if name in _OF_EVICTION}
    if wanted.get("policy") == NO_POLICY:
        eviction = None
    elif wanted:
        if eviction is not None and wanted.get("policy", eviction.policy) != eviction.policy:
            wanted.setdefault("policy_options", {})  # those of another policy mean nothing to this one
        eviction = replace(eviction or EvictionConfig(policy=DEFAULT_POLICY), **wanted)
    return replace(base, **{n: v for n, v in given.items() if n not in _OF_EVICTION}, eviction=eviction)


def _preset(name: object) -> str:
    return choose("preset", name, tuple(PRESETS))


def _with_codec(codec: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in settings.items() if value is not None}
    if codec is None:
        return given
    _codec("codec", codec)
    return {"keys": codec, "values": codec, **given}


def _layer_number(index: int | str, num_layers: int | None) -> int:
    try:
        number = int(index)
    except (TypeError, ValueError):
        raise expect("layers", "layer numbers as keys", index) from None
    if number < 0 or (num_layers is not None and number >= num_layers):
        span = "a layer number from 0 on" if num_layers is None else f"layer numbers from 0 to {num_layers - 1}"
        raise expect("layers", span, number)
    return number


def _from_environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    if preset := os.environ.get(ENVIRONMENT + "PRESET"):
        found.update(PRESETS[choose(ENVIRONMENT + "PRESET", preset, tuple(PRESETS))])
    for name in KNOWN:
        value = os.environ.get(ENVIRONMENT + name.upper())
        if value is None:
            continue
        default = getattr(EvictionConfig if name in _OF_EVICTION else LayerConfig, name, None)
        number = _number(value)
        if number is None and isinstance(default, int | float):
            raise expect(ENVIRONMENT + name.upper(), "a whole number" if type(default) is int else "a number", value)
        found[name] = value if number is None else number
    return found


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None
