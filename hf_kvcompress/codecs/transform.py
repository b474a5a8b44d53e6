"""Transform coding of keys: a calibrated basis, bits where the energy is, the best levels for every channel.

A calibration has, for every layer and key-value head, a mean and a basis learned from other texts. A key without its
rotation (or as it is, where the rotation is unknown) loses the mean, is seen in the basis, and each coordinate is
stored in as many bits, 0 to 6, as pay for themselves. No number is computed from the text at hand: every token is
packed by itself, without a scale. Values are packed as by `eqrot`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..ops.numeric import block_numel, blocks, clean_
from .base import Codec, CodecContext, Field, Packed, Role

#: bits of the parts that a code of so many bits is cut into, the high ones first; no part crosses a byte
PARTS: dict[int, tuple[int, ...]] = {6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
MOST_BITS = 6
_BLOCK = 1 << 18
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

    @cached_property
    def _places(self) -> list[tuple[int, list[int], list[int], list[int]]]:
        """By bits of a part: the channels that have one, the bit of a token at which it stands, and how far up it goes
        in the code."""
        bits = next(iter(self._frames.values())).bits
        at, found = 0, []
        for size in (4, 2, 1):
            channels = [c for c, own in enumerate(bits) if size in PARTS[own]]
            up = [sum(p for p in PARTS[bits[c]] if p < size) for c in channels]
            found.append((size, channels, list(range(at, at + size * len(channels), size)), up))
            at += size * len(channels)
        return found

    def begin_segment(
        self, x: torch.Tensor, query_ms: torch.Tensor | None = None, history: Packed | None = None
    ) -> Packed:
        """The number of each head of `x` `[..., H, S, T, D]`; the first one's without such axes."""
        heads = torch.zeros(x.shape[:-2], dtype=torch.int16, device=x.device)
        if x.dim() > 3:
            heads += torch.arange(x.shape[-4], dtype=torch.int16, device=x.device)[:, None]
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
            for size, channels, places, up in self._places:
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
            index = self._unpack(flat[start:end], len(frame.bits))
            own = heads[start:end]
            channels = torch.arange(len(frame.bits), device=codes.device) * levels
            index += (own[:, None] * (len(frame.bits) * levels) + channels)[..., None].to(index.dtype)
            numbers = frame.levels.flatten().index_select(0, index.flatten()).view(index.shape)
            yield start, end, numbers, own, None if at is None else at[start:end]

    def _unpack(self, rows: torch.Tensor, channels: int) -> torch.Tensor:
        """Codes `[n, R, T]` int32 of bytes `[n, size, T]`."""
        out = torch.zeros(len(rows), channels, rows.shape[-1], dtype=torch.uint8, device=rows.device)
        for size, own, places, up in self._places:
            if own:
                place = _on(tuple(places), rows.device)
                shift, lift = (place % 8).to(torch.uint8)[:, None], _on(tuple(up), rows.device).to(torch.uint8)[:, None]
                parts = (rows.index_select(1, place // 8) >> shift) & (2**size - 1)
                out.index_add_(1, _on(tuple(own), rows.device), parts << lift)
        return out.int()

    def tolerance(self, x: torch.Tensor, segment: Packed) -> torch.Tensor:
        """The error itself: a number of bits alone bounds nothing in a basis that other texts have made."""
        packed = {**self.encode(x, segment), **segment}
        error = torch.linalg.vector_norm(self.decode(packed).double() - x.double(), dim=-1)
        size = torch.linalg.vector_norm(x.double(), dim=-1)
        return (error * (1 + 1e-5) + size * 1e-5 + 1e-5 * self._frame(x.device).levels.abs().amax()).float()

    def scores(self, q: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`q @ decode(packed).mT`; where keys are packed as the query meets them, the basis goes to the query."""
        lead, tokens = packed["codes"].shape[:-2], packed["codes"].shape[-1]
        frame, segments = self._frame(q.device), lead[2]
        out = q.new_empty(lead[0] * lead[1] * segments, q.shape[2], tokens)
        each = q.float().flatten(0, 1).repeat_interleave(segments, 0)  # [n, M, D]
        for start, end, numbers, heads, at in self._numbers(packed):
            own = each[start:end]
            if self.wants_positions and at is not None:
                keys = self._rotary.apply(numbers.mT @ frame.back[heads] + frame.mean[heads].unsqueeze(1), at)
                out[start:end] = own @ keys.mT
            else:
                constant = own @ frame.mean[heads].unsqueeze(-1)
                out[start:end] = (own @ frame.back[heads].mT) @ numbers + constant
        wide = out.unflatten(0, (lead[0], lead[1], segments))
        return wide.movedim(2, 3).flatten(3, 4)


def bytes_of(dim: int, nbits: float) -> int:
    """Bytes of a token's codes."""
    return max(int(dim * nbits) // 8, 1)


def _flat(at: torch.Tensor | None, lead: torch.Size, tokens: int) -> torch.Tensor | None:
    """Positions as `[n, T]`, for the flattened leading axes; a view where they are the same for all."""
    if at is None:
        return None
    return at.expand(*lead, tokens).reshape(-1, tokens) if at.dim() > 1 else at.expand(lead.numel(), tokens)


_INDEX: dict[tuple[tuple[int, ...], torch.device], torch.Tensor] = {}


def _on(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Whole numbers on a device, kept there: a decode step does not copy them again."""
    key = (numbers, device)
    if key not in _INDEX:
        _INDEX[key] = torch.tensor(numbers, device=device)
    return _INDEX[key]
