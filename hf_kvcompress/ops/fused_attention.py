"""Decode attention straight over packed pages, as one op.

A decode step between two seals uploads nothing: it allocates, launches one kernel for each pair of codecs, and one that
joins their results. `attention_table.py` makes what the kernels read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from . import kernels
from .attention_formats import ROWS, TURBO
from .attention_table import reached
from .hadamard import hartley, signs, split
from .library import register

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MOST_ROWS = 64  # query rows of a lane; with more, products of decoded pages are faster
LOG2E = 1.4426950408889634
THREADS = 128
COMBINE_THREADS = 256


@dataclass(frozen=True)
class _Kernels:
    main: kernels.Kernel
    combine: kernels.Kernel
    key_dim: int
    rotated_keys: bool
    rotated_values: bool


@lru_cache(maxsize=256)
def _parsed(text: str, dtype: int) -> _Kernels:
    name, *pairs = text.split(" ")
    macros = {key: int(number) for key, number in (pair.split("=") for pair in pairs)}
    macros["DTYPE"] = dtype
    rotated = [macros[f"{role}_CODEC"] // 10 >= TURBO for role in ("KEY", "VALUE")]
    joined = {"HEAD_VALUE": macros["HEAD_VALUE"], "DTYPE": dtype, "ROTATED": int(rotated[1])}
    main = kernels.load(f"{name}.cu", name, **macros)
    combine = kernels.load("attention_combine.cu", "attention_combine", **joined)
    return _Kernels(main, combine, macros["HEAD_KEY"], *rotated)


@lru_cache(maxsize=64)
def _rotation(dim: int, rotated: bool, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not rotated:
        return None, None
    rest = split(dim)[1]
    return signs(dim, device), hartley(rest, device) if rest > 1 else None


@register(
    "Tensor query, Tensor table, Tensor? masks, Tensor? new_keys, Tensor? new_values, Tensor? sinks, Tensor(a!) out, "
    "Tensor(b!)? lse, Tensor(c!)? logits, int[] sizes, int window, bool causal, int heads, float scaling, "
    "float softcap, str[] variants"
)
def fused_attention(
    query: torch.Tensor,
    table: torch.Tensor,
    masks: torch.Tensor | None,
    new_keys: torch.Tensor | None,
    new_values: torch.Tensor | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    logits: torch.Tensor | None,
    sizes: Sequence[int],
    window: int,
    causal: bool,
    heads: int,
    scaling: float,
    softcap: float,
    variants: Sequence[str],
) -> None:
    """Attention of `query` `[B, Hq, q, D]` into `out` `[B, q, Hq, Dv]`, both of the model's dtype.

    Args:
        table, sizes, variants: of a `Table`, which knows the shapes and strides of the other tensors.
        masks: of `masks_of`, for every packed run, the window and the new tokens.
        new_keys, new_values: exact `[B, H, n, D]` behind the window.
        sinks: `[Hq]` float32 logits without values.
        lse: `[B * H, G * q]` float32, the log of the sum of exp of every query's logits.
        logits: float32, as `Table.logits_at` says; the exact tokens' `[B * H, G * q, window + new]` come last.
        window: exact tokens that are stored.
        causal: new tokens see only those before them.
        heads: key-value heads.
        softcap: 0 for none.
    """
    batch, query_heads, length, _ = query.shape
    rows, device, value_dim = query_heads // heads * length, query.device, out.shape[-1]
    factor = scaling if softcap else scaling * LOG2E
    scratch = torch.empty(sizes[0] * rows * (value_dim + 2), dtype=torch.float32, device=device)
    combine: kernels.Kernel | None = None
    turned: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    behind = () if query.is_cuda else reached(table, masks)
    tiles, shared = -(-rows // ROWS), (new_keys, new_values, window, int(causal))
    for number, text in enumerate(variants):
        use = _parsed(text, DTYPES[query.dtype])
        if combine is None or use.rotated_values:
            combine, turned = use.combine, _rotation(value_dim, use.rotated_values, device)
        works_at, slots = sizes[1 + 2 * number], sizes[2 + 2 * number]
        if slots:
            args = [query, table, masks, works_at, *shared, *_rotation(use.key_dim, use.rotated_keys, device)]
            use.main((slots, tiles), THREADS, [*args, scratch, logits, factor, softcap], like=query, reached=behind)
    assert combine is not None
    combine((batch * heads, rows), COMBINE_THREADS, [table, scratch, sinks, *turned, out, lse], like=query)
