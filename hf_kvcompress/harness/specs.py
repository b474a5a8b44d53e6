"""Caches by what a user types: `balanced`, `h2o:budget=0.25,codec=kivi4`, `transformers:quanto4`, `KIVICache`."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from transformers import Cache, DynamicCache, QuantizedCache

from .. import cpac, hierarchical, policy_strategies, strategies
from ..cache import CompressedCache
from ..codecs.registry import codec_class, codec_names
from ..config import PRESETS
from ..enable import enable
from ..policies.registry import POLICIES

BASELINE = "uncompressed"
NONE = "none"
PEER = "transformers:"
#: transformers' QuantizedCache refuses hybrid models; "-full" puts its layer where a layer attends to everything
QUANTO = {"quanto4": 4, "quanto2": 2, "quanto4-full": 4, "quanto2-full": 2}
PEERS = tuple(PEER + name for name in QUANTO)
CLASSES: dict[str, type[CompressedCache]] = {
    name: found
    for module in (strategies, policy_strategies, cpac, hierarchical)
    for name, found in vars(module).items()
    if isinstance(found, type) and issubclass(found, CompressedCache)
}


class Unavailable(Exception):
    """This cache cannot run here; the message says why."""


@dataclass(frozen=True)
class Entrant:
    """A cache that is ready to run. `make` builds an empty one, `around(model)` is active while it runs."""

    name: str
    make: Callable[[], Any]
    around: Callable[[Any], AbstractContextManager[Any]] = lambda model: nullcontext()
    #: a peer that breaks is reported in its row; one of ours that breaks ends the run
    peer: bool = False
    note: str = ""


@dataclass(frozen=True)
class CacheSpec:
    """A cache by name, with its settings: JSON-ready, and a text that `parse` reads back.

    Args:
        head: "none", a preset, a codec or KEYS/VALUES, a policy, a class, "transformers:quanto4", or a dotted path to a
            class or function of yours that takes the model's config.
        settings: keyword arguments of the cache.
    """

    head: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_head(self.head)
        if self.settings and self.head in (NONE, *PEERS):
            raise ValueError(f"cache {self.head!r}: expected no settings, got {', '.join(self.settings)}")

    @classmethod
    def parse(cls, text: str) -> CacheSpec:
        """From `HEAD` or `HEAD:name=value,name=value`; a dot in a name reaches into a mapping (`layers.5.codec=int8`).

        Raises ValueError that quotes the text and says what is wrong with it.
        """
        text = text.strip()
        if text.startswith(PEER):
            head, _, rest = text.removeprefix(PEER).partition(":")
            head = PEER + head
        else:
            head, _, rest = text.partition(":")
        if head in QUANTO:
            head = PEER + head
        settings: dict[str, Any] = {}
        for part in _split(rest, text) if rest.strip() or text.endswith(":") else ():
            name, equals, value = part.partition("=")
            name = name.strip()
            if not equals or not name or not value.strip():
                raise ValueError(f"cache {text!r}: expected name=value after the colon, got {part.strip()!r}")
            _put(settings, name, _value(value.strip()), text)
        return cls(NONE if head == BASELINE else head, settings)

    @property
    def is_baseline(self) -> bool:
        return self.head == NONE

    @property
    def may_be_calibrated(self) -> bool:
        """The cache takes a calibration and packs with a codec that may need one."""
        names = [self.head, *(str(self.settings.get(name, "")) for name in ("codec", "keys", "values"))]
        asks = {codec for codec in codec_names() if codec_class(codec, "key").wants_context}
        return self.head == "TransformCache" or any(part in asks for name in names for part in name.split("/"))

    def __str__(self) -> str:
        parts = [f"{name}={_text(value)}" for name, value in _flat(self.settings)]
        return f"{self.head}:{','.join(parts)}" if parts else self.head

    def to_dict(self) -> dict[str, Any]:
        return {"head": self.head, "settings": copy.deepcopy(dict(self.settings))}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> CacheSpec:
        return cls(found["head"], dict(found["settings"]))

    def entrant(self, config: Any) -> Entrant:
        """The cache for a model with this config; settings are checked by making one.

        Raises:
            ValueError: naming the cache, its setting, what was expected and what came.
            Unavailable: it is known, and cannot run here.
        """
        name = BASELINE if self.is_baseline else str(self)
        if self.is_baseline:
            return Entrant(name, lambda: DynamicCache(config=config))
        if self.head in PEERS:
            return _quanto(self.head.removeprefix(PEER), config)
        kind, own = self._kind()
        settings = {**own, **self.settings}

        def make() -> Any:
            return kind(config, **copy.deepcopy(settings))

        try:
            made = make()
        except (TypeError, ValueError, OSError) as error:
            raise ValueError(f"cache {str(self)!r}: {error}") from None
        return Entrant(name, make, enable if isinstance(made, CompressedCache) else lambda model: nullcontext())

    def _kind(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        """What makes the cache, and the settings that its name stands for."""
        if self.head in PRESETS:
            return CompressedCache, {"preset": self.head}
        if self.head in POLICIES:
            return CompressedCache, {"policy": self.head}
        if self.head in CLASSES:
            return CLASSES[self.head], {}
        codecs = self.head.split("/")
        if all(codec in codec_names() for codec in codecs):
            return CompressedCache, {"keys": codecs[0], "values": codecs[-1]}
        return _own(self.head), {}


def known() -> tuple[str, ...]:
    """Every name that a spec may begin with."""
    return (NONE, *PRESETS, *POLICIES, *codec_names(), *CLASSES, *PEERS)


def _check_head(head: str) -> None:
    if head in known():
        return
    parts = head.split("/")
    if len(parts) == 2 and all(part in codec_names() for part in parts):
        return
    if len(parts) > 2:
        raise ValueError(f"cache {head!r}: expected one codec, or KEYS/VALUES")
    if len(parts) == 1 and "." in head and all(part.isidentifier() for part in head.split(".")):
        _own(head)
        return
    wrong = next((part for part in parts if part not in codec_names()), head)
    near = get_close_matches(wrong, known(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"cache: expected one of {', '.join(known())}, or KEYS/VALUES, got {wrong!r}{hint}")


def _own(path: str) -> Callable[..., Any]:
    """What a dotted path names."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cache {path!r}: expected a class or function that can be imported: {error}") from None
    if not callable(found):
        raise ValueError(f"cache {path!r}: expected a class or function, got {type(found).__name__}")
    return found  # type: ignore[no-any-return]


