"""`PagedCache`: a compressed cache whose sealed pages are in a pool, shared by whoever is copied from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakMethod

import torch
from transformers import PreTrainedConfig

from ..cache import CompressedCache
from ..config import expect
from ..layer import CompressedLayer
from ..pages import PageStore
from .pages import PagedStore
from .pool import BlockPool, GrowingPool, PoolFullError
from .reserving import runs_needed

BLOCK_BYTES = 256  # of a private pool: little is lost at the end of an entry


class PagedCache(CompressedCache):
    """A `CompressedCache` whose sealed pages live in blocks of a pool, in any codec.

    Copies of rows (beams, `num_return_sequences`, `fork`) share blocks until one of them writes; blocks that nobody
    holds are used again. Sinks and the recent window stay with the cache.

    Args:
        config: the model's config.
        pool: from `MemoryManager.allocate_pool`; None for a private one that grows as it must.
        settings: as for `CompressedCache`; policies that evict have stores of their own and are refused.

    Raises PoolFullError, in a pass, if the pool has too few blocks left. The cache then is what it was before the pass.
    """

    def __init__(self, config: PreTrainedConfig | None = None, *, pool: BlockPool | None = None, **settings: Any):
        super().__init__(config, **settings)
        self.pool = pool
        self._is_first_pass = True
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
        layer = self._layer(layer_idx)
        if isinstance(layer, CompressedLayer) and layer is next(self.packed_layers()):
            self._begin_pass(layer, key_states.shape[2])
        staged = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._prepare(self.layers[layer_idx])
        return staged

    def _begin_pass(self, first: CompressedLayer, length: int) -> None:
        """Take all blocks that the pass needs, or none of them."""
        self.commit()
        self._is_first_pass = first.storage is None
        if first.storage is None or self.pool is None:
            return
        kept = None
        if first.plan is not None and (first.plan.start, first.plan.q_length) == (first.seen, length):
            kept = first.plan.kept()
        new = [length] * first.storage.batch if kept is None else [len(own) for own in kept]
        try:
            for layer, store in self._stores():
                assert layer.storage is not None
                store.reserve(*runs_needed(layer.storage, new, layer.record_past))
        except PoolFullError:
            self.commit()
            raise

    def commit(self) -> None:
        """As for `CompressedCache`; blocks that were taken for the pass and not used are given back."""
        super().commit()
        for _, store in self._stores():
            store.spare.clear()

    def _stores(self) -> Iterator[tuple[CompressedLayer, PagedStore]]:
        for layer in self.packed_layers():
            if layer.storage is not None and isinstance(layer.storage.pages, PagedStore):
                yield layer, layer.storage.pages

    def _undo_first_pass(self) -> None:
        # What later layers will need is not known before they have seen their first keys: there is nothing to keep.
        if self._is_first_pass:
            self.reset()

    def _prepare(self, layer: Any) -> None:
        storage = layer.storage if isinstance(layer, CompressedLayer) else None
        if storage is not None and type(storage.pages) is PageStore:
            pool = self.pool
            if pool is None:
                pool = GrowingPool(f"layer {layer.index}", BLOCK_BYTES, storage.device)
            elif pool.device != storage.device:
                raise expect("pool", f"a pool on {storage.device}, as layer {layer.index} is", str(pool.device))
            storage.pages = PagedStore.of(storage.pages, pool)
            undo = WeakMethod(self._undo_first_pass)
            storage.pages.undo = lambda: call() if (call := undo()) is not None else None
