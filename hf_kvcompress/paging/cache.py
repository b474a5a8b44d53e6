"""`PagedCache`: a compressed cache whose sealed pages are in a pool, shared by whoever is copied from it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..cache import CompressedCache
from ..config import expect
from ..layer import CompressedLayer
from ..pages import PageStore
from .pages import PagedStore
from .pool import BlockPool, GrowingPool

BLOCK_BYTES = 256  # of a private pool: little is lost at the end of an entry


class PagedCache(CompressedCache):
    """A `CompressedCache` whose sealed pages live in blocks of a pool, in any codec.

    Copies of rows (beams, `num_return_sequences`, `fork`) share blocks until one of them writes; blocks that nobody
    holds are used again. Sinks and the recent window stay with the cache.

    Args:
        config: the model's config.
        pool: from `MemoryManager.allocate_pool`; None for a private one that grows as it must.
        settings: as for `CompressedCache`; policies that evict have stores of their own and are refused.

    Raises PoolFullError, in a pass, if the pool has no blocks left.
    """

    def __init__(self, config: PreTrainedConfig | None = None, *, pool: BlockPool | None = None, **settings: Any):
        super().__init__(config, **settings)
        self.pool = pool
        if any(layer.eviction is not None for layer in (self.settings.default, *self.settings.layers.values())):
            raise expect(
                "policy", "none: pages of which tokens go cannot be shared", self.settings.default.to_dict()["policy"]
            )

    @classmethod
    def from_settings(
        cls, config: Any, settings: Mapping[str, Any], pool: BlockPool | None = None, **more: Any
    ) -> PagedCache:
        """An empty cache with settings as `CacheConfig.to_dict` gives them."""
        cache = super().from_settings(config, settings, **more)
        cache.pool = pool
        return cache

    def fork(self) -> PagedCache:
        """A cache that holds the same and goes its own way; sealed pages are shared until one of both writes."""
        self.commit()
        return copy.deepcopy(self)

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As for `CompressedCache`. The first tokens of a layer are staged, not sealed, when it gets its store."""
        staged = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._prepare(self.layers[layer_idx])
        return staged

    def _prepare(self, layer: Any) -> None:
        storage = layer.storage if isinstance(layer, CompressedLayer) else None
        if storage is not None and type(storage.pages) is PageStore:
            pool = self.pool
            if pool is None:
                pool = GrowingPool(f"layer {layer.index}", BLOCK_BYTES, storage.device)
            elif pool.device != storage.device:
                raise expect("pool", f"a pool on {storage.device}, as layer {layer.index} is", str(pool.device))
            storage.pages = PagedStore.of(storage.pages, pool)
