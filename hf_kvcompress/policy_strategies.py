"""One named class a strategy that keeps only some tokens: `CompressedCache` with the settings that a paper gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .cache import CompressedCache
from .config import expect
from .policies.learned import LearnedPolicy, LearnedWeights
from .shapes import layer_shapes


class StreamingLLMCache(CompressedCache):
    """The first tokens and the newest ones (StreamingLLM, arXiv 2309.17453). Forgets the middle of a long text.

    Args:
        window_length: tokens kept in all, sinks included.
        num_sink_tokens: first tokens that always stay.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        window_length: int = 1024,
        num_sink_tokens: int = 4,
        **settings: Any,
    ):
        own = {"policy": "streaming", "budget": window_length, "sink_length": num_sink_tokens}
        super().__init__(config, **{**own, **settings})


class H2OCache(CompressedCache):
    """Heavy hitters and the newest tokens (H2O, arXiv 2306.14048); needs `enable(model)`.

    Args:
        heavy_ratio: part of the tokens seen that stays for the attention it has received.
        recent_ratio: part of the tokens seen that stays because it is the newest.
        max_tokens: nothing is evicted from a row that has seen no more.
        budget: tokens or bytes in all instead of the two ratios' sum; the two then share it in proportion.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        heavy_ratio: float = 0.1,
        recent_ratio: float = 0.4,
        max_tokens: int = 4096,
        budget: int | float | str | None = None,
        **settings: Any,
    ):
        total = heavy_ratio + recent_ratio
        if heavy_ratio < 0 or recent_ratio < 0 or not 0 < total <= 1:
            raise expect("heavy_ratio", "ratios that sum to above 0 and at most 1", (heavy_ratio, recent_ratio))
        own = {
            "policy": "h2o",
            "budget": total if budget is None else budget,
            "recent": recent_ratio / total,
            "max_tokens": max_tokens,
        }
        super().__init__(config, **{**own, **settings})


class SnapKVCache(CompressedCache):
    """What the newest queries attend to (SnapKV, arXiv 2404.14469); needs `enable(model)`.

    Args:
        budget: tokens (a whole number), part of those seen (up to 1) or bytes ("64MB") that stay.
        window_size: queries that are asked.
        kernel_size: neighbours over which their attention is averaged.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        budget: int | float | str = 1024,
        window_size: int = 64,
        kernel_size: int = 5,
        **settings: Any,
    ):
        options = {"window_size": window_size, "kernel_size": kernel_size}
        super().__init__(config, **{"policy": "snapkv", "policy_options": options, "budget": budget, **settings})


class PyramidKVCache(CompressedCache):
    """SnapKV with budgets that fall with depth (PyramidKV, arXiv 2406.02069); needs `enable(model)`.

    Args:
        budget: what a layer keeps on average: tokens, part of those seen, or bytes of the whole cache.
        beta: the last layer keeps 1 / beta of the average, the first as much more.
        window_size, kernel_size: as in SnapKV.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        budget: int | float | str = 1024,
        beta: float = 20.0,
        window_size: int = 64,
        kernel_size: int = 5,
        **settings: Any,
    ):
        options = {"window_size": window_size, "kernel_size": kernel_size}
        own = {"policy": "snapkv", "policy_options": options, "budget": budget, "layer_budget": f"pyramid:{beta:g}"}
        super().__init__(config, **{**own, **settings})


class AdaKVCache(CompressedCache):
    """SnapKV whose heads compete for one budget a layer (Ada-KV, arXiv 2407.11550); needs `enable(model)`.

    Args:
        budget: tokens, part of those seen or bytes that stay, on average over heads.
        floor: part of its even share that every head keeps.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        budget: int | float | str = 1024,
        floor: float = 0.2,
        **settings: Any,
    ):
        own = {"policy": "snapkv", "budget": budget, "head_budget": "adaptive", "head_floor": floor}
        super().__init__(config, **{**own, **settings})


class TOVACache(CompressedCache):
    """What the last query attends to (TOVA, arXiv 2401.06104); needs `enable(model)`.

    Args:
        budget: tokens, part of those seen or bytes that stay.
    """

    def __init__(self, config: PreTrainedConfig | None = None, budget: int | float | str = 1024, **settings: Any):
        super().__init__(config, **{"policy": "tova", "budget": budget, "recent": 0.0, **settings})


