"""Launchers as torch.library ops, so that torch.compile traces through them.

An op writes to tensors that it is given and returns nothing, which makes its fake version empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "hf_kvcompress"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(signature: str) -> Callable[[Callable[..., None]], Callable[..., Any]]:
    """Decorate a launcher named as its op; `signature` is the schema's argument list with the written ones marked."""

    def wrap(launcher: Callable[..., None]) -> Callable[..., Any]:
        name = launcher.__name__
        _LIBRARY.define(f"{name}({signature}) -> ()")
        _LIBRARY.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args, **kwargs: None, lib=_LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return wrap
