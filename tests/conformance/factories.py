"""Every kind of cache the conformance suite covers. A new strategy adds one line here and gets the whole suite.

Windows and pages are small, so that short prompts really seal pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import hf_kvcompress as kvc
from hf_kvcompress.paging.cache import PagedCache
from hf_kvcompress.policies.registry import POLICIES

from ..calibrated import calibration_for

PAGE, RESIDUAL, SINKS = 8, 8, 2
CORE = ("llama", "mistral", "gemma3")  # full, sliding, both
EXPANDING = ("deepseek_v3",)  # caches a latent and attends to what it makes of it
SLIDING = ("mistral", "gemma3", "gemma2", "gpt_oss", "llama4", "gemma4")
KVCOMPRESS = "kvcompress"
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
        attentions: the attentions it runs under; all if empty.
        needs_config: refuses to be made without one.
        evicts: keeps only some tokens, by rows, which models that expand what they cache before attention never show.
    """

    name: str
    make: Callable[..., Any]
    exact: bool = False
    full: bool = False
    models: tuple[str, ...] = ()
    learns: bool = False
    attentions: tuple[str, ...] = ()
    evicts: bool = False
    needs_config: bool = False

    def runs_on(self, model: str) -> bool:
        return (not self.models or model in self.models) and not (self.evicts and model in EXPANDING)

    def runs_under(self, attention: str, mode: str = "greedy") -> bool:
        plain = attention != KVCOMPRESS
        return not (plain and self.evicts and mode not in SINGLE_ROW) and attention in (self.attentions or (attention,))

    def __call__(self, config: Any = None, **settings: Any) -> Any:
        return self.make(config, **settings)


def _with(cls: type, **fixed: Any) -> Callable[..., Any]:
    return lambda config=None, **settings: cls(config, **{**SMALL, **fixed, **settings})


def _needs_options(policy: type) -> bool:
    parameters = list(signature(policy).parameters.values())
    return any(
        p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL for p in parameters
    )


def _without_config(**fixed: Any) -> Callable[..., Any]:
    return lambda config=None, **settings: kvc.CompressedCache(**{**SMALL, **fixed, **settings})


def _cpac(config: Any = None, **settings: Any) -> Any:
    """Keys compared before their rotation, where a config says which."""
    return kvc.CPACCache(config, **{**SMALL, "frame": "rotated" if config is None else "unrotated", **settings})


EXACT = [
    Factory("identity", _with(kvc.CompressedCache, codec="identity"), exact=True, full=True),
    Factory("identity-no-config", _without_config(codec="identity"), exact=True),
    Factory(
        "identity-sliding-exact",
        _with(kvc.CompressedCache, codec="identity", sliding="exact"),
        exact=True,
        models=SLIDING,
    ),
    Factory("PagedCache-identity", _with(PagedCache, codec="identity"), exact=True, full=True),
    Factory("identity-page-of-32", _with(kvc.CompressedCache, codec="identity", page_size=32), exact=True, models=CORE),
    Factory("identity-no-sinks", _with(kvc.CompressedCache, codec="identity", sink_length=0), exact=True, models=CORE),
]
CODECS = ("fp8", "int8", "int4", "int2", "kivi4", "kivi2", "turbo4", "turbo3", "eqrot4", "eqrot3", "eqrot2")


def _transform(config: Any = None, **settings: Any) -> Any:
    """Made for the very model that the config is of, from random tokens."""
    given = {**SMALL, "calibration": config and calibration_for(config), **settings}
    return kvc.TransformCache(config, **given)