class ExpectedAttentionCache(CompressedCache):
    """Attention that coming queries are likely to pay (Expected Attention, arXiv 2510.00636); needs `enable(model)`.

    Args:
        budget: tokens, part of those seen or bytes that stay.
        n_queries: newest queries that stand for the coming ones.
        epsilon: added to the expected attention before it is weighed with the values' norms.
        use_covariance: False keeps the first moment only.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        budget: int | float | str = 1024,
        n_queries: int = 64,
        epsilon: float = 0.0,
        use_covariance: bool = True,
        **settings: Any,
    ):
        options = {"n_queries": n_queries, "epsilon": epsilon, "use_covariance": use_covariance}
        super().__init__(config, **{"policy": "expected", "policy_options": options, "budget": budget, **settings})


class KeyDiffCache(CompressedCache):
    """Keys that point away from the average key (KeyDiff, arXiv 2504.15364); works under any attention.

    Args:
        budget: tokens, part of those seen or bytes that stay.
    """

    def __init__(self, config: PreTrainedConfig | None = None, budget: int | float | str = 1024, **settings: Any):
        super().__init__(config, **{"policy": "keydiff", "budget": budget, **settings})


class RKVCache(CompressedCache):
    """Attention less redundancy, for long decodes (R-KV, arXiv 2505.24133); needs `enable(model)`.

    Args:
        budget: tokens, part of those seen or bytes that stay.
        weight: of attention against redundancy, lambda of the paper.
        buffer_length: newest tokens kept whatever their score.
        window_size: queries that are asked.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        budget: int | float | str = 1024,
        weight: float = 0.1,
        buffer_length: int = 128,
        window_size: int = 8,
        **settings: Any,
    ):
        options = {"weight": weight, "window_size": window_size}
        own = {"policy": "rkv", "policy_options": options, "budget": budget, "residual_length": buffer_length}
        super().__init__(config, **{**own, "recent": 0.0, **settings})


class RandomCache(CompressedCache):
    """A random choice: the bound that every policy must beat. Works under any attention.

    Args:
        budget: tokens, part of those seen or bytes that stay.
        seed: another seed, another choice.
    """

    def __init__(
        self, config: PreTrainedConfig | None = None, budget: int | float | str = 1024, seed: int = 0, **settings: Any
    ):
        super().__init__(config, **{"policy": "random", "policy_options": {"seed": seed}, "budget": budget, **settings})


class LearnedCache(CompressedCache):
    """Scored by a network that `kvcompress train-policy` trained for this model; works under any attention.

    Args:
        weights: the file that the command wrote, or weights in memory.
        budget: tokens, part of those seen or bytes that stay.

    Raises:
        ValueError: the file is for a model of another shape.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        weights: str | Path | LearnedWeights,
        budget: int | float | str = 1024,
        **settings: Any,
    ):
        if isinstance(weights, LearnedWeights):
            own: dict[str, Any] = {"policy": LearnedPolicy(weights)}
        else:
            own = {"policy": "learned", "policy_options": {"weights": str(weights)}}
        super().__init__(config, **{**own, "budget": budget, **settings})
        if config is None:
            return  # each layer is checked when it first evicts
        opened = weights if isinstance(weights, LearnedWeights) else LearnedWeights.open(weights)
        shapes = layer_shapes(config)
        opened.check_layers(len(shapes))
        for index, layer in self._budgets.items():
            if layer.eviction is not None and layer.eviction.make_policy().name == LearnedPolicy.name:
                opened.check(index, shapes[index].heads, shapes[index].key_dim, shapes[index].value_dim)


class VideoCache(CompressedCache):
    """Patches that no newer frame repeats, for streams (after InfiniPot-V, arXiv 2506.15745); any attention will do.

    Args:
        tokens_per_frame: tokens from one frame's beginning to the next one's, text between them included.
        budget: tokens, part of those seen or bytes that stay.
        value_weight: of the values' norms against novelty.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        tokens_per_frame: int | None = None,
        budget: int | float | str = 1024,
        value_weight: float = 0.25,
        **settings: Any,
    ):
        options = {"tokens_per_frame": tokens_per_frame, "value_weight": value_weight}
        super().__init__(config, **{"policy": "video", "policy_options": options, "budget": budget, **settings})
