"""One named class a way of packing: `CompressedCache` with the settings that a paper gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .cache import CompressedCache
from .calibration import Calibration
from .config import expect


class KIVICache(CompressedCache):
    """Keys per channel, values per token, asymmetric integers (KIVI, arXiv 2402.02750).

    Args:
        nbits: 2, 3, 4 or 8.
        group_size: numbers that share a scale.
        residual_length: newest tokens kept exact.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        nbits: int = 2,
        group_size: int = 64,
        residual_length: int = 128,
        **settings: Any,
    ):
        codec = f"kivi{nbits}"
        super().__init__(config, codec=codec, group_size=group_size, residual_length=residual_length, **settings)


class TurboQuantCache(CompressedCache):
    """Randomly rotated keys and values with Lloyd-Max levels (TurboQuant, arXiv 2504.19874, without the QJL bit).

    Args:
        nbits: 2, 3 or 4.
    """

    def __init__(self, config: PreTrainedConfig | None = None, nbits: int = 4, **settings: Any):
        super().__init__(config, codec=f"turbo{nbits}", **settings)


class EqRotCache(CompressedCache):
    """Equalised rotation: mean removed, query/key-equalised, Hadamard-rotated, uniform codes. The default family.

    Args:
        nbits: 2, 3 or 4, for keys and values alike.
    """

    def __init__(self, config: PreTrainedConfig | None = None, nbits: int = 4, **settings: Any):
        super().__init__(config, codec=f"eqrot{nbits}", **settings)


#: bits of `TransformCache` -> codecs of keys and of values
TRANSFORM_BITS = {
    1.6: ("pca1.125", "eqrot2"),
    1.75: ("pca1.5", "eqrot2"),
    2: ("pca2", "eqrot2"),
    2.5: ("pca2", "eqrot3"),
    3: ("pca3", "eqrot3"),
    4: ("pca4", "eqrot4"),
}


class TransformCache(CompressedCache):
    """Keys in a basis that was calibrated for the model, before their rotation, with bits where they count.

    Args:
        calibration: the file that `kvcompress calibrate` wrote, or a `Calibration`.
        bits: of a number, keys and values on average: 1.6, 1.75, 2, 2.5, 3 or 4.

    Raises:
        ValueError: the calibration is missing, or of another model, shape, format or version.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        calibration: str | Path | Calibration | None = None,
        bits: float = 2,
        **settings: Any,
    ):
        if bits not in TRANSFORM_BITS:
            raise expect("bits", f"one of {', '.join(f'{own:g}' for own in TRANSFORM_BITS)}", bits)
        keys, values = TRANSFORM_BITS[bits]
        super().__init__(config, **{"keys": keys, "values": values, "calibration": calibration, **settings})


class FP8Cache(CompressedCache):
    """float8 e4m3 with one scale a token."""

    def __init__(self, config: PreTrainedConfig | None = None, **settings: Any):
        super().__init__(config, codec="fp8", **settings)


class Int8Cache(CompressedCache):
    """8-bit integers with one scale a token: the "near-lossless" preset."""

    def __init__(self, config: PreTrainedConfig | None = None, **settings: Any):
        super().__init__(config, codec="int8", **settings)
