"""Transform coding of keys: a calibrated basis, bits where the energy is, the best levels for every channel.

A calibration has, for every layer and key-value head, a mean and a basis learned from other texts. A key without its
rotation (or as it is, where the rotation is unknown) loses the mean, is seen in the basis, and each coordinate is
stored in as many bits, 0 to 6, as pay for themselves. No number is computed from the text at hand: every token is
packed by itself, without a scale. Values are packed as by `eqrot`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..ops import native
from ..ops.numeric import block_numel, blocks, clean_
from ..shards import first_head
from .base import Codec, CodecContext, Field, Packed, Role
from .channel_bits import bytes_of, on, part_table, places_of, unpack

_BLOCK = 1 << 18
_TOKENS = 2048  # of one head at a time, as many as a segment has: fewer would spend more on calls
_FAR = 1e18  # keys beyond are clamped, so that products stay finite


@dataclass(frozen=True, eq=False)
class Frame:
    """What a calibration says of one layer at some number of bits; R channels have any, H heads.

    mean: `[H, D]`. to: `[H, D, R]`; (key - mean) @ to are coordinates, those with most bits first. back: `[H, R, D]`.
    edges: `[H, R, 63]`, between the levels, infinite behind the last. levels: `[H, R, 64]`. bits: of each channel.
    rotated: keys are taken with their rotation. All float32.
    """

    mean: torch.Tensor
    to: torch.Tensor
    back: torch.Tensor
    edges: torch.Tensor
    levels: torch.Tensor
    bits: tuple[int, ...]
    rotated: bool
    _made: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict, repr=False)

    @torch.inference_mode(False)
    def paired(self, pairs: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Mean and inverse basis, channels in the order of `pairs` (a layer has but one), and levels, in this dtype."""
        name = str(dtype)
        if name not in self._made:
            order = torch.tensor(pairs, device=self.mean.device)
            made = self.mean[:, order], self.back[:, :, order].contiguous(), self.levels
            self._made[name] = tuple(part.to(dtype) for part in made)
        return self._made[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> Frame:
        return self  # copies of a cache share it

    def storages_held(self) -> dict[Hashable, int]:
        """Nothing that a cache counts: it belongs to the model, as its weights do."""
        return {}

    def on(self, device: torch.device) -> Frame:
        """The same on another device."""
        if self.mean.device == device:
            return self
        mean, to, back, edges, levels = (t.to(device) for t in (self.mean, self.to, self.back, self.edges, self.levels))
        return Frame(mean, to, back, edges, levels, self.bits, self.rotated)


class TransformCodec(Codec):
    """Keys in a calibrated basis, with bits by channel; needs a calibration."""

    family = "pca"
    supported_bits = (4, 3, 2.5, 2, 1.5, 1.125, 1)  # type: ignore[assignment]
    wants_context = True

    def __init__(self, nbits: float, role: Role, dim: int, page_size: int = 64, group_size: int = 64):
        super().__init__(nbits, role, dim, page_size, group_size)  # type: ignore[arg-type]
        self._frames: dict[torch.device, Frame] = {}
        self._rotary: Any = None

    @property
    def name(self) -> str:
        return f"{self.family}{self.nbits:g}"

    @cached_property
    def fields(self) -> dict[str, Field]:  # type: ignore[override]
        """The bits of a token, and the head that a segment is of."""
        size = bytes_of(self.dim, self.nbits)
        return {"codes": Field((size,), torch.uint8, tokens_last=True), "head": Field((), torch.int16, None)}

    def bind(self, context: CodecContext) -> None:
        """Take the layer's frame out of the calibration; raises ValueError if it has none that fits."""
        if context.calibration is None:
            raise ValueError(
                f"calibration: expected a file that `kvcompress calibrate` wrote, for codec {self.name!r}, got None"
            )
        frame: Frame = context.calibration.frame(context.layer, self.nbits)
        if frame.mean.shape[1] != self.dim:
            got = f"{frame.mean.shape[1]} in layer {context.layer}"
            raise ValueError(f"calibration: expected a head size of {self.dim}, got {got}")
        if not frame.rotated and context.rotary is None:
            raise ValueError(
                f"calibration: expected one of rotated keys (`rotated=True`), since codec {self.name!r} does not know "
                f"this model's rotation: expected {context.why_not}"
            )
        self._frames = {frame.mean.device: frame}
        self._rotary = None if frame.rotated else context.rotary
        self.wants_positions = self._rotary is not None and self._rotary.frequencies is not None

    def _frame(self, device: torch.device) -> Frame:
        if not self._frames:
            raise ValueError(
                f"codec: expected {self.name!r} in a cache that has a config and a calibration, got neither"
            )
        if device not in self._frames:
            self._frames[device] = next(iter(self._frames.values())).on(device)
        return self._frames[device]

    def begin_segment(
        self, x: torch.Tensor, query_ms: torch.Tensor | None = None, history: Packed | None = None
    ) -> Packed:
        """The number of each head of `x` `[..., H, S, T, D]` in the model; the first one's without such axes."""
        heads = torch.zeros(x.shape[:-2], dtype=torch.int16, device=x.device)
        if x.dim() > 3:
            here = x.shape[-4]
            first = first_head(len(self._frame(x.device).mean), here)
            heads += torch.arange(first, first + here, dtype=torch.int16, device=x.device)[:, None]
        return {"head": heads}

    def encode(self, x: torch.Tensor, segment: Packed, queries: torch.Tensor | None = None) -> Packed:
        """Pack `x` `[..., T, D]`."""
        lead, tokens = x.shape[:-2], x.shape[-2]
        codes = torch.zeros(*lead, self.fields["codes"].shape[0], tokens, dtype=torch.uint8, device=x.device)
        rows, at = codes.view(-1, *codes.shape[-2:]), _flat(segment.get("at"), lead, tokens)
        heads, flat = segment["head"].reshape(-1).long(), x.reshape(-1, tokens, self.dim)
        for start, end, _, _ in blocks(len(flat), 1, tokens * self.dim, block_numel(x.device, _BLOCK)):
            own = None if at is None else at[start:end]
            found = self._codes(flat[start:end], heads[start:end], own)
            for size, channels, places, up in places_of(self._frame(x.device).bits):
                for channel, place, shift in zip(channels, places, up, strict=True):
                    part = (found[:, channel] >> shift) & (2**size - 1)
                    rows[start:end, place // 8] |= (part << (place % 8)).to(torch.uint8)
        return {"codes": codes}

    def _codes(self, x: torch.Tensor, heads: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
        """Codes `[n, R, T]` of keys `[n, T, D]`."""
        frame = self._frame(x.device)
        y = clean_(x.to(torch.float32, copy=True)).clamp_(-_FAR, _FAR)
        if at is not None:
            y = self._rotary.undo(y, at)
        y = (y - frame.mean[heads].unsqueeze(1)).double()  # float32 products of other shapes could round otherwise
        z = (frame.to[heads].double().mT @ y.mT).float()
        return torch.searchsorted(frame.edges[heads], z.contiguous())

    def decode(self, packed: Packed) -> torch.Tensor:
        """The keys, with their rotation."""
        lead, tokens = packed["codes"].shape[:-2], packed["codes"].shape[-1]
        out = torch.empty(*lead, tokens, self.dim, device=packed["codes"].device)
        flat = out.view(-1, tokens, self.dim)
        for start, end, numbers, heads, at in self._numbers(packed):
            keys = numbers.mT @ self._frame(out.device).back[heads]
            keys += self._frame(out.device).mean[heads].unsqueeze(1)
            flat[start:end] = keys if at is None else self._rotary.apply(keys, at)
        return out

    def _numbers(self, packed: Packed) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Coordinates `[n, R, T]` float32 of some segments at once: `(first, end, coordinates, heads, at)`."""
        codes = packed["codes"]
        lead, size, tokens = codes.shape[:-2], codes.shape[-2], codes.shape[-1]
        frame, at = self._frame(codes.device), _flat(packed.get("at"), lead, tokens)
        heads, flat = packed["head"].reshape(-1).long(), codes.reshape(-1, size, tokens)
        levels = frame.levels.shape[-1]
        for start, end, _, _ in blocks(len(flat), 1, tokens * self.dim, block_numel(codes.device, _BLOCK)):
            index = unpack(flat[start:end], frame.bits)
            own = heads[start:end]
            channels = torch.arange(len(frame.bits), device=codes.device) * levels
            index += (own[:, None] * (len(frame.bits) * levels) + channels)[..., None].to(index.dtype)
            numbers = frame.levels.flatten().index_select(0, index.flatten()).view(index.shape)
            yield start, end, numbers, own, None if at is None else at[start:end]

    def tolerance(self, x: torch.Tensor, segment: Packed) -> torch.Tensor:
        """The error itself: a number of bits alone bounds nothing in a basis that other texts have made."""
        packed = {**self.encode(x, segment), **segment}
        error = torch.linalg.vector_norm(self.decode(packed).double() - x.double(), dim=-1)
        size = torch.linalg.vector_norm(x.double(), dim=-1)
        return (error * (1 + 1e-5) + size * 1e-5 + 1e-5 * self._frame(x.device).levels.abs().amax()).float()

    def scores(self, q: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`q @ decode(packed).mT`; where keys are packed as the query meets them, the basis goes to the query."""
        lead, tokens = packed["codes"].shape[:-2], packed["codes"].shape[-1]
        frame, segments, places = self._frame(q.device), lead[2], packed.get("at")
        out = q.new_empty(lead[0] * lead[1] * segments, q.shape[2], tokens, dtype=torch.float32)
        each = q.float().flatten(0, 1).repeat_interleave(segments, 0)  # [n, M, D]
        if self.wants_positions and places is not None and places.dim() == 1:
            self._score_run(each, packed, places, out)
        else:
            for start, end, numbers, heads, at in self._numbers(packed):
                own = each[start:end]
                if self.wants_positions:
                    keys = self._rotary.apply(numbers.mT @ frame.back[heads] + frame.mean[heads].unsqueeze(1), at)
                    out[start:end] = own @ keys.mT
                else:
                    constant = own @ frame.mean[heads].unsqueeze(-1)
                    out[start:end] = (own @ frame.back[heads].mT) @ numbers + constant
        wide = out.unflatten(0, (lead[0], lead[1], segments))
        return wide.movedim(2, 3).flatten(3, 4)

    def _score_run(self, q: torch.Tensor, packed: Packed, places: torch.Tensor, out: torch.Tensor) -> None:
        """Scores `[n, M, T]` of `q` `[n, M, D]` with keys that stand one behind the other, into `out`.

        The query is turned back to the first key's position, and keys turn by how far they are from it: the same
        complex numbers for every run, with partners side by side.
        """
        pairs, turns = self._rotary.pairs(self.dim), self._rotary.turns(out.shape[-1], q.device)
        q, turning = self._rotary.turn_back(q, places[:1])[..., on(pairs, q.device)], 2 * turns.shape[1]
        if self.compute_dtype == torch.bfloat16 and native.serves(q, 1):
            return self._score_run_by_library(q, packed, turns, out)
        mean, back, _ = self._frame(q.device).paired(pairs, torch.float32)
        for start, end, numbers, heads, _ in self._numbers(packed):
            keys = torch.baddbmm(mean[heads].unsqueeze(1), numbers.mT, back[heads])
            torch.view_as_complex(keys[..., :turning].unflatten(-1, (-1, 2))).mul_(turns)
            out[start:end] = q[start:end] @ keys.mT

    def _score_run_by_library(self, q: torch.Tensor, packed: Packed, turns: torch.Tensor, out: torch.Tensor) -> None:
        """`_score_run` on a CPU, codes read by the compiled library and the basis applied in bfloat16.

        Buffers serve all blocks: new ones of this size would cost more than what is computed in them.
        """
        mean, back, levels = self._frame(q.device).paired(self._rotary.pairs(self.dim), torch.bfloat16)
        parts = part_table(self._frame(q.device).bits)
        codes, heads = packed["codes"].flatten(0, 2), packed["head"].reshape(-1).long()
        room = min(_TOKENS, out.shape[-1])
        numbers = torch.empty(room, back.shape[1], dtype=torch.bfloat16)
        half, keys = torch.empty(room, self.dim, dtype=torch.bfloat16), torch.empty(room, self.dim)
        turning = torch.view_as_complex(keys[:, : 2 * turns.shape[1]].unflatten(-1, (-1, 2)))
        for i, head in enumerate(heads.tolist()):
            for start in range(0, out.shape[-1], room):
                end = min(start + room, out.shape[-1])
                n = end - start
                native.channel_numbers(codes[i, :, start:end], parts, levels[head], numbers[:n])
                torch.addmm(mean[head], numbers[:n], back[head], out=half[:n])
                keys[:n].copy_(half[:n])
                turning[:n].mul_(turns[start:end])
                out[i, :, start:end] = q[i].detach() @ keys[:n].T  # the library knows no gradients


def _flat(at: torch.Tensor | None, lead: torch.Size, tokens: int) -> torch.Tensor | None:
    """Positions as `[n, T]`, for the flattened leading axes; a view where they are the same for all."""
    if at is None:
        return None
    return at.expand(*lead, tokens).reshape(-1, tokens) if at.dim() > 1 else at.expand(lead.numel(), tokens)