LOSSY = [
    Factory(codec, _with(kvc.CompressedCache, codec=codec), learns=codec.startswith("eqrot")) for codec in CODECS
] + [
    Factory("KIVICache", _with(kvc.KIVICache)),
    Factory("PagedCache", _with(PagedCache, codec="int4")),
    Factory("TurboQuantCache", _with(kvc.TurboQuantCache)),
    Factory("EqRotCache", _with(kvc.EqRotCache), learns=True),
    Factory("CPACCache", _with(kvc.CPACCache, frame="rotated"), learns=True),
    Factory("TransformCache", _transform, models=(*CORE, "cohere2", "phi3", "gpt_oss"), needs_config=True),
    Factory("CPACCache-unrotated", _cpac, learns=True, models=CORE),
    Factory("CPACCache-kivi2", _with(kvc.CPACCache, codec="kivi2", frame="rotated")),
    Factory("FP8Cache", _with(kvc.FP8Cache)),
    Factory("Int8Cache", _with(kvc.Int8Cache)),
    Factory("keys-eqrot4-values-int2", _with(kvc.CompressedCache, keys="eqrot4", values="int2"), learns=True),
    Factory(
        "layer-override",
        _with(kvc.CompressedCache, codec="kivi2", layers={0: {"codec": "int8"}, 1: {"keys": "eqrot3"}}),
        learns=True,
    ),
]

# -- policies: every one in the registry that needs no file of its own -------------------------------------------------

#: tokens that a cache with small pages may hold: fewer than the zoo's prompts have, little more than it can do with
TIGHT = 28
SINGLE_ROW = ("greedy", "sampling", "prompt_lookup", "assistant", "prefill_chunks", "inputs_embeds", "second_turn")
SINGLE_ROW = (*SINGLE_ROW, "token_loop", "chunk_loop")
NAMES = tuple(name for name, policy in POLICIES.items() if not _needs_options(policy))


def _policy(label: str, policy: str, exact: bool = False, models: tuple[str, ...] = (), **settings: Any) -> Factory:
    """A plain attention shows neither queries nor padding: some policies refuse it, all refuse batches under it."""
    plain = POLICIES[policy].capture == "none" and not {"head_budget", "layer_budget", "demote_to"} & set(settings)
    return Factory(
        label,
        _with(kvc.CompressedCache, policy=policy, **settings),
        exact=exact,
        full=exact and policy == "h2o",
        models=models,
        learns=str(settings.get("codec")).startswith("eqrot"),
        attentions=() if plain else (KVCOMPRESS,),
        evicts=True,
    )


EXACT += [
    _policy(f"{name}-unlimited", name, exact=True, models=() if name == "h2o" else ("gemma3",), codec="identity")
    for name in NAMES
]
EXACT.append(
    _policy("h2o-sliding-unlimited", "h2o", exact=True, models=("gemma3", "gpt_oss"), codec="identity", sliding="evict")
)
CODEC_KINDS = ("identity", "eqrot4", "kivi4")  # exact, with statistics, packed page by page
_PLAIN = [_policy(f"{name}-{codec}", name, codec=codec, budget=TIGHT) for name in NAMES for codec in CODEC_KINDS]
_WRAPPED = [
    _policy("adaptive", "snapkv", codec="eqrot4", budget=TIGHT, head_budget="adaptive"),
    _policy("pyramid", "h2o", codec="identity", budget=TIGHT + 8, layer_budget="pyramid:4"),
    _policy("chunks-of-4", "h2o", codec="identity", budget=TIGHT, chunk_size=4),
    _policy("sliding", "h2o", codec="eqrot4", budget=TIGHT, sliding="evict"),
    _policy("ratio", "h2o", codec="int4", budget=0.5),
    _policy("merging", "h2o", codec="eqrot4", budget=TIGHT, merge=True),
    _policy("demoting", "h2o", codec="identity", budget=TIGHT, demote_to="int2", demote_budget=24),
    _policy("to-host", "snapkv", codec="int4", budget=TIGHT, demote_to="cpu"),
    _policy(
        "three-tiers",
        "importance",
        codec="identity",
        budget=TIGHT,
        demote_to=("int8", "int4", "cpu"),
        demote_budget=(8, 16, None),
        hysteresis=0.1,
    ),
]
EVICTING = _PLAIN + _WRAPPED
#: whatever policies ask for, every kind of codec, every wrapper
EVICTING_FEW = [
    f for f in _PLAIN if f.name in ("random-identity", "h2o-eqrot4", "snapkv-kivi4", "tova-identity")
] + _WRAPPED
