"""One attention layer of the cache, as transformers sees it: it stages a pass, hands out lazy tensors, commits.

`update` stages the new tokens and returns two lazy tensors; the attention computes with what is stored plus the exact
chunk; `commit` then drops padding, appends and seals. Without the "kvcompress" attention the commit happens once both
lazy tensors have been read, or before the next operation on the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from .config import LayerConfig
from .handles import LazyTensor
from .masks import MaskPlan
from .monitor import Monitor
from .reading import read_dense
from .storage import LayerStorage


@dataclass
class Chunk:
    """The tokens of the pass in flight, exact, with padding: keys, values `[B, H, q, D]` from position `start` on."""

    keys: torch.Tensor
    values: torch.Tensor
    start: int
    kept: list[torch.Tensor] | None
    read: set[str] = field(default_factory=set)

    def of(self, role: str) -> torch.Tensor:
        return self.keys if role == "key" else self.values


class CompressedLayer(CacheLayerMixin):
    """Full or sliding attention with packed pages.

    Args:
        config: what to do in this layer.
        index: the layer's number, for messages.
        sliding_window: tokens that a query sees, itself included; None for full attention.
        monitor: measures what sealing loses, if given.
    """

    is_compileable = False

    def __init__(
        self, config: LayerConfig, index: int, sliding_window: int | None = None, monitor: Monitor | None = None
    ):
        super().__init__()
        self.config, self.index, self.sliding_window, self.monitor = config, index, sliding_window, monitor
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self.storage: LayerStorage | None = None
        self.chunk: Chunk | None = None
        self.seen = 0
        self.plan: MaskPlan | None = None  # of the coming pass, when the "kvcompress" mask function made its mask

    # -- staging and committing ----------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.storage = LayerStorage(
            self.config, key_states, value_states, self.sliding_window, self.index, self.monitor
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage new tokens `[B, H, q, D]`; returns lazy keys and values of all positions.

        Raises ValueError if the batch size changes in mid-cache.
        """
        plan, self.plan = self.plan, None
        self.commit()
        if self.storage is None:
            self.lazy_initialization(key_states, value_states)
        assert self.storage is not None
        if key_states.shape[0] != self.storage.batch:
            raise ValueError(
                f"key_states: expected batch size {self.storage.batch}, as this cache holds in layer {self.index}, got "
                f"{key_states.shape[0]}. Use a new cache, or cache.reset(), for another batch."
            )
        if self.monitor is not None:
            self.monitor.check_finite(self.index, key_states, value_states)
        self.chunk = Chunk(key_states, value_states, self.seen, kept=None)
        self.describe(plan)
        self.seen += key_states.shape[2]
        if key_states.requires_grad or value_states.requires_grad:  # autograd cannot see through a lazy tensor
            return self.dense("key"), self.dense("value")
        return self._lazy("key"), self._lazy("value")

    def describe(self, plan: MaskPlan | None) -> None:
        """Take from a mask what is padding in the pass in flight, if the mask is of this pass."""
        chunk = self.chunk
        if plan is not None and chunk is not None and chunk.kept is None:
            if plan.start == chunk.start and plan.q_length == chunk.keys.shape[2]:
                chunk.kept = plan.kept()

    def observe_queries(self, queries: torch.Tensor) -> None:
        """Show the pass's queries `[B, Hq, q, D]` to the codec of the keys, if it wants them."""
        if self.chunk is not None and self.storage is not None and self.storage.pages.codecs["key"].wants_queries:
            self.storage.queries.observe(queries, self.chunk.kept)

    def commit(self) -> None:
        """Store the pass in flight: drop its padding, append, seal full pages, give back what has left the window."""
        chunk, self.chunk = self.chunk, None
        if chunk is not None and self.storage is not None:
            keys, values = chunk.keys.detach(), chunk.values.detach()
            self.storage.append(keys, values, chunk.start, chunk.kept, self.record_past)

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys of all positions, `[B, H, T, D]`, as a lazy tensor (None before the first update)."""
        return None if self.storage is None else self._lazy("key")

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None: ...  # the base class clears it on creation

    @property
    def values(self) -> torch.Tensor | None:
        """Values of all positions, `[B, H, T, D]`, as a lazy tensor (None before the first update)."""
        return None if self.storage is None else self._lazy("value")

    @values.setter
    def values(self, value: torch.Tensor | None) -> None: ...

    def dense_range(self) -> tuple[int, int]:
        """Positions that a dense read covers: what transformers' own layer of this kind would return."""
        if self.sliding_window is None:
            return 0, self.seen
        start = self.chunk.start if self.chunk is not None else self.seen
        return max(start - self.sliding_window + 1, 0), self.seen

    def dense(self, role: str, covered: tuple[int, int] | None = None) -> torch.Tensor:
        """Keys ("key") or values ("value") of all positions, `[B, H, T, D]` in the model's dtype."""
        start, end = covered or self.dense_range()
        assert self.storage is not None
        chunk = self.chunk
        if chunk is None:
            return read_dense(self.storage, role, start, end)
        if chunk.start <= start:
            return chunk.of(role)
        dense = read_dense(self.storage, role, start, end)
        dense[:, :, chunk.start - start :] = chunk.of(role)
        return dense

    def _lazy(self, role: str) -> LazyTensor:
        assert self.storage is not None
        covered = self.dense_range()
        shape = (self.storage.batch, self.storage.heads[role], covered[1] - covered[0], self.storage.dims[role])
        storage = self.storage
        return LazyTensor(shape, storage.dtype, storage.device, lambda: self._read(role, covered), self, role)

    def _read(self, role: str, covered: tuple[int, int]) -> torch.Tensor:
        dense = self.dense(role, covered)
        if self.chunk is not None:
            self.chunk.read.add(role)
            if len(self.chunk.read) == 2:  # a plain attention has both: no need to hold the chunk until the next pass
                self.commit()
        return dense

    # -- transformers' layer interface ---------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens seen, padding and evicted ones included."""
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the positions that `update` will return for `query_length` more tokens."""
        past = self.seen if self.sliding_window is None else min(self.seen, self.sliding_window - 1)
        return past + query_length, self.seen - past

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Full layers always; a sliding layer as long as nothing has left it or past recording is on."""
        return self.sliding_window is None or self.record_past or self.seen < self.sliding_window

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` positions; the rest of a cut page returns to the window, decoded."""
        tokens_to_remove = int(tokens_to_remove)  # older transformers pass a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected 0 or a negative number of tokens, got {tokens_to_remove}")
        if self.storage is None:
            return
        self.commit()
        if tokens_to_remove:
            if not self.is_croppable:
                raise RuntimeError(
                    f"crop: layer {self.index} has a sliding window of {self.sliding_window} and has given back older "
                    "tokens; call `activate_past_recording` before generating if you want to crop"
                )
            self.seen = max(self.seen + tokens_to_remove, 0)
            self.storage.truncate(self.seen)
        self.storage.drop_expired()

    def reset(self) -> None:
        self.storage = self.chunk = self.plan = None
        self.seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.storage is not None:
            self.batch_select_indices(torch.arange(self.storage.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Make row i what row `indices[i]` was (indices or a boolean mask), packed as it is."""
        if self.storage is None:
            return
        self.commit()
        rows = torch.as_tensor(indices).cpu()
        self.storage.map_rows(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long())

    def offload(self) -> None: ...  # packed pages stay where they are

    def prefetch(self) -> None: ...

    def __getstate__(self) -> dict[str, Any]:
        self.commit()  # a pass in flight has no meaning elsewhere, and a mask function cannot be pickled
        return {**self.__dict__, "plan": None}


class CompressedHybridLayer(LinearAttentionLayer, CompressedLayer):
    """A layer with a linear-attention state beside its attention: the state passes through, the attention is packed."""

    is_compileable = False

    def __init__(self, config: LayerConfig, index: int, number_of_states: int = 1, monitor: Monitor | None = None):
        CompressedLayer.__init__(self, config, index, monitor=monitor)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        owner = CompressedLayer if len(args) == 2 and not kwargs else LinearAttentionLayer
        owner.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        CompressedLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        CompressedLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        CompressedLayer.crop(self, tokens_to_remove)

    def activate_past_recording(self) -> None:
        LinearAttentionLayer.activate_past_recording(self)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return super().is_croppable  # a recurrent state cannot be taken back
