"""The caches that a comparison runs, by the name a user types."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import Cache, DynamicCache, QuantizedCache

from ..cache import CompressedCache
from ..codecs.registry import codec_names
from ..config import PRESETS, LayerConfig
from ..enable import enable

BASELINE = "uncompressed"
QUANTO = {"quanto4": 4, "quanto2": 2}
#: transformers' QuantizedCache refuses hybrid models; this puts its layer where a layer attends to everything
QUANTO_FULL = {"quanto4-full": 4, "quanto2-full": 2}


class Unavailable(Exception):
    """This cache cannot run here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """A cache to compare. `make` builds an empty one, `around(model)` is active while it runs."""

    name: str
    make: Callable[[], Any]
    around: Callable[[Any], AbstractContextManager[Any]] = lambda model: nullcontext()
    #: a peer that breaks is reported in its row; one of ours that breaks ends the run
    peer: bool = False
    note: str = ""


def default_names(config: Any) -> list[str]:
    """Uncompressed, the presets and transformers' quantized cache, as far as the model has a use for each."""
    hybrid = "sliding_attention" in (getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    return [BASELINE, *PRESETS, "quanto4", *(["quanto4-full"] if hybrid else [])]


def check_name(name: str) -> None:
    """Raise ValueError for a name that `contender` does not know."""
    if name in (BASELINE, *PRESETS, *QUANTO, *QUANTO_FULL):
        return
    codecs = name.split("/")
    if len(codecs) > 2:
        raise ValueError(f"caches: expected one codec, or KEYS/VALUES, got {name!r}")
    for codec in codecs:
        if codec not in codec_names():
            known = ", ".join((BASELINE, *PRESETS, *QUANTO, *QUANTO_FULL, *codec_names()))
            raise ValueError(f"caches: expected names among {known}, got {codec!r}")
    LayerConfig(keys=codecs[0], values=codecs[-1])


def contender(name: str, config: Any) -> Contender:
    """The cache called `name` for a model with this config.

    Raises:
        ValueError: an unknown name.
        Unavailable: a known one that cannot run here.
    """
    check_name(name)
    if name == BASELINE:
        return Contender(name, lambda: DynamicCache(config=config))
    if name in QUANTO or name in QUANTO_FULL:
        return _quanto(name, config)
    if name in PRESETS:
        return Contender(name, lambda: CompressedCache(config, preset=name), enable)
    codecs = name.split("/")
    return Contender(name, lambda: CompressedCache(config, keys=codecs[0], values=codecs[-1]), enable)


def _quanto(name: str, config: Any) -> Contender:
    if importlib.util.find_spec("optimum.quanto" if importlib.util.find_spec("optimum") else "optimum") is None:
        raise Unavailable("needs optimum-quanto: pip install 'hf_kvcompress[quanto]'")
    if name in QUANTO_FULL:
        note = "transformers' quanto layer in the layers with full attention, sliding layers exact"
        return Contender(name, lambda: _quanto_full(config, QUANTO_FULL[name]), peer=True, note=note)

    def make() -> Any:
        return QuantizedCache("quanto", config, nbits=QUANTO[name])

    try:
        make()
    except ValueError as error:
        if "full attention" not in str(error):
            raise
        raise Unavailable("QuantizedCache refuses models with sliding layers") from None
    return Contender(name, make, peer=True, note="transformers.QuantizedCache")


def _quanto_full(config: Any, nbits: int) -> Cache:
    """transformers' own layers: quantized where a layer attends to everything, windowed where it slides."""
    flat = copy.deepcopy(config.get_text_config(decoder=True))
    kinds, flat.layer_types = flat.layer_types, ["full_attention"] * flat.num_hidden_layers
    quantized, exact = QuantizedCache("quanto", flat, nbits=nbits).layers, DynamicCache(config=config).layers
    return Cache(
        layers=[q if kind == "full_attention" else e for q, e, kind in zip(quantized, exact, kinds, strict=True)]
    )
