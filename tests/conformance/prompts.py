"""Seeded prompts for the zoo: what `generate` and `forward` are called with, apart from the cache."""

from __future__ import annotations

from typing import Any

import torch

from .zoo import IMAGE_TOKEN, TEXT_TOKENS, VISION_END, VISION_START, Entry

Inputs = dict[str, Any]
GRID = (1, 4, 8)  # image patches; merged 2 x 2 they take 8 tokens


def text_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random text; its second half repeats a piece of the first, so that prompt-lookup finds candidates."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(*TEXT_TOKENS, (rows, length), generator=generator)
    piece = length // 3
    ids[:, -piece:] = ids[:, :piece]
    return ids


def prompt(entry: Entry, lengths: tuple[int, ...] = (37,), seed: int = 0) -> Inputs:
    """Left-padded batch with a row of each length. Encoder-decoder models get it as decoder prompt."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = text_ids(1, length, seed + row)[0]
        if entry.kind == "encoder_decoder":  # else `generate` puts its own start token before the padding
            ids[row, width - length] = entry.model.config.decoder_start_token_id
        mask[row, width - length :] = 1
    if entry.kind == "encoder_decoder":
        return {**encoder_inputs(entry, len(lengths), seed), "decoder_input_ids": ids, "decoder_attention_mask": mask}
    if entry.kind == "image":
        return {"input_ids": ids, "attention_mask": mask, **_insert_images(ids, lengths, seed)}
    return {"input_ids": ids, "attention_mask": mask}


def encoder_inputs(entry: Entry, rows: int, seed: int = 0) -> Inputs:
    """Audio features for Whisper, text for T5: what the encoder reads."""
    generator = torch.Generator().manual_seed(seed + 100)
    config = entry.model.config
    if config.model_type == "whisper":
        frames = 2 * config.max_source_positions  # the encoder halves them
        return {"input_features": torch.randn(rows, config.num_mel_bins, frames, generator=generator)}
    ids = torch.randint(*TEXT_TOKENS, (rows, 23), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _insert_images(ids: torch.Tensor, lengths: tuple[int, ...], seed: int) -> Inputs:
    """Put one image near the start of every row (in place) and return the tensors that describe the images."""
    generator = torch.Generator().manual_seed(seed + 200)
    tokens = GRID[0] * GRID[1] * GRID[2] // 4
    kinds = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        start = ids.shape[1] - length + 2
        ids[row, start] = VISION_START
        ids[row, start + 1 : start + 1 + tokens] = IMAGE_TOKEN
        ids[row, start + 1 + tokens] = VISION_END
        kinds[row, start + 1 : start + 1 + tokens] = 1
    patches = GRID[0] * GRID[1] * GRID[2]
    patch_numbers = 3 * 2 * 4 * 4  # channels, frames, height, width of a patch
    return {
        "pixel_values": torch.randn(len(lengths) * patches, patch_numbers, generator=generator),
        "image_grid_thw": torch.tensor([GRID] * len(lengths)),
        "mm_token_type_ids": kinds,
    }


def row_alone(entry: Entry, inputs: Inputs, row: int) -> Inputs:
    """The inputs of one row of a left-padded batch, without its padding."""
    mask_name = "decoder_attention_mask" if entry.kind == "encoder_decoder" else "attention_mask"
    real = inputs[mask_name][row].bool()
    alone: Inputs = {}
    for name, tensor in inputs.items():
        if name == "pixel_values":
            patches = tensor.shape[0] // inputs["image_grid_thw"].shape[0]
            alone[name] = tensor[row * patches : (row + 1) * patches]
        elif name == "image_grid_thw" or tensor.shape[1:] != real.shape:
            alone[name] = tensor[row : row + 1]
        else:
            alone[name] = tensor[row : row + 1, real]
    return alone


def ids_of(entry: Entry, inputs: Inputs) -> torch.Tensor:
    """The token ids the decoder starts from."""
    return inputs["decoder_input_ids" if entry.kind == "encoder_decoder" else "input_ids"]
