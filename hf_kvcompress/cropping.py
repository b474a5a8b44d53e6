"""Taking tokens back: from the pass in flight as if never come, from storage where none went for their sake."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .observation import LONGEST_DRAFT

if TYPE_CHECKING:
    from .layer import CompressedLayer


def crop(layer: CompressedLayer, tokens_to_remove: int) -> None:
    """Forget the newest `-tokens_to_remove` positions; the rest of a cut page returns to the window, decoded."""
    check_crop(layer, tokens_to_remove)
    if layer.storage is None:
        return
    if layer.may_be_cropped and layer.chunk is not None and tokens_to_remove:
        own = min(-tokens_to_remove, layer.chunk.keys.shape[2])
        layer.seen -= own
        if not layer.chunk.crop(own):
            layer.chunk = None
        tokens_to_remove += own
        if tokens_to_remove == 0:
            return
    layer.commit()
    if tokens_to_remove:
        layer.seen = max(layer.seen + tokens_to_remove, 0)
        layer.storage.truncate(layer.seen)
    layer.storage.drop_expired()


def check_crop(layer: CompressedLayer, tokens_to_remove: int) -> None:
    """Raise ValueError or RuntimeError if `crop` cannot take back these tokens, before anything is changed."""
    if tokens_to_remove > 0:
        raise ValueError(f"tokens_to_remove: expected 0 or a negative number of tokens, got {tokens_to_remove}")
    if layer.storage is None or tokens_to_remove == 0:
        return
    drafted = 0
    if layer.may_be_cropped and layer.chunk is not None:
        drafted = layer.chunk.keys.shape[2]
        if LONGEST_DRAFT < -tokens_to_remove < drafted and layer.chunk.observed is not None:
            raise RuntimeError(
                f"crop: layer {layer.index} counts attention and can take back at most the last {LONGEST_DRAFT} "
                f"tokens of a pass, or all of it, got {tokens_to_remove}"
            )
    else:
        layer.commit()
    if -tokens_to_remove <= drafted:
        return
    if layer.storage.evictor is not None and layer.storage.evictor.evicted:
        raise RuntimeError(
            f"crop: layer {layer.index} has evicted tokens for the sake of those to be taken back; call "
            "`activate_past_recording` before a pass that you may want to crop, and crop before the next one"
        )
    if not layer.is_croppable:
        raise RuntimeError(
            f"crop: layer {layer.index} has a sliding window of {layer.sliding_window} and has given back older "
            "tokens; call `activate_past_recording` before generating if you want to crop"
        )
