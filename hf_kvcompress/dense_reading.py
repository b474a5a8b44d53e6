"""What a plain attention reads of a compressed layer: keys and values of all positions, or of those that stayed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .reading import read_dense, read_kept

if TYPE_CHECKING:
    from .layer import CompressedLayer


def is_compact(layer: CompressedLayer) -> bool:
    """Tokens are gone, so that a dense read has only those that stayed, one behind the other."""
    return layer.storage is not None and layer.storage.evictor is not None and layer.storage.evictor.evicted


def tokens_kept(layer: CompressedLayer) -> int:
    """Tokens that one row holds, the pass in flight not counted."""
    assert layer.storage is not None
    return layer.storage.tokens_stored()[0]


def positions_read(layer: CompressedLayer) -> tuple[int, int]:
    """Positions that a dense read covers: what transformers' own layer of this kind would return."""
    chunk = layer.chunk
    if is_compact(layer):
        return layer.seen - tokens_kept(layer) - (0 if chunk is None else chunk.keys.shape[2]), layer.seen
    if layer.sliding_window is None:
        return 0, layer.seen
    start = chunk.start if chunk is not None else layer.seen
    return max(start - layer.sliding_window + 1, 0), layer.seen


def dense(layer: CompressedLayer, role: str, covered: tuple[int, int] | None = None) -> torch.Tensor:
    """Keys ("key") or values ("value") of all positions, `[B, H, T, D]` in the model's dtype.

    Once tokens have been evicted: of those left, where one row's heads all hold the same number; else zeros in the
    places of the others.
    """
    assert layer.storage is not None
    chunk, compact = layer.chunk, is_compact(layer)
    ragged = compact and layer.storage.ragged
    start, end = (0, layer.seen) if ragged else covered or positions_read(layer)
    if compact and not ragged:
        kept = read_kept(layer.storage, role)
        return kept if chunk is None else torch.cat([kept, chunk.of(role).to(kept.dtype)], dim=2)
    if chunk is None:
        return read_dense(layer.storage, role, start, end)
    if chunk.start <= start:
        return chunk.of(role)
    whole = read_dense(layer.storage, role, start, end)
    whole[:, :, chunk.start - start :] = chunk.of(role)
    return whole


def refuse_plain_attention(layer: CompressedLayer) -> None:
    """Raise RuntimeError where a plain attention would be wrong: a policy evicts and cannot be shown what it needs."""
    storage = layer.storage
    if storage is None or storage.evictor is None:
        return
    why = storage.evictor.needs_our_attention(storage.batch, layer.stands_alone)
    if why is None and layer.may_be_cross_attention:
        why = "a plain attention does not tell an encoder's text, of which nothing may go, from the decoder's own"
    if why is None:
        return
    if layer.mask_is_ours:
        raise RuntimeError(
            f"layer {layer.index}: {why}, and this model expands what it caches before its attention, so the queries "
            "do not fit what is stored. Use a policy that needs no queries (streaming, keydiff, random), one row at a "
            "time and the same budget in every head and layer, or no policy."
        )
    raise RuntimeError(
        f"layer {layer.index}: {why}. Call `hf_kvcompress.enable(model)` first: this model runs an attention that does "
        "not know compressed caches."
    )
