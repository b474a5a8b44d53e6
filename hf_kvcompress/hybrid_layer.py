"""A layer with a linear-attention state beside its attention."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from .config import LayerConfig
from .layer import CompressedLayer
from .sealing_error import SealingMonitor


class CompressedHybridLayer(LinearAttentionLayer, CompressedLayer):
    """A layer with a linear-attention state beside its attention: the state passes through, the attention is packed."""

    is_compileable = False

    def __init__(
        self, config: LayerConfig, index: int, number_of_states: int = 1, monitor: SealingMonitor | None = None
    ):
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
