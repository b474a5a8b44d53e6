"""`PagedAttentionEngine`: many prompts at a time over one pool, admitted as there is room."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from collections.abc import Sequence as Rows
from typing import Any

import torch

from ..config import PAGE_SIZES, choose, expect
from ..prefix.cache import PrefixCache
from ..prefix.reader import Prompt
from ..shapes import layer_shapes
from .batch import Batch
from .cache import PagedCache
from .joining import holding
from .manager import pool_within
from .pool import BlockPool, PoolFullError
from .prompts import PromptReader
from .resident import Resident
from .room import Room, block_bytes
from .sequences import EngineStats, Piece, Sampling, Sequence


class PagedAttentionEngine:
    """Serves prompts with a model: sequences share one pool of blocks, and prefixes that they have in common.

    A prompt is admitted as soon as the pool has room for it; rows that finish leave the batch at once. When sequences
    outgrow the pool, the one admitted last gives its blocks back and goes on later.

    Args:
        model: a decoder whose layers all have attention.
        tokenizer: None for prompts of token ids.
        block_size: tokens of a page, and of a block of the prefix cache.
        gpu_memory_utilization: part of the free memory of the device that the pool takes; on a CPU of 1 GB.
        memory_gb: that memory instead, in GB of 2^30 bytes: for the pool and the exact windows of `max_batch` rows.
        pool: a pool of one's own instead.
        prefix_cache: a `PrefixCache` (settings of its caches are the engine's); True for one of its own, that keeps
            what two prompts share; None for none.
        codec: of the pages; "identity" gives what `generate` gives.
        max_batch: sequences that run at a time at most.
        prefill: tokens of prompts that are read in one pass.
        preemption: "offload" moves a sequence's pages to host memory, "recompute" drops them and reads it again.
        settings: further settings of `PagedCache`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        block_size: int = 16,
        gpu_memory_utilization: float = 0.9,
        memory_gb: float | None = None,
        pool: BlockPool | None = None,
        prefix_cache: PrefixCache | bool | None = None,
        codec: str = "eqrot4",
        max_batch: int = 32,
        prefill: int = 512,
        preemption: str = "offload",
        **settings: Any,
    ):
        if block_size not in PAGE_SIZES:
            raise expect("block_size", f"one of {', '.join(map(str, PAGE_SIZES))}", block_size)
        if not 0 < gpu_memory_utilization <= 1:
            raise expect("gpu_memory_utilization", "a part above 0 and up to 1", gpu_memory_utilization)
        for name, value in (("max_batch", max_batch), ("prefill", prefill)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise expect(name, "a whole number of at least 1", value)
        self.model, self.tokenizer, self.preemption = model, tokenizer, choose(
            "preemption", preemption, ("offload", "recompute")
        )  # fmt: skip
        self.max_batch = self._most = max_batch  # fewer from when a prompt found no room until a row leaves
        self._settings = {"codec": codec, "page_size": block_size, "group_size": block_size, **settings}
        empty = PagedCache(model.config, **self._settings)
        holding(empty)
        shapes = {s.layer: (s.heads, s.key_dim, s.value_dim) for s in layer_shapes(model.config) if s.packed}
        block = block_bytes(empty, shapes, model.dtype, block_size)
        own = PrefixCache(block_size=block_size, remember=False) if prefix_cache is True else prefix_cache
        self.prefixes: PrefixCache | None = own if isinstance(own, PrefixCache) else None
        self.resident = Resident(0 if self.prefixes is None else max(max_batch // 4, 1))
        windows = (max_batch + self.resident.most) * Room(empty, shapes, model.dtype, block).window_bytes
        self.pool = pool or pool_within(model.device, gpu_memory_utilization, memory_gb, block, windows)
        self.room = Room(empty, shapes, model.dtype, self.pool.block_bytes)
        if self.prefixes is not None:
            self.prefixes.reader.settings = lambda config: self._new_cache()
            self.prefixes.reader.resident = self.resident
            self.prefixes.bind(model, tokenizer)
        self.stats = EngineStats()
        ends = model.generation_config.eos_token_id
        self._stops = frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])
        self._waiting: deque[Sequence] = deque()
        self._batch = Batch(model.config, self.room, self.resident, self.stats)
        self._reader = PromptReader(model, self._new_cache, self.prefixes, prefill)

    def _new_cache(self) -> PagedCache:
        return PagedCache(self.model.config, pool=self.pool, **self._settings)

    # -- serving -------------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Iterable[Prompt], max_tokens: int | Rows[int] = 128, progress: bool = False, **sampling: Any
    ) -> list[Any]:
        """The continuation of every prompt, in order: texts for texts, lists of token ids for ids.

        `max_tokens` is one number or one a prompt; `sampling` are the fields of `Sampling`; `progress` shows a bar.

        Raises ValueError for a prompt that the pool could never hold.
        """
        prompts = list(prompts)
        found: list[list[int]] = [[] for _ in prompts]
        bar = None
        if progress:
            from tqdm.auto import tqdm

            bar = tqdm(total=len(prompts), unit="prompt")
        for piece in self.stream(prompts, max_tokens, **sampling):
            found[piece.prompt].append(piece.token)
            if bar is not None and piece.last:
                bar.update()
                bar.set_postfix(running=len(self._batch.sequences), pool=f"{self.pool.utilization:.0%}")
        if bar is not None:
            bar.close()
        return [
            self.tokenizer.decode(own, skip_special_tokens=True) if isinstance(prompt, str) else own
            for prompt, own in zip(prompts, found, strict=True)
        ]

    @torch.no_grad()
    def stream(self, prompts: Iterable[Prompt], max_tokens: int | Rows[int] = 128, **sampling: Any) -> Iterator[Piece]:
        """Every new token as it comes, of whatever prompt. Closing the iterator drops what is not finished."""
        if self._waiting or self._batch.sequences:
            raise RuntimeError("engine: it is serving other prompts; give it all of them at once, or wait")
        choice, prompts = Sampling(**sampling), list(prompts)
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        if len(limits) != len(prompts) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in limits):
            raise expect("max_tokens", "a whole number of at least 1, or one for each prompt", max_tokens)
        made = [
            self._sequence(i, prompt, limit, choice)
            for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        self._reader.note(sequence.tokens for sequence in made)
        self._waiting.extend(made)
        started = time.perf_counter()
        try:
            while self._waiting or self._batch.sequences:
                for sequence, token in self._admit(choice) or self._step(choice):
                    yield Piece(sequence.number, token, self._text(token), sequence.finished is not None)
        finally:
            self._waiting.clear()
            self._batch.keep([])
            self._most = self.max_batch
            self.stats.seconds += time.perf_counter() - started

    def _text(self, token: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode([token])

    def _sequence(self, number: int, prompt: Prompt, max_tokens: int, choice: Sampling) -> Sequence:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise expect("prompts", "token ids, as there is no tokenizer", prompt)
            prompt = self.tokenizer(prompt)["input_ids"]
        tokens: list[int] = prompt.flatten().tolist() if isinstance(prompt, torch.Tensor) else [*prompt]
        if not tokens:
            raise expect("prompts", "at least one token in each", f"none in number {number}")
        need = self._need(len(tokens) + max_tokens) + self.room.empties
        if need > self.pool.blocks:
            most = f"what {self.pool.blocks} blocks can hold"
            raise expect("prompts", most, f"one that takes {need} blocks, number {number}")
        generator = torch.Generator().manual_seed(choice.seed + number)
        return Sequence(number, tokens, len(tokens), max_tokens, generator)

    # -- admission -----------------------------------------------------------------------------------------------------

    def _need(self, tokens: int, shared: int = 0) -> int:
        """Blocks of a sequence that has the first `shared` tokens in common with others, which hold them."""
        return self.room.blocks(tokens) - self.room.whole(shared)

    def _admit(self, choice: Sampling) -> list[tuple[Sequence, int]]:
        """Read the next prompts, as many as there is room for beside a step of those that run and as one pass takes.

        Gives the first token of each.
        """
        group = self._next_group()
        if not group:
            return []
        if group[0].offloaded is not None:
            cache, state = self._new_cache(), group[0].offloaded
            cache.put_back([state], self.model.device)
            group[0].offloaded = None
            self._batch.add(group, cache)
            return self._admit(choice)
        new = [not sequence.generated for sequence in group]
        ids = [own.tokens if is_new else own.tokens[:-1] for own, is_new in zip(group, new, strict=True)]
        read = self._read(ids)
        if read is None:
            self._waiting.extendleft(reversed(group))
            return [] if self._batch.sequences else self._admit(choice)
        cache, logits = read
        self._batch.add(group, cache)
        return self._take(choice, logits, len(self._batch.sequences) - len(group), new) or self._admit(choice)

    def _read(self, ids: list[list[int]]) -> tuple[PagedCache, torch.Tensor] | None:
        """Read prompts; nothing if there was no room after all, as prefixes had to be read anew."""
        try:
            return self._reader.read(ids)
        except PoolFullError:
            if not self._batch.sequences and not self.resident.drop_oldest() and len(ids) == 1:
                raise
        self._most = max(len(self._batch.sequences), 1)
        return None

    def _next_group(self) -> list[Sequence]:
        """Take the next sequences that are read together from those that wait."""
        group: list[Sequence] = []
        lengths: list[int] = []
        known: set[str] = set()
        need = self._batch.step_need() + self.room.empties if self._waiting else 0
        while self._waiting and len(self._batch.sequences) + len(group) < self._most:
            sequence, tokens = self._waiting[0], len(self._waiting[0].tokens)
            shared, name = (0, "") if sequence.offloaded is not None else self._reader.shared(sequence.tokens)
            if shared and name not in self.resident and name not in known:
                need += self.room.blocks(shared)  # somebody has to hold it
            known.add(name)
            need += self._need(tokens + 1, shared)
            lengths.append(tokens - shared)
            if group and (sequence.offloaded is not None or not self._reader.together(lengths)):
                break
            if not self._make_room(need, known) and (group or self._batch.sequences):
                break
            group.append(self._waiting.popleft())
            if sequence.offloaded is not None:
                break
        return group

    def _make_room(self, blocks: int, keep: Collection[str] = ()) -> bool:
        """Whether so many blocks are free, once prefixes that nobody reads have gone, except those in `keep`."""
        while self.pool.free_blocks < blocks:
            if not self.resident.drop_oldest(keep):
                return False
        return True

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _step(self, choice: Sampling) -> list[tuple[Sequence, int]]:
        """One token for every running sequence."""
        batch = self._batch
        while batch.sequences and not self._make_room(batch.step_need()):
            self._preempt()
        if batch.cache is None:
            return []
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in batch.sequences])
        logits = self._reader.forward(ids, batch.cache, [0] * len(ids), **batch.inputs())
        batch.cache.commit()
        self.stats.steps, self.stats.rows = self.stats.steps + 1, self.stats.rows + len(ids)
        return self._take(choice, logits, 0, [True] * len(ids))

    def _take(
        self, choice: Sampling, logits: torch.Tensor, first: int, wanted: list[bool]
    ) -> list[tuple[Sequence, int]]:
        """Choose a token for each wanted row from number `first` on; those that are done leave the batch."""
        rows = self._batch.sequences[first:]
        tokens = choice.choose_all(logits, [sequence.generator for sequence in rows], wanted)
        found, done = [], set()
        for row, (sequence, token) in enumerate(zip(rows, tokens, strict=True)):
            if token is None:
                continue
            found.append((sequence, token))
            if sequence.note(token, self._stops):
                self.stats.finish(sequence)
                done.add(first + row)
        if done:
            self._most = self.max_batch
            self._batch.keep([row for row in range(len(self._batch.sequences)) if row not in done])
        return found

    def _preempt(self) -> None:
        """Take the blocks of the sequence that was admitted last; it goes on when there is room again."""
        running = self._batch.sequences
        if len(running) == 1:
            raise PoolFullError(f"{self.pool!r}: one sequence of {len(running[0].tokens)} tokens has outgrown it")
        sequence = self._batch.drop_last(self.preemption == "offload")
        sequence.preemptions += 1
        self.stats.preemptions += 1
        self._waiting.appendleft(sequence)

    # -- figures -------------------------------------------------------------------------------------------------------

    @property
    def memory_savings(self) -> float:
        """Part of the memory of a padded, uncompressed batch that was not needed, at the peak."""
        return 1 - self.stats.peak_bytes / self.stats.peak_dense_bytes if self.stats.peak_dense_bytes else 0.0

    def report(self) -> dict[str, Any]:
        """JSON-ready: throughput, latencies, memory, prefix hits."""
        prefixes = {} if self.prefixes is None else {"prefix_hit_rate": self.prefixes.hit_rate}
        return {**self.stats.to_dict(), "memory_savings": self.memory_savings, **prefixes}
