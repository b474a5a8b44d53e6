"""Select the "kvcompress" attention of a model, and put back what was there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from .attention import kvcompress_attention
from .masks import kvcompress_mask
from .watching import AttentionCall, Watcher, shown_to

NAME = "kvcompress"

AttentionInterface.register(NAME, kvcompress_attention)
AttentionMaskInterface.register(NAME, kvcompress_mask)

# What each enabled model had, innermost last. Kept here and not on the model: a model is left as it was found.
_previous: WeakKeyDictionary[PreTrainedModel, list[dict[int, tuple[PreTrainedConfig, Any]]]] = WeakKeyDictionary()


class Enabled:
    """What `enable` returns: nothing to do with it, or a context manager that disables again."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        disable(self.model)


def _configs(parts: list[PreTrainedModel]) -> Iterator[PreTrainedConfig]:
    seen: set[int] = set()
    waiting = [module.config for module in parts]
    while waiting:
        config = waiting.pop()
        if id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        inner = (getattr(config, name, None) for name in config.sub_configs)
        waiting += [config for config in inner if config is not None]


def enable(model: PreTrainedModel) -> Enabled:
    """Let `model` read compressed caches directly: selects the "kvcompress" attention until `disable(model)`.

    Also a context manager: `with enable(model): ...`. Other caches, or none, give what sdpa gives.

    Raises ValueError if the model cannot choose its attention through transformers' attention interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = {id(config): (config, config._attn_implementation_internal) for config in _configs(parts)}
    able = [module for module in parts if module._can_set_attn_implementation()]
    if not able:
        raise ValueError(
            f"model: expected a model that chooses its attention through transformers' AttentionInterface, got "
            f"{type(model).__name__}. A CompressedCache still works with it, without enable()."
        )
    for module in able:
        module.config._attn_implementation_internal = NAME
    _previous.setdefault(model, []).append(before)
    return Enabled(model)


def disable(model: PreTrainedModel) -> None:
    """Put back the attention implementations that `enable(model)` found. Nothing to do if it is not enabled."""
    stack = _previous.get(model)
    if not stack:
        return
    for config, implementation in stack.pop().values():
        config._attn_implementation_internal = implementation
    if not stack:
        del _previous[model]


@contextmanager
def watching(model: PreTrainedModel, watcher: Watcher) -> Iterator[None]:
    """Show `watcher` every call of the model's attention; afterwards the model has the attention it had before."""
    own = set(model.modules())

    def of_model(call: AttentionCall) -> None:
        if call.module in own:
            watcher(call)

    with enable(model), shown_to(of_model):
        yield
