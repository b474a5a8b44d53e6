"""Common ground of the codecs that store small integer codes: planes, blocks, and products with packed codes.

A code c of 0 .. 2^nbits - 1 is stored as its two's complement c - 2^(nbits - 1). Keys are packed along the head size, a
token by itself; values along the tokens of a page, channel by channel, which is the layout `p @ V` reads.
Encoding works on columns `[D, R]`, R = rows * tokens: every operation is elementwise over a long contiguous run.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property

import torch

from ..ops import native, quantize
from ..ops.int8mm import MAX_ROWS, MIN_TOKENS, Reader, Scratch, key_product, uniform_readers, value_product
from ..ops.numeric import block_numel, blocks, clean_
from ..ops.packing import PLANES, pack, padded, plane_sizes, unpack
from .base import Codec, Field, Packed

_ENCODE = 1 << 17  # numbers of a block while encoding and decoding: float32 buffers that stay in a core's cache
_PRODUCT = 1 << 20  # int8 codes of a block while multiplying; a quarter of it in float32
_PLANE_NAMES = ("codes", "codes_low")


class IntegerCodec(Codec):
    """Base of codecs with integer codes. A subclass says what a code stands for."""

    #: what is added to a two's complement code to get the number it stands for, in steps
    offset = 0.5

    # -- layout --------------------------------------------------------------------------------------------------------

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return _PLANE_NAMES[: len(PLANES[self.nbits])]

    @cached_property
    def code_fields(self) -> dict[str, Field]:
        """The planes' fields."""
        if self.role == "value":
            plane_bits = PLANES[self.nbits]
            return {
                name: Field((self.dim,), torch.uint8, 8 // bits, tokens_last=True)
                for name, bits in zip(self._names, plane_bits, strict=True)
            }
        sizes = plane_sizes(self.dim, self.nbits)
        return {name: Field((size,), torch.uint8) for name, size in zip(self._names, sizes, strict=True)}

    @cached_property
    def readers(self) -> list[Reader]:
        """How products read the planes."""
        return uniform_readers(self.nbits, self.offset, self._packed_together)

    @property
    def _packed_together(self) -> int:
        return padded(self.dim) if self.role == "key" else self.page_size

    @cached_property
    def _table_of_codes(self) -> torch.Tensor:
        """The number of every stored code below 8 bits, on the host."""
        return self._numbers(torch.arange(2 ** min(self.nbits, 4), dtype=torch.uint8))

    def _product_dtype(self, rows: int, tokens: int) -> torch.dtype:
        """bfloat16 where it may be used and is faster, for `rows` queries and runs of `tokens` tokens."""
        if self.compute_dtype == torch.float32 or (rows <= MAX_ROWS and tokens < MIN_TOKENS):
            return torch.float32
        return torch.bfloat16

    # -- what a subclass gives -----------------------------------------------------------------------------------------

    @abstractmethod
    def _encode_columns(self, x: torch.Tensor, segment: Packed, rows: int) -> tuple[torch.Tensor, Packed]:
        """Clean float32 columns `[D, rows * T]` (may be overwritten) -> uint8 codes c of that shape, and the other
        fields of these tokens as they are stored, `[rows, ...]`."""

    @abstractmethod
    def _decode_columns(self, numbers: torch.Tensor, packed: Packed, rows: int) -> torch.Tensor:
        """float32 columns of code + offset (may be overwritten) -> float32 columns of the decoded numbers."""

    @property
    @abstractmethod
    def _tile_width(self) -> int:
        """Tokens of a kernel's tile over 8; 0 where the kernels do not serve this shape."""

    @abstractmethod
    def _encode_by_kernel(self, x: torch.Tensor, segment: Packed, out: Packed) -> None:
        """Pack `x` `[outer, inner, T, D]` into the fields of these tokens, each `[rows, ...]`."""

    @abstractmethod
    def _decode_by_kernel(self, packed: Packed, out: torch.Tensor) -> None:
        """Read all fields, each `[rows, ...]`, back into `out` `[rows, T, D]`."""

    def _numbers(self, codes: torch.Tensor) -> torch.Tensor:
        """Stored codes (uint8) -> float32 code + offset."""
        half = 2 ** (self.nbits - 1)
        return (codes ^ half).float().sub_(half - self.offset)

    # -- packing -------------------------------------------------------------------------------------------------------

    def encode(self, x: torch.Tensor, segment: Packed, queries: torch.Tensor | None = None) -> Packed:
        """Pack `x` `[..., T, D]`."""
        lead, tokens = x.shape[:-2], x.shape[-2]
        if x.shape[-1] != self.dim or tokens % self.page_size or not tokens:
            raise ValueError(
                f"x: expected shape [..., T, {self.dim}] with T a multiple of page_size={self.page_size}, "
                f"got {tuple(x.shape)}"
            )
        out = {
            k: torch.empty(f.stored_shape((lead.numel(),), tokens), dtype=f.dtype, device=x.device)
            for k, f in self.fields.items()
            if f.tokens is not None
        }
        self.encode_into(x, segment, out)
        return {k: v.view(*lead, *v.shape[1:]) for k, v in out.items()}

    def encode_into(self, x: torch.Tensor, segment: Packed, out: Packed) -> None:
        """Pack `x` `[..., T, D]` into parts of a storage, `[rows, ...]` for all leading axes, the last axis dense."""
        segment, tokens = self._flat(segment, x.dim() - 2), x.shape[-2]
        if quantize.serves(x, self._tile_width):
            return self._encode_by_kernel(quantize.as_rows(x), segment, out)
        flat = x.reshape(-1, tokens, self.dim)
        for start, end, first, last in self._blocks(flat.shape[0], tokens, x.device, _ENCODE):
            rows = end - start
            columns = self._columns(flat[start:end, first:last])
            codes, block = self._encode_columns(columns, {k: v[start:end] for k, v in segment.items()}, rows)
            codes ^= 2 ** (self.nbits - 1)
            block.update(self._pack_columns(codes, rows))
            for k, field in out.items():
                f = self.fields[k]
                assert f.tokens is not None
                axis = -1 if f.tokens_last else 1
                field[start:end].narrow(axis, first // f.tokens, (last - first) // f.tokens).copy_(block[k])

    def decode(self, packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Read back `[..., T, D]`, rounded to `dtype`."""
        codes, field = packed["codes"], self.code_fields["codes"]
        axes = codes.dim() - 2
        lead, units = codes.shape[:axes], codes.shape[-1 if field.tokens_last else -2]
        tokens = units * (field.tokens or 1)
        flat = self._flat(packed, axes)
        out = torch.empty(flat["codes"].shape[0], tokens, self.dim, dtype=dtype, device=codes.device)
        if quantize.serves(out, self._tile_width):
            self._decode_by_kernel({k: quantize.dense(v) for k, v in flat.items()}, out)
            return out.view(*lead, tokens, self.dim)
        for start, end, first, last in self._blocks(out.shape[0], tokens, codes.device, _ENCODE):
            rows = end - start
            block = {}
            for k, f in self.fields.items():
                block[k] = flat[k][start:end]
                if f.tokens is not None:
                    axis = -1 if f.tokens_last else 1
                    block[k] = block[k].narrow(axis, first // f.tokens, (last - first) // f.tokens)
            columns = self._decode_columns(self._numbers(self._unpack_columns(block, rows)), block, rows)
            if rows == 1:
                out[start, first:last] = columns.t()
            else:  # then the block holds whole rows
                out[start:end].view(-1, self.dim).copy_(columns.t())
        return out.view(*lead, tokens, self.dim)

    def _blocks(self, rows: int, tokens: int, device: torch.device, budget: int) -> Iterator[tuple[int, int, int, int]]:
        page = self.page_size
        for start, end, first, last in blocks(rows, tokens // page, page * self.dim, block_numel(device, budget)):
            yield start, end, first * page, last * page

    def _flat(self, packed: Packed, axes: int) -> Packed:
        """The fields with their `axes` leading axes as one."""
        return {k: v.reshape(-1, *v.shape[axes:]) for k, v in packed.items()}

    def _columns(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows, T, D]` of any float dtype -> clean float32 `[D, rows * T]`."""
        x = x.float().reshape(-1, self.dim)
        return clean_(torch.empty(self.dim, x.shape[0], device=x.device).copy_(x.t()))

    def _pack_columns(self, codes: torch.Tensor, rows: int) -> Packed:
        if self.role == "key":
            planes = pack(codes, self.nbits, dim=0)
            return {k: p.t().reshape(rows, -1, p.shape[0]) for k, p in zip(self._names, planes, strict=True)}
        planes = pack(codes.view(self.dim, rows, -1, self.page_size), self.nbits)
        return {k: p.flatten(2).transpose(0, 1) for k, p in zip(self._names, planes, strict=True)}

    def _unpack_columns(self, packed: Packed, rows: int) -> torch.Tensor:
        planes = [packed[k] for k in self._names]
        if self.role == "key":
            columns = tuple(p.reshape(-1, p.shape[-1]).t().contiguous() for p in planes)
            return unpack(columns, self.nbits, self.dim, dim=0)
        paged = tuple(
            p.transpose(0, 1).unflatten(-1, (-1, self.page_size * bits // 8))
            for p, bits in zip(planes, PLANES[self.nbits], strict=True)
        )
        return unpack(paged, self.nbits, self.page_size).reshape(self.dim, -1)

    # -- products ------------------------------------------------------------------------------------------------------

    def _key_dot(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Sum over D of x * (code + offset), with an x of its own for each of U runs of S * T / U tokens.

        x float32 `[n, U, M, D]`, packed `[n, S, ...]` -> float32 `[n, M, S * T]`.
        """
        planes = [packed[k] for k in self._names]
        n, segments, tokens = planes[0].shape[:3]
        if x.shape[-1] != self._packed_together:
            x = torch.nn.functional.pad(x, (0, self._packed_together - x.shape[-1]))
        if native.serves(x, x.shape[2]):
            return native.key_dot([p.flatten(1, 2) for p in planes], self.nbits, self._table_of_codes, self.offset, x)
        shared, per_segment = x.shape[1] == 1, max(1, x.shape[1] // segments)
        dtype = self._product_dtype(x.shape[2], segments * tokens // x.shape[1])
        scratch = Scratch(x.device)
        out = torch.empty(n, x.shape[2], segments * tokens, device=x.device)
        arranged = [reader.arrange(x).to(dtype) for reader in self.readers]
        budget = block_numel(x.device, _PRODUCT if dtype == torch.bfloat16 else _PRODUCT // 4)
        for start, end, first, last in blocks(n, segments, tokens * self.dim, budget):
            rows = (end - start) * (last - first) * tokens
            part = [plane[start:end, first:last].reshape(rows, -1) for plane in planes]
            target = out[start:end, :, first * tokens : last * tokens]
            for index, (reader, operand) in enumerate(zip(self.readers, arranged, strict=True)):
                small = operand[start:end]
                if not shared:
                    small = small[:, first * per_segment : last * per_segment]
                codes = reader.read(part, scratch).view(end - start, small.shape[1], -1, small.shape[-1])
                product = key_product(small, codes, scratch)
                target.add_(product) if index else target.copy_(product)
        for reader, operand in zip(self.readers, arranged, strict=True):
            correction = reader.correct(operand)  # [n, U, M]
            if correction is not None:
                out.unflatten(-1, (x.shape[1], -1)).add_(correction.transpose(1, 2).unsqueeze(-1))
        return out

    def _value_dot(self, p: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Sum over tokens of p * (code + offset), with a p of its own for each of G groups of channels.

        p float32 `[n, G, M, S * T]`, packed `[n, S, ...]` -> float32 `[n, M, D]`.
        """
        planes = [packed[k] for k in self._names]
        n, segments = planes[0].shape[:2]
        groups, length = p.shape[1], p.shape[-1]
        if segments == 1 and native.serves(p, p.shape[2]):
            flat = [plane.flatten(1, 2) for plane in planes]
            return native.value_dot(flat, self.nbits, self.page_size, self._table_of_codes, self.offset, p)
        tokens, dtype = length // segments, self._product_dtype(p.shape[2], MIN_TOKENS)
        scratch = Scratch(p.device)
        out = torch.zeros(n, p.shape[2], self.dim, device=p.device)
        budget = block_numel(p.device, _PRODUCT if dtype == torch.bfloat16 else _PRODUCT // 4)
        for start, end, first, last in blocks(n, segments, tokens * self.dim, budget):
            # channels first, then the segments side by side: [rows * D, segments, bytes]
            part = [plane[start:end, first:last].transpose(1, 2).flatten(0, 1) for plane in planes]
            small = p[start:end, :, :, first * tokens : last * tokens]
            for reader in self.readers:
                operand = reader.arrange(small).to(dtype).contiguous()
                codes = reader.read(part, scratch).view(end - start, groups, self.dim // groups, -1)
                product = value_product(operand, codes, scratch)
                correction = reader.correct(operand)  # [rows, G, M]
                if correction is not None:
                    product.unflatten(-1, (groups, -1)).add_(correction.transpose(1, 2).unsqueeze(-1))
                out[start:end].add_(product)
        return out
