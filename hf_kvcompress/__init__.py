"""Compressed key-value caches for Hugging Face transformers."""

from .cache import (
    CompressedCache,
    EqRotCache,
    FP8Cache,
    Int8Cache,
    KIVICache,
    TurboQuantCache,
)
from .codecs.registry import codec_names
from .config import PRESETS, CacheConfig, LayerConfig
from .enable import disable, enable
from .measure import tensor_bytes
from .monitor import ReconstructionError
from .stats import CacheStats

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CacheConfig",
    "CacheStats",
    "CompressedCache",
    "EqRotCache",
    "FP8Cache",
    "Int8Cache",
    "KIVICache",
    "LayerConfig",
    "ReconstructionError",
    "TurboQuantCache",
    "codec_names",
    "disable",
    "enable",
    "tensor_bytes",
]
