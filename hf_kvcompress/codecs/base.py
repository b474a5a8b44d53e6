"""What a codec is: how a run of tokens of one layer is packed, read back, and used without being read back.

A codec knows one role ("key" or "value") and works on any leading axes, so the layer can hand it every row, head and
segment at once. It never sees positions, padding or transformers.

    B rows, H key-value heads, S segments, T tokens of a segment, D head size, M query rows of one key-value head
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch

from ..ops.gather import Layout, gather_tokens

Role = Literal["key", "value"]
Packed = dict[str, torch.Tensor]


class Rotation(Protocol):
    """Takes the position out of keys, and puts it back (`rotary.Rotary`): x `[..., T, D]` float32, at `[..., T]`."""

    def apply(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor: ...

    def undo(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class CodecContext:
    """What a codec may have to know of its layer.

    Args:
        layer: its number.
        rotary: the rotation of its keys, None where it is not known.
        why_not: why it is not known.
        calibration: what was learned of the model beforehand, if anything.
        heads: key-value heads of the layer in the whole model, where a process may have a part of them; else None.
    """

    layer: int = 0
    rotary: Rotation | None = None
    why_not: str = "a cache made without the model's config"
    calibration: Any = None
    heads: int | None = None


@dataclass(frozen=True)
class Field:
    """One tensor of the packed form: an entry of `shape` for every `tokens` tokens (None: one for a whole segment).

    Stored as `[B, H, S, T // tokens, *shape]`, or `[B, H, S, *shape, T // tokens]` when `tokens_last`; a field of a
    whole segment is `[B, H, S, *shape]`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    tokens: int | None = 1
    tokens_last: bool = False

    def stored_shape(self, leading: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """Shape of the stored tensor for `leading` axes and a segment of `tokens` tokens."""
        if self.tokens is None:
            return (*leading, *self.shape)
        units = tokens // self.tokens
        return (*leading, *self.shape, units) if self.tokens_last else (*leading, units, *self.shape)

    def bits_per_token(self, segment_length: int) -> float:
        """Bits that one token of a full segment takes in this field."""
        entry = self.dtype.itemsize * 8
        for size in self.shape:
            entry *= size
        return entry / (self.tokens or segment_length)


class Codec(ABC):
    """Packs pages of `page_size` tokens of `dim` numbers each.

    Args:
        nbits: bits of one code.
        role: "key" or "value"; a codec may treat the two differently.
        dim: head size D.
        page_size: tokens that are packed at once; `encode` gets a multiple of it.
        group_size: numbers that share a scale, for codecs with groups.
    """

    family: ClassVar[str]
    supported_bits: ClassVar[tuple[float, ...]]
    #: goes up when what is packed would be read differently, so that saved caches of before are refused
    format_version: ClassVar[int] = 1
    #: every token is packed by itself (given its segment's statistics), so tokens can be gathered without re-encoding
    token_wise: ClassVar[bool] = True
    #: the mean square of the queries improves the key statistics
    wants_queries: bool = False
    #: so does their second moment, when many keys are packed at once
    wants_query_moment: bool = False
    #: it needs `bind` with a context that has what it asks for
    wants_context: ClassVar[bool] = False
    #: the keys' positions stand beside the fields, as "at": in `segment` of `encode`, `history` of `learn` and
    #: `begin_segment` (of their tokens), and `packed` of `decode`, `scores` and `mix`. Whole numbers `[..., T]` that
    #: broadcast to the tokens, counted from the row's first token; nothing to be stored, they are derived. With
    #: one axis only they stand one behind the other.
    wants_positions: bool = False
    #: bfloat16 lets products on CPU round like a half precision model does; float32 is exact
    compute_dtype: torch.dtype = torch.float32

    def __init__(self, nbits: int, role: Role, dim: int, page_size: int = 64, group_size: int = 64):
        self.nbits, self.role, self.dim, self.page_size, self.group_size = nbits, role, dim, page_size, group_size

    def bind(self, context: CodecContext) -> None:  # noqa: B027 - most codecs need nothing
        """Take what the codec has to know of its layer. Raises ValueError, naming what is missing."""

    @property
    def name(self) -> str:
        return f"{self.family}{self.nbits}"

    @property
    @abstractmethod
    def fields(self) -> dict[str, Field]:
        """The tensors of the packed form."""

    @cached_property
    def statistics(self) -> tuple[str, ...]:
        """Names of the fields that hold for a whole segment."""
        return tuple(name for name, field in self.fields.items() if field.tokens is None)

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """How the other fields hold tokens, for `gather_tokens`."""
        return {name: Layout(f.tokens, f.tokens_last) for name, f in self.fields.items() if f.tokens is not None}

    def bits(self, segment_length: int) -> float:
        """Bits per number, metadata included, in a full segment of `segment_length` tokens."""
        return sum(f.bits_per_token(segment_length) for f in self.fields.values()) / self.dim

    def learn(self, history: Packed, x: torch.Tensor) -> Packed:
        """What a codec remembers of all tokens packed so far, after `x` `[..., T, D]` more; `{}` before the first.

        It helps statistics of a segment of which few tokens are known. The default remembers nothing.
        """
        return {}

    def begin_segment(
        self, x: torch.Tensor, query_ms: torch.Tensor | None = None, history: Packed | None = None
    ) -> Packed:
        """Statistics of a segment, from the tokens that are there when its first pages are packed.

        x: `[..., T, D]` real tokens only; query_ms: `[..., D]` mean square of the queries that read them, or None;
        history: what `learn` gave for the tokens before this segment. Returns the fields with `tokens=None`, each
        `[..., *shape]`. Non-finite numbers must not spoil them.
        """
        return {}

    @abstractmethod
    def encode(self, x: torch.Tensor, segment: Packed, queries: torch.Tensor | None = None) -> Packed:
        """Pack `x` `[..., T, D]` (any float dtype, T a multiple of page_size) with its segment's statistics.

        queries: second moment `[R, H, D, D]` of the newest queries that read keys `[R, H, 1, T, D]`, if known.

        Returns the fields with `tokens` set, each `[..., T // tokens, *shape]`, or `[..., *shape, T // tokens]` where
        the tokens are last.
        """

    @abstractmethod
    def decode(self, packed: Packed) -> torch.Tensor:
        """Read back `[..., T, D]` in float32. `packed` holds all fields, segment statistics included."""

    @abstractmethod
    def tolerance(self, x: torch.Tensor, segment: Packed) -> torch.Tensor:
        """Declared bound on the L2 norm of `decode - x` over D for each token, `[..., T]`: a true one, no estimate."""

    def gather(self, parts: Sequence[Packed], index: torch.Tensor) -> Packed:
        """The tokens at `index` `[n, T]` (T a multiple of page_size) of all those in `parts`, not a code changed.

        The fields of a part are `[m, T', ...]` and its tokens are numbered on from those of the part before. Only the
        fields with `tokens` set are given back, `[n, T, ...]`. Raises ValueError for a codec whose tokens are packed
        together.
        """
        if not self.token_wise:
            raise ValueError(f"codec: expected one that packs every token by itself, got {self.name}")
        return gather_tokens(parts, self.layouts, index, self.page_size)

    # -- use without reading back; the defaults read back, the fast paths do not ---------------------------------------

    def scores(self, q: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`q @ decode(packed).mT`: q `[B, H, M, D]` float32, packed `[B, H, S, ...]` -> `[B, H, M, S * T]` float32.

        `q` already carries the softmax scale.
        """
        keys = self.decode(packed).flatten(2, 3)  # [B, H, S * T, D]
        return q @ keys.mT

    def mix(self, p: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`p @ decode(packed)` up to `finish`: p `[B, H, M, S * T]` float32 -> `[B, H, M, D]` float32.

        Results of several calls are added before one `finish`, so a codec may sum in its own basis.
        """
        return p @ self.decode(packed).flatten(2, 3)

    def finish(self, acc: torch.Tensor) -> torch.Tensor:
        """Take a sum of `mix` results `[B, H, M, D]` from the codec's basis back to the value's own."""
        return acc
