"""Settings of a compressed cache: validated, frozen, JSON-ready."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from .codecs.registry import parse

#: keys and values codec of each preset; bits per number at head size 256
PRESETS: dict[str, dict[str, str]] = {
    "near-lossless": {"keys": "int8", "values": "int8"},
    "balanced": {"keys": "eqrot4", "values": "eqrot4"},
    "small": {"keys": "eqrot3", "values": "eqrot3"},
    "tiny": {"keys": "eqrot3", "values": "eqrot2"},
}
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


def _codec(argument: str, name: object) -> tuple[str, int]:
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
        sliding: "compress" packs the window of sliding layers, "exact" leaves it to transformers' own layer.
    """

    keys: str = "eqrot4"
    values: str = "eqrot4"
    page_size: int | None = None
    group_size: int = 64
    residual_length: int = 32
    sink_length: int = 4
    sliding: str = "compress"

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
        choose("sliding", self.sliding, ("compress", "exact"))

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
    """Settings of the whole cache: what every layer does, and what single layers do otherwise."""

    default: LayerConfig = field(default_factory=LayerConfig)
    layers: Mapping[int, LayerConfig] = field(default_factory=dict)

    def for_layer(self, index: int) -> LayerConfig:
        return self.layers.get(index, self.default)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` reads back."""
        return {**asdict(self.default), "layers": {str(i): asdict(layer) for i, layer in self.layers.items()}}

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
        **settings: Any,
    ) -> CacheConfig:
        """From what a user writes; the rest comes from the preset, then from HF_KVCOMPRESS_*, then the default.

        Raises ValueError naming the argument, what was expected and what came.
        """
        known = {f.name: f.type for f in fields(LayerConfig)}
        for name in settings:
            if name not in known:
                choose("argument", name, (*known, "preset", "codec", "layers"))
        base = {**_from_environment(known), **({} if preset is None else PRESETS[_preset(preset)])}
        default = LayerConfig(**{**base, **_with_codec(codec, settings)})
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
                if name not in known and name != "codec":
                    choose(f"layers[{index}]", name, (*known, "codec", "preset"))
            own = {**named, **_with_codec(override.pop("codec", None), override)}
            overrides[number] = replace(default, **own)
        return cls(default, overrides)


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


def _from_environment(known: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if preset := os.environ.get(ENVIRONMENT + "PRESET"):
        found.update(PRESETS[choose(ENVIRONMENT + "PRESET", preset, tuple(PRESETS))])
    for name in known:
        value = os.environ.get(ENVIRONMENT + name.upper())
        if value is None:
            continue
        if isinstance(getattr(LayerConfig, name), int) or value.isdecimal():
            try:
                found[name] = int(value)
            except ValueError:
                raise expect(ENVIRONMENT + name.upper(), "a whole number", value) from None
        else:
            found[name] = value
    return found
