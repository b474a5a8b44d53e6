"""Compressed key-value caches for Hugging Face transformers."""

from .analysis import AnalysisReport, analyze
from .cache import CompressedCache
from .calibrating import calibrate
from .calibration import Calibration
from .clustered.tracker import PageSimilarityTracker
from .codecs.registry import codec_names
from .config import PRESETS, CacheConfig, LayerConfig
from .cpac import CPACCache
from .enable import disable, enable
from .hierarchical import HierarchicalCache
from .measure import tensor_bytes
from .monitoring import monitor
from .paging.cache import PagedCache
from .paging.engine import PagedAttentionEngine
from .paging.manager import MemoryManager
from .paging.pool import BlockPool, PoolFullError
from .planner import plan
from .plans import Plan
from .policies.base import Candidates, Policy
from .policies.settings import EvictionConfig
from .policy_strategies import (
    AdaKVCache,
    ExpectedAttentionCache,
    H2OCache,
    KeyDiffCache,
    LearnedCache,
    PyramidKVCache,
    RandomCache,
    RKVCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
    VideoCache,
)
from .prefix.cache import PrefixCache
from .sealing_error import ReconstructionError
from .stats import CacheStats
from .strategies import EqRotCache, FP8Cache, Int8Cache, KIVICache, TransformCache, TurboQuantCache
from .tuning import tune

__version__ = "0.1.0"

__all__ = [
    "AdaKVCache",
    "AnalysisReport",
    "BlockPool",
    "CPACCache",
    "CacheConfig",
    "CacheStats",
    "Calibration",
    "Candidates",
    "CompressedCache",
    "EqRotCache",
    "EvictionConfig",
    "ExpectedAttentionCache",
    "FP8Cache",
    "H2OCache",
    "HierarchicalCache",
    "Int8Cache",
    "KIVICache",
    "KeyDiffCache",
    "LayerConfig",
    "LearnedCache",
    "MemoryManager",
    "PRESETS",
    "PageSimilarityTracker",
    "PagedAttentionEngine",
    "PagedCache",
    "Plan",
    "Policy",
    "PoolFullError",
    "PrefixCache",
    "PyramidKVCache",
    "RKVCache",
    "RandomCache",
    "ReconstructionError",
    "SnapKVCache",
    "StreamingLLMCache",
    "TOVACache",
    "TransformCache",
    "TurboQuantCache",
    "VideoCache",
    "analyze",
    "calibrate",
    "codec_names",
    "disable",
    "enable",
    "monitor",
    "plan",
    "tensor_bytes",
    "tune",
]
