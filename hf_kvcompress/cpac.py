"""`CPACCache`: cross-page adaptive compression, on top of any codec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedConfig

from .cache import CompressedCache
from .clustered.opportunities import Opportunities, opportunities_of
from .clustered.settings import ClusterSettings
from .clustered.shared import Clusters, Sharing, cuda_pressure
from .clustered.store import ClusteredPages
from .clustered.tracker import PageSimilarityTracker
from .codecs.base import Rotation
from .config import expect
from .layer import CompressedLayer
from .measure import tensor_bytes
from .policies.settings import parse_bytes
from .rotary import rotary_of
from .stats import MB

_EVERY = 32  # decode steps between two looks at the memory


class CPACCache(CompressedCache):
    """Pages that repeat what is stored are kept as references to it or as differences of few bits; the rest as usual.

    A page is coded by another only where that takes `min_compression_ratio` times fewer bytes than the codec, metadata
    included, at no more error. Where nothing repeats the cache is what `CompressedCache` is.

    Args:
        config: the model's config.
        similarity_threshold: least cosine of a page and what it is coded against, means removed.
        max_cluster_size: pages that may hang on one base page, itself included.
        min_compression_ratio: times smaller than in the codec at level 2; 2.8 and 1.26 at levels 1 and 3, if it is 2.
        top_k_similar: candidates that are measured for a page.
        adaptive_compression: let the level rise with memory pressure, and fall back.
        compression_level: 1 light, 2 moderate, 3 aggressive.
        use_importance_weighting: the pages of a pass that matter must come out at most 0.75 times the codec's error: of
            every head an eighth, by the attention of the newest queries (by the values' size where a plain attention
            shows none), and the newest four.
        delta_bits: the most bits of a difference: 4, 8 or 12; it takes the fewest that keep the error.
        codec: of the pages that stay as they are; keys and values apart by `keys`, `values`.
        frame: "unrotated" compares keys before their rotary embedding, "rotated" as they are cached (for models whose
            rotation is not known: repeated text is then found in the values only).
        memory_limit: bytes ("64MB") that count as full memory; without it CUDA's free memory counts, if on CUDA.
        pressure: gives the part of the memory in use, 0 to 1, instead of both.
        tracker: a `PageSimilarityTracker` of your own.

    Raises:
        ValueError: naming the argument; for `frame="unrotated"` without a config, or with an unknown rotation.
    """

    own_settings = "clusters"

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        similarity_threshold: float = 0.85,
        max_cluster_size: int = 8,
        min_compression_ratio: float = 2.0,
        top_k_similar: int = 4,
        adaptive_compression: bool = True,
        compression_level: int = 2,
        use_importance_weighting: bool = True,
        delta_bits: int = 8,
        codec: str | None = None,
        *,
        frame: str = "unrotated",
        memory_limit: int | str | None = None,
        pressure: Callable[[], float] | None = None,
        tracker: PageSimilarityTracker | None = None,
        **settings: Any,
    ):
        own = ClusterSettings(
            similarity_threshold,
            max_cluster_size,
            min_compression_ratio,
            top_k_similar,
            adaptive_compression,
            compression_level,
            use_importance_weighting,
            delta_bits,
            frame,
        )
        self._share_by(own, config, memory_limit, pressure, tracker)
        super().__init__(config, codec=codec, **settings)
        self._check()

    def _share_by(
        self,
        own: ClusterSettings,
        config: PreTrainedConfig | None,
        memory_limit: int | str | None,
        pressure: Callable[[], float] | None,
        tracker: PageSimilarityTracker | None,
    ) -> None:
        """Set what the layers share; before they are made."""
        if pressure is not None and not callable(pressure):
            raise expect("pressure", "a function without arguments, or None", pressure)
        if tracker is not None and not isinstance(tracker, PageSimilarityTracker):
            raise expect("tracker", "a PageSimilarityTracker, or None", type(tracker).__name__)
        self._pressure, self._limit, self._passes = pressure, _limit(memory_limit), 0
        self._clusters = Clusters(own, tracker)
        self._config_of_keys = config

    def _check(self) -> None:
        evicting = [layer.index for layer in self.packed_layers() if layer.config.eviction is not None]
        if evicting or self.settings.default.eviction is not None:
            raise expect("policy", "None: CPACCache keeps all tokens, pages that lose some have no equals", "a policy")
        if self._config_of_keys is None and self._clusters.settings.frame == "unrotated":
            raise expect(
                "config", "the model's config, to compare keys before their rotation; or frame='rotated'", None
            )

    @classmethod
    def from_settings(
        cls,
        config: Any,
        settings: Mapping[str, Any],
        pressure: Callable[[], float] | None = None,
        tracker: PageSimilarityTracker | None = None,
        **more: Any,
    ) -> CPACCache:
        """An empty cache with settings as `CacheConfig.to_dict` and `strategy` give them; others are the defaults."""
        settings = dict(settings)
        own = dict(settings.pop(cls.own_settings, {}))
        limit, passes = own.pop("memory_limit", None), own.pop("passes", 0)
        cache = cls.__new__(cls)
        cache._share_by(ClusterSettings(**own), config, limit, pressure, tracker)
        cache._passes = passes
        CompressedCache.__init__(cache, config, **more, **settings)
        cache._check()
        return cache

    def strategy(self) -> dict[str, Any]:
        """How pages are compared; a pressure and a tracker of one's own are given to `load` again."""
        own = {**asdict(self._clusters.settings), "memory_limit": self._limit, "passes": self._passes}
        return {self.own_settings: own}

    def _compressed(self, index: int, layer: Any) -> Any:
        return self._sharing(super()._compressed(index, layer))

    def _layer(self, index: int, kind: type = CompressedLayer) -> Any:
        return self._sharing(super()._layer(index, kind))

    def _sharing(self, layer: Any) -> Any:
        if isinstance(layer, CompressedLayer) and layer.sharing is None:
            layer.sharing = Sharing(self._clusters, self._rotary(layer.index))
        return layer

    def _rotary(self, index: int) -> Rotation | None:
        if self._clusters.settings.frame == "rotated" or self._config_of_keys is None:
            return None
        try:
            return rotary_of(self._config_of_keys, index)
        except ValueError as error:
            raise ValueError(f"{error}. CPACCache takes such a model with frame='rotated'.") from None

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `CompressedCache.update`; now and then the memory is looked at first."""
        clusters = self._clusters
        if clusters.settings.adaptive and self._is_first(layer_idx):
            if key_states.shape[2] > 1 or self._passes % _EVERY == 0:
                clusters.feel(self._felt(key_states.device))
            self._passes += 1
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.commit()  # in all layers before rows change in any: they share an index by row
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.commit()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.commit()
        super().batch_select_indices(indices)

    def _is_first(self, index: int) -> bool:
        first = next(self.packed_layers(), None)
        return first is None or first.index >= index

    def _felt(self, device: torch.device) -> float:
        if self._pressure is not None:
            return float(self._pressure())
        return cuda_pressure(device) if self._limit is None else tensor_bytes(self.layers) / self._limit

    def _stores(self) -> list[ClusteredPages]:
        stores = (layer.storage.pages for layer in self.packed_layers() if layer.storage is not None)
        return [pages for pages in stores if isinstance(pages, ClusteredPages)]

    # -- reports -------------------------------------------------------------------------------------------------------

    @property
    def level(self) -> int:
        """The level at work."""
        return self._clusters.level

    def get_compression_stats(self) -> dict[str, Any]:
        """What is held, and how much of it as what.

        compressed_blocks: pages (of one row, head and role) stored as references or differences, by kind as well;
        compression_ratio, memory_saved_mb: against the model's dtype; saved_against_codec_mb: against the codec alone.
        """
        stats, found = self.stats(), [pages.contents() for pages in self._stores()]
        total = {name: sum(own[name] for own in found) for name in ("plain", "references", "differences")}
        bits: dict[int, int] = {}
        for own in found:
            for nbits, count in own["bits"].items():
                bits[nbits] = bits.get(nbits, 0) + count
        return {
            "compressed_blocks": total["references"] + total["differences"],
            "plain_blocks": total["plain"],
            "references": total["references"],
            "differences": total["differences"],
            "differences_by_bits": dict(sorted(bits.items())),
            "compression_ratio": stats["compression_ratio"],
            "memory_saved_mb": stats["memory_saved_mb"],
            "saved_against_codec_mb": sum(own["saved"] for own in found) / MB,
            "compression_level": self.level,
            "nbytes": stats["nbytes"],
        }

    def analyze_compression_opportunities(self) -> Opportunities:
        """Pages that are alike, in what is held now, and what stands against sharing more; decodes layer by layer."""
        self.commit()
        return opportunities_of(self._stores())


def _limit(given: int | str | None) -> int | None:
    if given is None:
        return None
    if isinstance(given, str):
        return parse_bytes(given)
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise expect("memory_limit", "bytes, as a whole number or such as '64MB'", given)
    return given