# -- texts of settings ---------------------------------------------------------------------------------------------


def _split(text: str, whole: str) -> list[str]:
    """At commas that are outside brackets and quotes."""
    parts, depth, quoted, start = [], 0, False, 0
    for index, letter in enumerate(text):
        quoted ^= letter == '"'
        depth += 0 if quoted else (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth and not quoted:
            parts.append(text[start:index])
            start = index + 1
    if depth or quoted:
        raise ValueError(f"cache {whole!r}: expected every bracket and quote to be closed")
    return [*parts, text[start:]]


def _value(text: str) -> Any:
    """JSON where it is JSON, true, false and none in any case, lists of bare words; else the text itself."""
    lower = text.lower()
    if lower in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(lower)
    try:
        return json.loads(text)
    except ValueError:
        pass
    if text.startswith("[") and text.endswith("]"):
        return [_value(part.strip()) for part in _split(text[1:-1], text) if part.strip()]
    try:
        return float(text)  # ".25" is no JSON
    except ValueError:
        return text


def _text(value: Any) -> str:
    """What `_value` reads back."""
    return value if isinstance(value, str) and _is_bare(value) else json.dumps(value)


def _is_bare(text: str) -> bool:
    return bool(text) and not set(text) & set(',=[]{}()" ') and _value(text) == text


def _put(settings: dict[str, Any], name: str, value: Any, whole: str) -> None:
    *path, last = name.split(".")
    for step in path:
        settings = settings.setdefault(step, {})
        if not isinstance(settings, dict):
            raise ValueError(f"cache {whole!r}: expected {step!r} to be given once, or by parts alone")
    if last in settings:
        raise ValueError(f"cache {whole!r}: expected {name!r} once")
    settings[last] = value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value and all(isinstance(n, str) and "." not in n for n in value):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


# -- transformers' own ---------------------------------------------------------------------------------------------


def _quanto(name: str, config: Any) -> Entrant:
    if importlib.util.find_spec("optimum.quanto" if importlib.util.find_spec("optimum") else "optimum") is None:
        raise Unavailable("needs optimum-quanto: pip install 'hf_kvcompress[quanto]'")
    nbits = QUANTO[name]
    if name.endswith("-full"):
        note = "transformers' quanto layer in the layers with full attention, sliding layers exact"
        return Entrant(PEER + name, lambda: _quanto_full(config, nbits), peer=True, note=note)

    def make() -> Any:
        return QuantizedCache("quanto", config, nbits=nbits)

    try:
        make()
    except ValueError as error:
        if "full attention" not in str(error):
            raise
        raise Unavailable("QuantizedCache refuses models with sliding layers") from None
    return Entrant(PEER + name, make, peer=True, note="transformers.QuantizedCache")


def _quanto_full(config: Any, nbits: int) -> Cache:
    """transformers' own layers: quantized where a layer attends to everything, windowed where it slides."""
    flat = copy.deepcopy(config.get_text_config(decoder=True))
    kinds, flat.layer_types = flat.layer_types, ["full_attention"] * flat.num_hidden_layers
    quantized, exact = QuantizedCache("quanto", flat, nbits=nbits).layers, DynamicCache(config=config).layers
    return Cache(
        layers=[q if kind == "full_attention" else e for q, e, kind in zip(quantized, exact, kinds, strict=True)]
    )
