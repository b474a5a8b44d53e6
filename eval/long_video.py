"""An unbounded stream of video frames in one cache of fixed size.

    python eval/long_video.py
    python eval/long_video.py --model Qwen/Qwen2.5-VL-3B-Instruct --frames 500 --budget 4096

Every turn feeds one frame into the same cache, as a stream would; nothing of older turns is kept outside it. The frames
are synthetic: shapes that move before a still background. The default model is a tiny random Qwen2.5-VL, which knows
nothing but has the real one's positions; a real one needs its processor, and that needs pillow and torchvision.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import hf_kvcompress as kvc
from hf_kvcompress.environment import devices, versions
from hf_kvcompress.shapes import layer_shapes

Inputs = dict[str, torch.Tensor]
FLAT = 1.03  # the second half of a stream may hold this much more than the first
WARM_UP = 8192  # tokens until which a codec may still add to its statistics
GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class VideoStream:
    """One conversation that grows turn after turn in one cache, at the M-RoPE positions that one pass would give it.

    Args:
        model: a Qwen2.5-VL or one that numbers positions alike.
        cache: of one row, empty.
    """

    def __init__(self, model: PreTrainedModel, cache: Any):
        self.model, self.cache = model, cache
        self.next_position = 0  # of the next text token, the same in time, height and width

    def place(self, inputs: Inputs) -> torch.Tensor:
        """Positions `[3, 1, T]` of a turn's tokens; the next turn is placed behind them."""
        # A further text token tells where the next turn begins, whatever this one ends with.
        ids, kinds = (pad(inputs[name], (0, 1)) for name in ("input_ids", "mm_token_type_ids"))
        grids = {name: inputs[name] for name in GRIDS if name in inputs}
        at, _ = self.model.model.get_rope_index(ids, mm_token_type_ids=kinds, **grids)
        at = at + self.next_position
        self.next_position = int(at[0, 0, -1])
        return at[:, :, :-1]

    @torch.no_grad()
    def feed(self, inputs: Inputs, logits_to_keep: int = 1) -> torch.Tensor:
        """Run a turn through the model; returns the logits of its last tokens `[1, n, vocabulary]`."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        at = self.place(inputs)
        out = self.model(position_ids=at, past_key_values=self.cache, logits_to_keep=logits_to_keep, **inputs)
        return out.logits

    @torch.no_grad()
    def ask(self, input_ids: torch.Tensor, max_new_tokens: int = 16) -> torch.Tensor:
        """Put a question in text; returns the tokens of the answer, which the conversation then holds as well."""
        seen, input_ids = self.cache.get_seq_length(), input_ids.to(self.model.device)
        # `generate` leaves out as many tokens as the cache has seen, and never looks at them.
        ids = torch.cat([input_ids.new_zeros(1, seen), input_ids], dim=1)
        self.model.model.rope_deltas = torch.tensor([[self.next_position - seen]], device=ids.device)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        self.next_position += self.cache.get_seq_length() - seen
        answer = out[:, ids.shape[1] :]
        self.feed(text_turn(answer[:, -1:]))  # `generate` has not run its last token through the model
        return answer


def text_turn(ids: torch.Tensor) -> Inputs:
    return {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}


def synthetic_frames(size: int, number: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Frames `[3, size, size]` from 0 to 1: a square and a disc that move over a background that stays."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    background = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")[0]
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    red, blue = torch.tensor([1.0, 0.1, 0.1])[:, None], torch.tensor([0.1, 0.2, 1.0])[:, None]
    radius = size // 8
    for turn in range(number):
        frame = background.clone()
        left, top = (turn * 3) % size, (turn * 2) % size
        square = ((x - left) % size < 2 * radius) & ((y - top) % size < 2 * radius)
        middle = (size // 2 + int(size / 3 * torch.sin(torch.tensor(turn / 9.0))), size // 3)
        disc = (x - middle[0]) ** 2 + (y - middle[1]) ** 2 < radius**2
        frame[:, square], frame[:, disc] = red, blue
        yield frame


@dataclass(frozen=True)
class Row:
    """What is held after a number of frames; `plain` is what the same tokens take uncompressed."""

    frames: int
    seen: int
    stored: int
    cache: int
    plain: int
    resident: int
    position: int

    def sizes(self) -> list[tuple[int, int, int]]:
        return [(self.cache, 10, 3), (self.plain, 10, 2), (self.resident, 12, 1)]


def tokens_stored(cache: kvc.CompressedCache) -> int:
    """Tokens of the layer that holds most."""
    return max(layer.storage.tokens_stored()[0] for layer in cache.packed_layers() if layer.storage is not None)


class TinyTurns:
    """Turns of the tiny model: made-up text tokens around a frame's patches."""

    image, start, end = 90, 92, 93

    def __init__(self, model: PreTrainedModel):
        self.vision = model.config.vision_config

    def opening(self) -> Inputs:
        return text_turn(torch.arange(3, 15)[None])

    def frame(self, frame: torch.Tensor) -> Inputs:
        pixels, grid = self.patches(frame)
        tokens = int(grid.prod()) // self.vision.spatial_merge_size**2
        ids = torch.tensor([[self.start, *[self.image] * tokens, self.end]])
        kinds = (ids == self.image).long()
        return {"input_ids": ids, "mm_token_type_ids": kinds, "pixel_values": pixels, "image_grid_thw": grid}

    def question(self) -> torch.Tensor:
        return torch.arange(20, 30)[None]

    def answer(self, ids: torch.Tensor) -> str:
        return f"token ids {ids[0].tolist()}"

    def patches(self, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels as the processor of the real model lays them out: merged patches side by side, the frame doubled."""
        side, merge, times = self.vision.patch_size, self.vision.spatial_merge_size, self.vision.temporal_patch_size
        rows, columns = (length // side for length in frame.shape[1:])
        x = ((frame - 0.5) / 0.25)[None].expand(times, -1, -1, -1)
        x = x.reshape(times, 3, rows // merge, merge, side, columns // merge, merge, side)
        x = x.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, -1)
        return x, torch.tensor([[1, rows, columns]])


class ProcessorTurns:
    """Turns of a real model, by its processor: one long message of the user that holds all frames."""

    def __init__(self, source: str):
        self.processor = AutoProcessor.from_pretrained(source)

    def _turn(self, text: str, **images: Any) -> Inputs:
        made = self.processor(text=[text], return_tensors="pt", **images)
        kinds = made.get("mm_token_type_ids", torch.zeros_like(made["input_ids"]))
        inputs = {name: made[name] for name in ("input_ids", "pixel_values", "image_grid_thw") if name in made}
        return {**inputs, "mm_token_type_ids": kinds}

    def opening(self) -> Inputs:
        return self._turn("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")

    def frame(self, frame: torch.Tensor) -> Inputs:
        image = (frame * 255).to(torch.uint8)
        return self._turn("<|vision_start|><|image_pad|><|vision_end|>", images=[image])

    def question(self) -> torch.Tensor:
        asked = "What is in the newest frame, and where?<|im_end|>\n<|im_start|>assistant\n"
        return self._turn(asked)["input_ids"]

    def answer(self, ids: torch.Tensor) -> str:
        return self.processor.batch_decode(ids, skip_special_tokens=True)[0]


def tiny_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of three layers with random weights, large enough that attention is far from uniform."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = dict(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, rope_parameters=rope, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, window_size=16)
    vision |= dict(out_hidden_size=64, fullatt_block_indexes=[1])
    tokens = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            spread = 1.0 if "embed_tokens" in name else 1.2 / parameter[0].numel() ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread
        elif name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def resident_bytes() -> int:
    """Memory of this process; where the system does not tell, its highest so far."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, TinyTurns | ProcessorTurns, int]:
    """Model, what makes its turns, and the size of a frame."""
    if options.model is None:
        model = tiny_model().to(options.device)
        return model, TinyTurns(model), options.size or 64
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").to(options.device).eval()
    return model, ProcessorTurns(options.model), options.size or 224


def growth(held: list[int], warm: int) -> float | None:
    """Highest of the second half over the highest of the first, without the first `warm`; None for too few."""
    middle = warm + (len(held) - warm) // 2
    return max(held[middle:]) / max(held[warm:middle]) if middle > warm else None


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Feed the stream, check that memory is flat, ask. Raises RuntimeError if the cache grows."""
    model, turns, size = load(options)
    if options.attention == "kvcompress":
        kvc.enable(model)
    else:
        model.set_attn_implementation(options.attention)
    opening, frames = turns.opening(), synthetic_frames(size, options.frames)
    turn = turns.frame(next(frames))
    length = turn["input_ids"].shape[1]
    own = {"policy_options": {"tokens_per_frame": length}} if options.policy == "video" else {}
    settings = {"policy": options.policy, "budget": options.budget, "codec": options.codec, **own}
    cache = kvc.CompressedCache(model.config, pin=[(0, opening["input_ids"].shape[1])], **settings)
    stream = VideoStream(model, cache)
    stream.feed(opening)
    shapes, width = layer_shapes(model.config), model.dtype.itemsize
    plain = sum(shape.heads * (shape.key_dim + shape.value_dim) for shape in shapes) * width  # bytes of a token
    every, held, table = max(options.frames // 10, 1), [], []
    print(f"{'frames':>8}{'seen':>9}{'stored':>8}{'cache MB':>10}{'plain MB':>10}{'process MB':>12}{'position':>10}")
    for number in range(1, options.frames + 1):
        stream.feed(turn)
        held.append(cache.nbytes)
        if number % every == 0 or number == 1:
            seen, stored = cache.get_seq_length(), tokens_stored(cache)
            row = Row(number, seen, stored, held[-1], seen * plain, resident_bytes(), stream.next_position)
            sizes = "".join(f"{size / 2**20:{room}.{digits}f}" for size, room, digits in row.sizes())
            print(f"{number:8}{seen:9}{stored:8}{sizes}{row.position:10}", flush=True)
            table.append(asdict(row))
        if number < options.frames:
            turn = turns.frame(next(frames))
    ratio = growth(held, warm=max(2 * options.budget, WARM_UP) // length)
    if ratio is None:
        print("too few frames to tell whether memory is flat")
    else:
        print(f"after the warm-up, peak of the second half over peak of the first: {ratio:.3f}")
        if ratio > FLAT:
            raise RuntimeError(f"the cache grew by {ratio - 1:.1%} in the second half of the stream")
    print("asked about the newest frame:", turns.answer(stream.ask(turns.question(), options.answer_tokens)))
    return {"growth": ratio, "tokens_per_turn": length, "turns": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Qwen2.5-VL; a tiny random one if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--size", type=int, help="side of a frame in pixels: 64, or 224 for a real model")
    parser.add_argument("--policy", default="video")
    parser.add_argument("--codec", default="eqrot4")
    parser.add_argument("--budget", type=int, default=1024, help="tokens that a head keeps")
    parser.add_argument("--attention", default="kvcompress", help="or sdpa, which the video policy works under as well")
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = run(options)
    if options.json:
        report = {"versions": versions(), "devices": devices(), "settings": vars(options), "results": result}
        options.json.write_text(json.dumps(report, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
