"""`PrefixCache`: reads a prefix once, whoever asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..cache import CompressedCache
from ..config import choose, expect
from ..showing import Shown
from .batching import pad_between, prompts_of, rows_of
from .hashing import Tokens, root_of
from .ranking import HALF_LIFE, PRIORITIES, Ranking
from .reader import PrefixReader, Prompt
from .store import PrefixStore
from .tiers import Tier, open_tier

GB = 2**30


class PrefixCache(Shown):
    """Keeps compressed caches of prefixes and hands copies to prompts that begin with one.

    An entry is the state of a cache that has read the prefix and no token more, so a prompt that goes on from it gets
    the logits that it gets from a cache that reads the prefix itself. Entries end at multiples of `block_size`.

    Args:
        max_cache_size_gb: memory for entries, in GB of 2^30 bytes.
        eviction_policy: "lru", "lfu" (with decay) or "adaptive"; see `configure_adaptive`.
        model, tokenizer: whose prefixes these are; `bind` sets them later. Without a tokenizer prompts are token ids.
        cache: settings of `CompressedCache`, or a function of the model's config that makes an empty cache.
        block_size: tokens of a block.
        disk, remote: tiers below the memory: a folder, and a redis:// or fsspec URL.
        max_disk_gb: bound of the folder.
        remember: keep what prompts add to their prefixes, too; else only `add_prefix` and `warm_cache` add entries.
        partial: use an entry that parts from the prompt in its midst, cropped to what both have in common.
        revision: of the model, where its config does not say.
        salt: prompts of other salts share nothing, not even by timing.
        device: where entries are kept; None for where the model is.
        max_pinned: part of the memory that pins may take.
        half_life: seconds in which a use counts for half.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        max_cache_size_gb: float = 4,
        eviction_policy: str = "lru",
        *,
        model: Any = None,
        tokenizer: Any = None,
        cache: Mapping[str, Any] | Callable[[Any], CompressedCache] | None = None,
        block_size: int = 16,
        disk: str | Path | None = None,
        remote: str | Tier | None = None,
        max_disk_gb: float | None = None,
        remember: bool = True,
        partial: bool = True,
        revision: str | None = None,
        salt: str = "",
        device: torch.device | str | None = None,
        max_pinned: float = 0.5,
        half_life: float = HALF_LIFE,
        clock: Callable[[], float] = time.monotonic,
    ):
        size = max_cache_size_gb
        if isinstance(size, bool) or not isinstance(size, int | float) or size <= 0:
            raise expect("max_cache_size_gb", "a number above 0", size)
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise expect("block_size", "a whole number of at least 1", block_size)
        disk_bytes = None if max_disk_gb is None else int(max_disk_gb * GB)
        tiers = [open_tier(where, disk_bytes) for where in (disk, remote) if where is not None]
        ranking = Ranking(eviction_policy, half_life)
        self.store = PrefixStore(int(size * GB), ranking, block_size, max_pinned, tiers, clock)
        self.reader = PrefixReader(self.store, cache or {}, remember, partial, revision, salt, device)
        self._prefixes: dict[str, Tokens] = {}
        if model is not None:
            self.bind(model, tokenizer)

    def bind(self, model: Any, tokenizer: Any = None) -> PrefixCache:
        """Serve this model from now on; entries of other models stay and are never mixed up with its own."""
        self.reader.bind(model, tokenizer)
        return self

    def open(self, prompt: Prompt) -> tuple[CompressedCache, int]:
        """A cache that has read the first n tokens of a prompt, and n: give it to `generate` with the whole prompt."""
        return self.reader.open(prompt)

    # -- prefixes by name ----------------------------------------------------------------------------------------------

    def add_prefix(self, prefix: Prompt, priority: str = "normal") -> str:
        """Read a text or token ids that prompts will begin with; returns the name for `generate_with_prefix`.

        It is written to the tiers as well. What is behind the last whole block is read anew with every prompt.
        """
        choose("priority", priority, PRIORITIES)
        ids = self.reader.tokens_of(prefix)
        if not ids:
            raise expect("prefix", "at least one token", "none")
        whole = ids[: len(ids) // self.reader.block_size * self.reader.block_size]
        if whole:
            self.reader.open([*whole, whole[-1]], keep=True, priority=priority)
            self.store.persist(self.reader.origin.root, whole)
        prefix_id = "prefix-" + root_of({"root": self.reader.origin.root, "tokens": ids})
        self._prefixes[prefix_id] = ids
        return prefix_id

    def prefix_tokens(self, prefix_id: str) -> Tokens:
        """Token ids of a prefix. Raises ValueError for a name that `add_prefix` did not give."""
        if prefix_id not in self._prefixes:
            raise expect("prefix_id", "what add_prefix returned", prefix_id)
        return self._prefixes[prefix_id]

    def pin(self, prefix_id: str) -> None:
        """Keep a prefix in memory until it is unpinned. Raises ValueError if pins would take more than their part."""
        self.store.pin(self.reader.origin.root, self._whole(prefix_id), 1)

    def unpin(self, prefix_id: str) -> None:
        """Take back one `pin`."""
        self.store.pin(self.reader.origin.root, self._whole(prefix_id), -1)

    def _whole(self, prefix_id: str) -> Tokens:
        ids = self.prefix_tokens(prefix_id)
        return ids[: len(ids) // self.reader.block_size * self.reader.block_size]

    def warm_cache(self, prompts: Sequence[Prompt], priority: str = "high") -> list[str]:
        """`add_prefix` for each; entries of high priority go after all others."""
        return [self.add_prefix(prompt, priority) for prompt in prompts]

    def configure_adaptive(self, weights: Mapping[str, float]) -> None:
        """Set `recency_weight`, `frequency_weight` and `size_weight` and rank by all three."""
        self.store.ranking.configure(weights)
        self.store.ranking.policy = "adaptive"

    # -- generating ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_with_prefix(
        self, prefix_id: str, prompt: Any, max_tokens: int = 256, **options: Any
    ) -> str | list[str] | torch.Tensor:
        """Generate behind a prefix and a prompt, or each of several prompts in one batch.

        Texts give texts; token ids (a row, or rows of unequal length) give the new tokens, `[rows, new]`, padded behind
        the end token. `options` go to `model.generate`.

        Raises ValueError for an unknown `prefix_id` or an empty prompt.
        """
        reader, prefix = self.reader, self.prefix_tokens(prefix_id)
        rows, many = prompts_of(prompt)
        tails = [reader.tokens_of(row, begins=False) for row in rows]
        if not tails or not all(tails):
            raise expect("prompt", "at least one token in each prompt", prompt)
        if many and len(set(map(len, tails))) > 1 and not reader.pads:
            return self._by_length(prefix_id, rows, tails, max_tokens, options)
        first = (*prefix, *tails[0])
        cache, have = reader.open([*prefix, tails[0][0]], keep=True) if many else reader.open(first)
        ids, mask = pad_between(first[:have], [(*prefix, *tail)[have:] for tail in tails], self._pad)
        if many:
            cache.batch_repeat_interleave(len(tails))
        device = reader.model.device
        out = reader.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            max_new_tokens=max_tokens,
            pad_token_id=self._pad,
            **options,
        )
        new = rows_of(out)[:, ids.shape[1] :]
        if not isinstance(rows[0], str):
            return new
        texts = [reader.tokenizer.decode(row, skip_special_tokens=True) for row in new]
        return texts if many else texts[0]

    def _by_length(
        self, prefix_id: str, rows: list[Any], tails: list[Tokens], max_tokens: int, options: dict[str, Any]
    ) -> list[str] | torch.Tensor:
        """A batch for each length: a window or a recurrent state would count padding that stands in between."""
        found: dict[int, Any] = {}
        for length in sorted(set(map(len, tails))):
            own = [i for i, tail in enumerate(tails) if len(tail) == length]
            out = self.generate_with_prefix(prefix_id, [rows[i] for i in own], max_tokens, **options)
            found.update(zip(own, out, strict=True))
        ordered = [found[i] for i in range(len(rows))]
        if isinstance(rows[0], str):
            return ordered
        return torch.nn.utils.rnn.pad_sequence(ordered, batch_first=True, padding_value=self._pad)

    @property
    def _pad(self) -> int:
        settings = self.reader.model.generation_config
        known = (settings.pad_token_id, settings.eos_token_id, self.reader.model.config.bos_token_id, 0)
        found = next(token for token in known if token is not None)
        return found[0] if isinstance(found, list) else found

    # -- what is there -------------------------------------------------------------------------------------------------

    @property
    def hit_rate(self) -> float:
        """Part of the prompts that began with something known."""
        return self.store.stats.hit_rate

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in memory."""
        return self.store.nbytes

    def stats(self) -> dict[str, Any]:
        """JSON-ready: hits, tokens reused, bytes, evictions, and each entry."""
        return {
            **self.store.stats.to_dict(),
            "nbytes": self.nbytes,
            "max_bytes": self.store.max_bytes,
            "collisions": self.store.tree.collisions,
            "tiers": {tier.name: {"failures": tier.failures} for tier in self.store.tiers},
            "entries": [vars(entry) for entry in self.store.entries()],
        }

    def close(self) -> None:
        """Close files and connections of the tiers."""
        for tier in self.store.tiers:
            tier.close()

    def __len__(self) -> int:
        return len(self.store.entries())

    def __repr__(self) -> str:
        return (
            f"PrefixCache({len(self)} entries, {self.nbytes:,} of {self.store.max_bytes:,} bytes, "
            f"hit rate {self.hit_rate:.2f}, {self.store.ranking.policy})"
        )

    _index = "key"
    _bars = {"nbytes": ("held in memory", 1 / 2**20)}

    def _title(self) -> str:
        return repr(self)

    def _records(self) -> list[dict[str, Any]]:
        return [dict(vars(entry)) for entry in self.store.entries()]
