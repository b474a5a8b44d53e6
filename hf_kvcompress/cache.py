"""`CompressedCache`, a transformers `DynamicCache` whose layers are packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from .calibration import Calibration
from .config import CacheConfig, LayerConfig, expect, with_shares
from .contexts import context_of
from .fingerprints import of_model
from .guard import GuardEvent, QualityGuard
from .hybrid_layer import CompressedHybridLayer
from .layer import CompressedLayer
from .masks import MaskPlan
from .measure import tensor_bytes
from .policies.layer_budgets import layer_weights
from .portable import Portable
from .sealing_error import ReconstructionError, SealingMonitor
from .shards import ranks
from .shares import ByteShares
from .stats import CacheStats, LayerStats


class EmptyLayer(getattr(cache_utils, "DummyLayer", object)):  # type: ignore[misc]
    """Stands for a layer that holds nothing; older transformers have no such class of their own."""

    is_compileable = is_croppable = is_initialized = True
    supports_early_init = False
    keys = values = None

    def __init__(self) -> None: ...

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    offload = prefetch = reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _nothing

    def get_max_length(self) -> int:
        return -1


class _Offset(int):
    """A query offset that lets the mask function find the cache whose pass it describes."""

    begin_forward: Any


class CompressedCache(Portable, DynamicCache):
    """A `DynamicCache` that packs keys and values into few bits, for `generate(past_key_values=...)`.

    Works under any attention; with `enable(model)` packed pages are read directly and padding takes no room. The
    defaults are `preset="balanced"`: equalised rotation at 4 bits, 4 exact sinks, 32 or more exact recent tokens.

    Args:
        config: the model's config. Without it every layer counts as full attention, which is right for any model but
            keeps tokens that sliding layers no longer need.
        preset: "near-lossless", "balanced", "small" or "tiny".
        codec, keys, values: codec names; `codec` sets both.
        layers: settings of single layers, `{5: {"codec": "int8"}}`.
        layer_budget: how the layers that evict share the budget: "uniform", "pyramid" or one weight each.
        monitor: measure `reconstruction_error` on sampled pages and name layers with NaN or infinity.
        quality_guard: relative error of a layer's attention output, sampled as pages are sealed, beyond which the layer
            is packed with more bits from then on; `events` tells of it.
        calibration: what `kvcompress calibrate` learned of the model, for the codecs that need it: a file or an object.
        settings: the fields of `LayerConfig` (page_size, group_size, residual_length, sink_length, sliding) and, to
            keep only some tokens, those of `EvictionConfig` (policy, budget, max_tokens, recent, pin, demote_to ...).

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        preset: str | None = None,
        codec: str | None = None,
        layers: Mapping[int | str, Mapping[str, Any]] | None = None,
        layer_budget: str | Sequence[float] = "uniform",
        monitor: bool | SealingMonitor = False,
        quality_guard: float | None = None,
        calibration: str | Path | Calibration | None = None,
        **settings: Any,
    ):
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise expect("config", "a transformers PreTrainedConfig, such as model.config", type(config).__name__)
        super().__init__(config=config)
        known = self.layers if config is not None else None
        num_layers = len(known) if known is not None else None
        self.settings = CacheConfig.make(
            preset=preset, codec=codec, layers=layers, num_layers=num_layers, layer_budget=layer_budget, **settings
        )
        self.monitor = SealingMonitor() if monitor is True else (monitor or None)
        if quality_guard is not None:
            self.monitor = QualityGuard(quality_guard)
        self.fingerprint = of_model(config)
        self._recording_past = False
        self._budgets = self._share_budget(config)
        self.calibration = None if calibration is None else Calibration.open(calibration)
        if config is None:
            for layer in (self.settings.default, *self.settings.layers.values()):
                context_of(None, 0, layer)
        self.layers = [self._compressed(index, layer) for index, layer in enumerate(self.layers)]
        for packed in self.packed_layers() if config is not None else ():
            packed.context = context_of(config, packed.index, packed.config, self.calibration)
        self._mark_layers_that_differ(bool(getattr(config, "is_encoder_decoder", False)))
        if self.settings.budget_bytes is not None:
            self._hand_out_shares(config)
        if config is not None:
            self.layer_class_to_replicate = None
            if not any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
                raise expect("config", "a model with attention layers", config.model_type)

    def _share_budget(self, config: PreTrainedConfig | None) -> dict[int, LayerConfig]:
        """Settings of the layers that evict, each with its share of the budget."""
        evicting = [index for index, layer in enumerate(self.layers) if self._evicts(index, layer)]
        if config is None:
            if self.settings.layer_budget != "uniform":
                raise expect("layer_budget", "'uniform' for a cache made without the model's config", "another rule")
            return {}
        weights = layer_weights(self.settings.layer_budget, len(evicting))
        shares = with_shares([self.settings.for_layer(index) for index in evicting], weights)
        return dict(zip(evicting, shares, strict=True))

    def _hand_out_shares(self, config: PreTrainedConfig | None) -> None:
        """Tell every layer how to find its share of a budget in bytes, once the batch is known."""
        if config is None:
            raise expect("config", "the model's config, for a budget in bytes", None)

        shares = ByteShares(config, self.settings)
        if ranks() == 1:  # a budget that never holds is refused at once; a rank may have a part of the heads only
            shares(1, getattr(config, "dtype", None) or torch.float32)
        for layer in self.packed_layers():
            layer.share, layer.query_heads = shares, shares.query_heads

    def _evicts(self, index: int, layer: Any) -> bool:
        settings = self.settings.for_layer(index)
        sliding = type(layer) is DynamicSlidingWindowLayer
        full = type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)
        return settings.eviction is not None and (full or sliding and settings.sliding == "evict")

    def _mark_layers_that_differ(self, encoder_decoder: bool) -> None:
        """One mask serves all layers of a plain attention: it cannot where layers keep different numbers of tokens."""
        packed = [layer for layer in self.packed_layers() if not layer.is_sliding]
        budgets = {(x.budget, x.budget_bytes) if (x := layer.config.eviction) else None for layer in packed}
        for layer in packed:
            layer.stands_alone = len(budgets) > 1 and layer.config.eviction is not None
            layer.may_be_cross_attention = encoder_decoder

    def _compressed(self, index: int, layer: Any) -> Any:
        """Our layer in place of transformers' own where it holds keys and values that can be packed."""
        settings = self._budgets.get(index, self.settings.for_layer(index))
        if type(layer) is DynamicLayer:
            return CompressedLayer(settings, index, monitor=self.monitor)
        if type(layer) is LinearAttentionAndFullAttentionLayer:
            return CompressedHybridLayer(settings, index, layer.number_of_states, monitor=self.monitor)
        if type(layer) is DynamicSlidingWindowLayer and settings.sliding != "exact":
            return CompressedLayer(settings, index, layer.sliding_window, self.monitor)
        return layer  # linear attention, dummies of shared layers, and layer kinds with states of their own

    # -- growing without a config --------------------------------------------------------------------------------------

    def _layer(self, index: int, kind: type = CompressedLayer) -> Any:
        """The layer with this number; without a config missing ones are made, gaps being layers that hold nothing."""
        if self.layer_class_to_replicate is None:
            return self.layers[index]
        self.layers += [EmptyLayer() for _ in range(len(self.layers), index + 1)]
        layer, settings = self.layers[index], self.settings.for_layer(index)
        if isinstance(layer, EmptyLayer):
            linear = kind is LinearAttentionLayer
            layer = LinearAttentionLayer() if linear else CompressedLayer(settings, index, monitor=self.monitor)
        elif type(layer) is LinearAttentionLayer and kind is CompressedLayer:  # it has attention as well
            hybrid = CompressedHybridLayer(settings, index, monitor=self.monitor)
            hybrid.__dict__.update(layer.__dict__)
            layer = hybrid
        else:
            return layer
        if self._recording_past:
            layer.activate_past_recording()
        self.layers[index] = layer
        return layer

    def _grow(self, kinds: Sequence[str]) -> None:
        """Make the layers that a cache without a config had, by the names of their classes."""
        for index, kind in enumerate(kinds):
            if "Linear" in kind or "Hybrid" in kind:
                self._layer(index, LinearAttentionLayer)
            if "Compressed" in kind:
                self._layer(index)
        self.layers += [EmptyLayer() for _ in kinds[len(self.layers) :]]

    def activate_past_recording(self) -> None:
        """Keep what `crop` may take back, until it is called."""
        self._recording_past = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` positions, in all layers or, with a RuntimeError, in none."""
        for layer in self.packed_layers():
            layer.check_crop(int(tokens_to_remove))
        super().crop(tokens_to_remove)

    @torch.compiler.disable  # the pages change shape and place: a compiled model breaks its graph here
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage new keys and values `[B, H, q, D]` of a layer; returns those of all positions as lazy tensors."""
        return self._layer(layer_idx).update(key_states, value_states, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        self._layer(layer_idx, LinearAttentionLayer)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        self._layer(layer_idx, LinearAttentionLayer)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._layer(layer_idx, LinearAttentionLayer)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self._layer(layer_idx, LinearAttentionLayer)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        if layer_idx is None and self.layer_class_to_replicate is not None and not linear:
            return False
        return super().has_previous_state(layer_idx, *args, **kwargs)

    # -- what masks ask ------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next query; carries a way for the mask function to tell this cache what is padding."""
        offset = _Offset(super().get_query_offset(layer_idx))
        offset.begin_forward = self._begin_forward
        return offset

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self.layer_class_to_replicate is not None and not any(isinstance(x, CacheLayerMixin) for x in self.layers):
            return 0  # a hybrid model whose attention layers have not been seen yet
        return super().get_seq_length(layer_idx)

    def _begin_forward(self, plan: MaskPlan) -> None:
        for layer in self.packed_layers():
            layer.plan = plan

    # -- what is held --------------------------------------------------------------------------------------------------

    def packed_layers(self) -> Iterator[CompressedLayer]:
        """The layers that this package stores."""
        return (layer for layer in self.layers if isinstance(layer, CompressedLayer))

    def commit(self) -> None:
        """Store passes in flight now, instead of at the next pass (only a plain attention leaves any)."""
        for layer in self.packed_layers():
            layer.commit()

    @property
    def nbytes(self) -> int:
        """Bytes of the storage of every tensor held, metadata and allocated slack included."""
        self.commit()
        return tensor_bytes(self.layers)

    @property
    def events(self) -> list[GuardEvent]:
        """Layers that the quality guard has sent one level back, in the order in which it happened."""
        return self.monitor.events if isinstance(self.monitor, QualityGuard) else []

    @property
    def reconstruction_error(self) -> dict[int, dict[str, ReconstructionError]]:
        """Error of sampled sealed tokens by layer, `{0: {"key": ..., "value": ...}}`; needs `monitor=True`."""
        if self.monitor is None:
            raise ValueError("reconstruction_error: expected a cache made with monitor=True, got monitor=False")
        self.commit()
        return self.monitor.result()

    def stats(self) -> CacheStats:
        """What the cache holds and saves, in total and by layer."""
        self.commit()
        return CacheStats([LayerStats.of(i, layer) for i, layer in enumerate(self.layers)], self.nbytes)

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, None]]:
        """Keys and values of each layer in full, `[B, H, T, D]` in the model's dtype."""
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.commit()
                ready = layer.storage is not None
                yield (layer.dense("key"), layer.dense("value"), None) if ready else (None, None, None)
            elif isinstance(layer, CacheLayerMixin):
                yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)
            else:
                yield None, None, None

    def __repr__(self) -> str:
        default = self.settings.default
        return f"{type(self).__name__}(keys={default.keys}, values={default.values}, tokens={self.get_seq_length()})"

    def _repr_html_(self) -> str:
        return self.stats()._repr_html_()

    def to_pandas(self) -> Any:
        """A row a layer, as `stats().to_pandas()`. Needs pandas."""
        return self.stats().to_pandas()

    def plot(self) -> Any:
        """A matplotlib figure: MB of each layer, held and as it would be uncompressed. Needs matplotlib."""
        return self.stats().plot()
