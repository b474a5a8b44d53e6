"""One attention layer of the cache, as transformers sees it: it stages a pass, hands out lazy tensors, commits.

`update` stages the new tokens and returns two lazy tensors; the attention computes with what is stored plus the exact
chunk; `commit` then drops padding, appends and seals. Without the "kvcompress" attention the commit happens once both
lazy tensors have been read, or before the next operation on the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from transformers.cache_utils import CacheLayerMixin

from .chunk import Chunk
from .clustered.shared import Sharing
from .codecs.base import CodecContext
from .config import LayerConfig
from .cropping import check_crop, crop
from .dense_reading import dense, is_compact, positions_read, refuse_plain_attention, tokens_kept
from .footprint import tokens_for_bytes
from .guard import QUERIES, QualityGuard
from .handles import LazyTensor
from .host_tier import Fetched
from .masks import MaskPlan
from .observation import Observation
from .sealing_error import SealingMonitor
from .stepping import step_back
from .storage import LayerStorage

Method = TypeVar("Method", bound=Callable[..., Any])


def _in_the_storage_s_mode(method: Method) -> Method:
    """Write where it is allowed: tensors are made outside inference mode, unless the cache was copied within it."""

    @wraps(method)
    def inner(self: CompressedLayer, *args: Any, **kwargs: Any) -> Any:
        copied = self.storage is not None and self.storage.window.keys.is_inference()
        with torch.inference_mode(copied):
            return method(self, *args, **kwargs)

    return cast(Method, inner)


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
        self, config: LayerConfig, index: int, sliding_window: int | None = None, monitor: SealingMonitor | None = None
    ):
        super().__init__()
        self.config, self.index, self.sliding_window, self.monitor = config, index, sliding_window, monitor
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self.context = CodecContext(index)
        self.sharing: Sharing | None = None  # pages that are like others are stored by them
        self.storage: LayerStorage | None = None
        self.chunk: Chunk | None = None
        self.seen = 0
        self.share: Callable[[int, torch.dtype, int], dict[int, int]] | None = None  # bytes of every layer
        self.query_heads: int | None = None  # of the whole model, as `context.heads`
        self.stands_alone = False  # other layers hold other tokens, so one mask cannot serve all
        self.may_be_cross_attention = False
        self.mask_is_ours = False  # `enable` is on for the model of the pass in flight
        self.plan: MaskPlan | None = None  # of the coming pass, when the "kvcompress" mask function made its mask

    # -- staging and committing ----------------------------------------------------------------------------------------

    @_in_the_storage_s_mode
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        known = self.sliding_window, self.index, self.monitor, self.context, self.sharing
        self.storage = LayerStorage(self.config, key_states, value_states, *known)
        self.is_initialized = True
        self._hold_to_share()

    def _hold_to_share(self) -> None:
        """Turn the layer's bytes into tokens, now that the batch is known."""
        storage = self.storage
        if storage is None or storage.evictor is None:
            return
        eviction, heads = storage.evictor.settings, storage.heads["key"]
        share, parts = eviction.budget_bytes, (self.context.heads or heads) // heads
        if self.share is not None and eviction.budget is None:
            share = self.share(storage.batch, storage.dtype, parts)[self.index]
        if share is not None:
            storage.evictor.budget = tokens_for_bytes(
                self.config,
                storage.dims["key"],
                storage.dims["value"],
                heads,
                storage.batch,
                storage.dtype,
                share,
                self.query_heads and self.query_heads // parts,
                self.sliding_window,
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage new tokens `[B, H, q, D]`; returns lazy keys and values of all positions.

        Raises ValueError if the batch size changes in mid-cache.
        """
        plan, self.plan = self.plan, None
        self.mask_is_ours = plan is not None
        self.commit()
        if self.storage is None:
            self.lazy_initialization(key_states, value_states)
        assert self.storage is not None
        if key_states.shape[0] != self.storage.batch:
            raise ValueError(
                f"key_states: expected batch size {self.storage.batch}, as this cache holds in layer {self.index}, got "
                f"{key_states.shape[0]}. Use a new cache, or cache.reset(), for another batch."
            )
        if key_states.shape[1] != self.storage.heads["key"]:
            raise ValueError(
                f"key_states: expected {self.storage.heads['key']} key-value heads, as this cache holds in layer "
                f"{self.index}, got {key_states.shape[1]}. Is it of another model, or of a rank that has a part?"
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

    def observe_queries(self, queries: torch.Tensor, scaling: float) -> None:
        """Show the pass's queries `[B, Hq, q, D]` to whoever wants them: the codec of the keys, the policy."""
        chunk, storage = self.chunk, self.storage
        if chunk is None or storage is None:
            return
        chunk.attended = True
        # Layers that share keys may compute the last queries of a pass only: the layer that made the keys saw them all.
        chunk.watched = queries.shape[2] == chunk.keys.shape[2]
        if not chunk.watched:
            return
        window = storage.evictor.window if storage.evictor is not None else None
        watches = self.monitor is not None and self.monitor.wants_queries
        if window is not None or watches or storage.wants_queries:
            chunk.queries.append(queries)
            chunk.scaling = scaling

    @property
    def wants_mass(self) -> bool:
        """The policy asks for the attention that every token receives."""
        evictor = self.storage.evictor if self.storage is not None else None
        return evictor is not None and evictor.wants_mass and self.chunk is not None and self.chunk.watched

    def keep_all(self) -> None:
        """Evict nothing from now on: what stands here is another text's, and its queries are no guide."""
        if self.storage is not None and self.storage.evictor is not None:
            self.storage.evictor.budget = None

    @property
    def may_be_cropped(self) -> bool:
        """The pass in flight is a draft whose last tokens may be taken back: it is stored when the next one comes."""
        evicts = self.storage is not None and self.storage.evictor is not None
        return evicts and self.record_past and self.chunk is not None

    def observe_mass(self, run: object, mass: torch.Tensor) -> None:
        """Note the mass that the tokens of a run ("exact", "new" or a block) received in this pass."""
        if self.chunk is not None:
            if self.chunk.observed is None:
                self.chunk.observed = Observation(draft=self.may_be_cropped)
            self.chunk.observed.add(run, mass)

    def note_fetched(self, pages: Fetched, stop: int) -> None:
        """Note that queries of the pass before number `stop` read pages of a host tier."""
        if self.chunk is None:
            pages.note_read()
        else:
            self.chunk.fetched.append((stop, pages))

    def finish(self) -> None:
        """The attention is done: commit, unless the pass may yet be cropped and a policy would evict for its sake."""
        if not self.may_be_cropped:
            self.commit()

    @_in_the_storage_s_mode
    def commit(self) -> None:
        """Store the pass in flight: drop its padding, append, seal full pages, evict, drop what has left the window."""
        chunk, self.chunk = self.chunk, None
        if chunk is None or self.storage is None:
            return
        keys, values, observed = chunk.keys.detach(), chunk.values.detach(), chunk.observed
        self.storage.observe_queries(chunk.queries, chunk.scaling, chunk.kept)
        window = self.storage.evictor.window if self.storage.evictor is not None else None
        if window is not None and chunk.queries:
            window.observe(chunk.queries[0], chunk.scaling, chunk.start, chunk.kept)
        if observed is not None:
            observed = observed.total()
        for _, pages in chunk.fetched:
            pages.note_read()
        guard = self.monitor if isinstance(self.monitor, QualityGuard) else None
        if guard is not None and chunk.queries:
            guard.queries = chunk.queries[0][:, :, -QUERIES:].detach().float() * chunk.scaling
        self.storage.append(keys, values, chunk.start, chunk.kept, self.record_past, observed)
        if guard is not None:
            guard.queries = None
            if guard.is_due(self.index):
                self._step_back(guard)

    def _step_back(self, guard: QualityGuard) -> None:
        """Pack with more bits from now on, where there are any."""
        assert self.storage is not None
        before, after = (self.config.keys, self.config.values), step_back(self.storage)
        guard.judge_anew(self.index)
        if after is not None:
            guard.note(self.index, self.seen, before, after)
            self.config = self.storage.config
            self._hold_to_share()

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

    def dense(self, role: str) -> torch.Tensor:
        """Keys ("key") or values ("value") of all positions, `[B, H, T, D]`, or of those that a policy has kept."""
        return dense(self, role)

    def _lazy(self, role: str) -> LazyTensor:
        assert self.storage is not None
        covered = positions_read(self)
        shape = (self.storage.batch, self.storage.heads[role], covered[1] - covered[0], self.storage.dims[role])
        storage = self.storage
        return LazyTensor(shape, storage.dtype, storage.device, lambda: self._read(role, covered), self, role)

    def _read(self, role: str, covered: tuple[int, int]) -> torch.Tensor:
        refuse_plain_attention(self)
        read = dense(self, role, covered)
        if self.chunk is not None:
            self.chunk.read.add(role)
            if len(self.chunk.read) == 2:  # a plain attention has both: no need to hold the chunk until the next pass
                self.finish()
        return read

    # -- transformers' layer interface ---------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens seen, padding and evicted ones included."""
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the positions that `update` will return for `query_length` more tokens."""
        if self.may_be_cropped:
            self.commit()  # a pass that begins takes no draft back
        if is_compact(self):
            self.commit()
            past = tokens_kept(self)
        else:
            past = self.seen if self.sliding_window is None else min(self.seen, self.sliding_window - 1)
        return past + query_length, self.seen - past

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Full layers until they evict; a sliding layer as long as nothing has left it; both with past recording on."""
        if self.storage is not None and self.storage.evictor is not None and self.storage.evictor.evicted:
            return self.record_past
        return self.sliding_window is None or self.record_past or self.seen < self.sliding_window

    def activate_past_recording(self) -> None:
        self.record_past = True

    @_in_the_storage_s_mode
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` positions; the rest of a cut page returns to the window, decoded."""
        crop(self, int(tokens_to_remove))  # older transformers pass a tensor

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError or RuntimeError if `crop` cannot take back these tokens, before anything is changed."""
        check_crop(self, tokens_to_remove)

    def reset(self) -> None:
        self.storage = self.chunk = self.plan = None
        self.seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.storage is not None:
            self.batch_select_indices(torch.arange(self.storage.batch).repeat_interleave(repeats))

    @_in_the_storage_s_mode
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Make row i what row `indices[i]` was (indices or a boolean mask), packed as it is."""
        if self.storage is None:
            return
        self.commit()
        rows = torch.as_tensor(indices).cpu()
        before = self.storage.batch
        self.storage.map_rows(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long())
        if self.storage.batch != before:
            self._hold_to_share()

    def offload(self) -> None: ...  # packed pages stay where they are

    def prefetch(self) -> None: ...

    def __getstate__(self) -> dict[str, Any]:
        self.commit()  # a pass in flight has no meaning elsewhere, and a mask function cannot be pickled
        return {**self.__dict__, "plan": None}
