"""Every kind of cache the conformance suite covers. A new strategy adds one line here and gets the whole suite.

Windows and pages are small, so that short prompts really seal pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hf_kvcompress as kvc

PAGE, RESIDUAL, SINKS = 8, 8, 2
CORE = ("llama", "mistral", "gemma3")  # full, sliding, both
SLIDING = ("mistral", "gemma3", "gemma2", "gpt_oss", "llama4", "gemma4")
SMALL = {"page_size": PAGE, "residual_length": RESIDUAL, "sink_length": SINKS, "group_size": PAGE}


@dataclass(frozen=True)
class Factory:
    """How to make one kind of cache.

    Args:
        make: takes the model's config (or None) and settings that override its own.
        exact: stores everything and loses nothing: must equal `DynamicCache`.
        full: run every way of generating on every model, not only a representative few.
        models: the models it runs on; all if empty.
        learns: packs with statistics of the tokens before, so chunking may change pages within the codec's bound.
    """

    name: str
    make: Callable[..., Any]
    exact: bool = False
    full: bool = False
    models: tuple[str, ...] = ()
    learns: bool = False

    def runs_on(self, model: str) -> bool:
        return not self.models or model in self.models

    def __call__(self, config: Any = None, **settings: Any) -> Any:
        return self.make(config, **settings)


def _with(cls: type, **fixed: Any) -> Callable[..., Any]:
    return lambda config=None, **settings: cls(config, **{**SMALL, **fixed, **settings})


def _without_config(**fixed: Any) -> Callable[..., Any]:
    return lambda config=None, **settings: kvc.CompressedCache(**{**SMALL, **fixed, **settings})


EXACT = [
    Factory("identity", _with(kvc.CompressedCache, codec="identity"), exact=True, full=True),
    Factory("identity-no-config", _without_config(codec="identity"), exact=True),
    Factory(
        "identity-sliding-exact",
        _with(kvc.CompressedCache, codec="identity", sliding="exact"),
        exact=True,
        models=SLIDING,
    ),
    Factory("identity-page-of-32", _with(kvc.CompressedCache, codec="identity", page_size=32), exact=True, models=CORE),
    Factory("identity-no-sinks", _with(kvc.CompressedCache, codec="identity", sink_length=0), exact=True, models=CORE),
]
CODECS = ("fp8", "int8", "int4", "int2", "kivi4", "kivi2", "turbo4", "turbo3", "eqrot4", "eqrot3", "eqrot2")
LOSSY = [
    Factory(codec, _with(kvc.CompressedCache, codec=codec), learns=codec.startswith("eqrot")) for codec in CODECS
] + [
    Factory("KIVICache", _with(kvc.KIVICache)),
    Factory("TurboQuantCache", _with(kvc.TurboQuantCache)),
    Factory("EqRotCache", _with(kvc.EqRotCache), learns=True),
    Factory("FP8Cache", _with(kvc.FP8Cache)),
    Factory("Int8Cache", _with(kvc.Int8Cache)),
    Factory("keys-eqrot4-values-int2", _with(kvc.CompressedCache, keys="eqrot4", values="int2"), learns=True),
    Factory(
        "layer-override",
        _with(kvc.CompressedCache, codec="kivi2", layers={0: {"codec": "int8"}, 1: {"keys": "eqrot3"}}),
        learns=True,
    ),
]
