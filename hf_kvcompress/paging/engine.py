"""`PagedAttentionEngine`: many prompts at a time over one pool, admitted as there is room."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..cache import CompressedCache
from ..config import PAGE_SIZES, choose, expect
from ..enable import enable
from ..prefix.cache import PrefixCache
from ..prefix.reader import Prompt
from ..shapes import layer_shapes
from .batch import Batch
from .cache import PagedCache
from .joining import holding
from .manager import MemoryManager
from .pool import GB, BlockPool, PoolFullError
from .resident import Resident
from .room import Room, block_bytes
from .sequences import EngineStats, Piece, Sampling, Sequence

CPU_GB = 1.0  # of which a CPU engine takes `gpu_memory_utilization`, unless it is told


class PagedAttentionEngine:
    """Serves prompts with a model: sequences share one pool of blocks, and prefixes that they have in common.

    A prompt is admitted as soon as the pool has room for it; rows that finish leave the batch at once. When sequences
    outgrow the pool, the one admitted last gives its blocks back and goes on later.

    Args:
        model: a decoder whose layers all have attention.
        tokenizer: None for prompts of token ids.
        block_size: tokens of a page, and of a block of the prefix cache.
        gpu_memory_utilization: part of the free memory of the device that the pool takes; on a CPU of 1 GB.
        memory_gb: size of the pool instead, in GB of 2^30 bytes.
        pool: a pool of one's own instead.
        prefix_cache: a `PrefixCache` (settings of its caches are the engine's), True for one of its own, None for none.
        codec: of the pages; "identity" gives what `generate` gives.
        max_batch: sequences that run at a time at most.
        prefill: tokens of a prompt that are read in one pass.
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
        self.max_batch, self.prefill = max_batch, prefill
        self._settings = {"codec": codec, "page_size": block_size, "group_size": block_size, **settings}
        empty = PagedCache(model.config, **self._settings)
        holding(empty)
        shapes = {s.layer: (s.heads, s.key_dim, s.value_dim) for s in layer_shapes(model.config) if s.packed}
        block = block_bytes(empty, shapes, model.dtype, block_size)
        self.pool = pool or self._make_pool(gpu_memory_utilization, memory_gb, block)
        self.room = Room(empty, shapes, model.dtype, self.pool.block_bytes)
        self.resident = Resident()
        own = PrefixCache(block_size=block_size) if prefix_cache is True else prefix_cache
        self.prefixes: PrefixCache | None = own if isinstance(own, PrefixCache) else None
        if self.prefixes is not None:
            self.prefixes.reader.settings = lambda config: self._new_cache()
            self.prefixes.reader.resident = self.resident
            self.prefixes.bind(model, tokenizer)
        self.stats = EngineStats()
        ends = model.generation_config.eos_token_id
        self._stops = frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])
        self._waiting: deque[Sequence] = deque()
        self._batch = Batch(model.config, self.room, self.stats)

    def _make_pool(self, part: float, memory_gb: float | None, block: int) -> BlockPool:
        device = self.model.device
        if memory_gb is None:
            free = torch.cuda.mem_get_info(device)[0] / GB if device.type == "cuda" else CPU_GB
            memory_gb = free * part
        return MemoryManager(device=device).allocate_pool("kv", memory_gb, block / 2**20)

    def _new_cache(self) -> PagedCache:
        return PagedCache(self.model.config, pool=self.pool, **self._settings)

    # -- serving -------------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Iterable[Prompt], max_tokens: int = 128, progress: bool = False, **sampling: Any
    ) -> list[Any]:
        """The continuation of every prompt, in order: texts for texts, lists of token ids for ids.

        `sampling` are the fields of `Sampling`; `progress` shows a bar.

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
    def stream(self, prompts: Iterable[Prompt], max_tokens: int = 128, **sampling: Any) -> Iterator[Piece]:
        """Every new token as it comes, of whatever prompt. Closing the iterator drops what is not finished."""
        if self._waiting or self._batch.sequences:
            raise RuntimeError("engine: it is serving other prompts; give it all of them at once, or wait")
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise expect("max_tokens", "a whole number of at least 1", max_tokens)
        choice = Sampling(**sampling)
        prompts = list(prompts)
        self._waiting.extend(self._sequence(i, prompt, max_tokens, choice) for i, prompt in enumerate(prompts))
        started = time.perf_counter()
        try:
            while self._waiting or self._batch.sequences:
                pieces = list(self._admit(choice)) or list(self._step(choice))
                for sequence, token in pieces:
                    yield Piece(sequence.number, token, self._text(token), sequence.finished is not None)
        finally:
            self._waiting.clear()
            self._batch.keep([])
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
        need = self._need(len(tokens) + max_tokens)
        if need > self.pool.blocks:
            most = f"what {self.pool.blocks} blocks can hold"
            raise expect("prompts", most, f"one that takes {need} blocks, number {number}")
        generator = torch.Generator().manual_seed(choice.seed + number)
        return Sequence(number, tokens, len(tokens), max_tokens, generator)

    # -- admission -----------------------------------------------------------------------------------------------------

    def _need(self, tokens: int) -> int:
        """Blocks of a sequence, with copies of the entries that it shares, and the empty ones of a batch."""
        copies = 0 if self.prefixes is None else self.room.entries
        return self.room.blocks(tokens) + copies + self.room.empties

    def _admit(self, choice: Sampling) -> Iterator[tuple[Sequence, int]]:
        """Read the next prompt if there is room for it and for a step of those that run; gives its first token."""
        if not self._waiting or len(self._batch.sequences) >= self.max_batch:
            return
        sequence = self._waiting[0]
        if (
            not self._make_room(self._need(len(sequence.tokens) + 1) + self._batch.step_need())
            and self._batch.sequences
        ):
            return
        self._waiting.popleft()
        token, cache = self._read(sequence, choice)
        if token is not None and sequence.note(token, self._stops):
            self.stats.finish(sequence)
            yield sequence, token
            return
        self._batch.add(sequence, cache)
        if token is not None:
            yield sequence, token

    def _make_room(self, blocks: int) -> bool:
        """Whether so many blocks are free, once prefixes that nobody reads have gone."""
        while self.pool.free_blocks < blocks:
            if not self.resident.drop_oldest():
                return False
        return True

    def _read(self, sequence: Sequence, choice: Sampling) -> tuple[int | None, PagedCache]:
        """A cache of all tokens but the newest, and the first token if the sequence is new."""
        if sequence.offloaded is not None:
            cache, state = self._new_cache(), sequence.offloaded
            cache.put_back([state], self.model.device)
            sequence.offloaded = None
            return None, cache
        new = not sequence.generated
        ids = sequence.tokens if new else sequence.tokens[:-1]
        with enable(self.model):
            have: int = 0
            found: CompressedCache = self._new_cache()
            if self.prefixes is not None and new:
                found, have = self.prefixes.reader.open(ids, passes=self.prefill)
            logits = None
            for start in range(have, len(ids), self.prefill):
                logits = self._forward(torch.tensor([ids[start : start + self.prefill]]), found)
        found.commit()
        assert isinstance(found, PagedCache) and logits is not None
        return (choice.choose(logits[0], sequence.generator) if new else None), found

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _forward(self, ids: torch.Tensor, cache: CompressedCache, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits of the last token of each row, `[B, V]`."""
        moved = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        return self.model(ids.to(self.model.device), past_key_values=cache, use_cache=True, **moved).logits[:, -1]

    def _step(self, choice: Sampling) -> Iterator[tuple[Sequence, int]]:
        """One token for every running sequence."""
        batch = self._batch
        while batch.sequences and not self._make_room(batch.step_need()):
            self._preempt()
        if batch.cache is None:
            return
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in batch.sequences])
        with enable(self.model):
            logits = self._forward(ids, batch.cache, **batch.inputs())
        batch.cache.commit()
        stay = []
        for row, sequence in enumerate(batch.sequences):
            token = choice.choose(logits[row], sequence.generator)
            if sequence.note(token, self._stops):
                self.stats.finish(sequence)
            else:
                stay.append(row)
            yield sequence, token
        batch.keep(stay)

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
