"""What an engine knows of one prompt that it serves."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from ..config import expect
from ..showing import Shown
from ..snapshots import Snapshot


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one, or with a temperature at random.

    Args:
        temperature: 0 for the most likely token.
        top_k: only the k most likely; 0 for all.
        top_p: only the most likely ones that sum to p.
        seed: a sequence draws the same numbers whatever runs beside it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise expect("temperature", "a number of at least 0", self.temperature)
        if not 0 < self.top_p <= 1:
            raise expect("top_p", "a number above 0 and up to 1", self.top_p)
        if self.top_k < 0:
            raise expect("top_k", "a whole number of at least 0", self.top_k)

    def choose_all(
        self, logits: torch.Tensor, generators: list[torch.Generator], wanted: list[bool]
    ) -> list[int | None]:
        """The next token of every wanted row of logits `[B, V]`, drawn by its own generator; None of the others."""
        if self.temperature == 0:
            best = logits.argmax(-1).tolist()
            return [token if want else None for token, want in zip(best, wanted, strict=True)]
        rows = zip(logits, generators, wanted, strict=True)
        return [self.choose(own, generator) if want else None for own, generator, want in rows]

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """The next token from logits `[V]`."""
        if self.temperature == 0:
            return int(logits.argmax())
        scores = logits.float().cpu() / self.temperature
        if self.top_k:
            scores[scores < scores.topk(min(self.top_k, len(scores))).values[-1]] = float("-inf")
        if self.top_p < 1:
            ranked, order = scores.softmax(-1).sort(descending=True)
            scores[order[ranked.cumsum(-1) - ranked >= self.top_p]] = float("-inf")
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


@dataclass(frozen=True)
class Piece:
    """One new token of a prompt: the prompt's number, the token, its text (if there is a tokenizer), whether it is the
    prompt's last."""

    prompt: int
    token: int
    text: str | None
    last: bool


@dataclass(eq=False)
class Sequence:
    """A prompt on its way: `tokens` are the prompt's and those generated, `read` those that its cache has."""

    number: int
    tokens: list[int]
    prompt_length: int
    max_tokens: int
    generator: torch.Generator
    arrived: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    finished: float | None = None
    offloaded: Snapshot | None = None
    preemptions: int = 0

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    def note(self, token: int, stops: frozenset[int]) -> bool:
        """Take in a new token; True if it was the last one."""
        now = time.perf_counter()
        self.tokens.append(token)
        self.first_token = self.first_token or now
        if token in stops or len(self.tokens) - self.prompt_length >= self.max_tokens:
            self.finished = now
        return self.finished is not None


@dataclass
class EngineStats(Shown):
    """Counts since the engine was made; seconds are wall time."""

    generated: int = 0
    prompts: int = 0
    seconds: float = 0.0
    preemptions: int = 0
    steps: int = 0
    rows: int = 0  # summed over the steps
    first_token_seconds: list[float] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    peak_dense_bytes: int = 0

    def finish(self, sequence: Sequence) -> None:
        """Count a sequence that is done."""
        assert sequence.first_token is not None and sequence.finished is not None
        count = len(sequence.generated)
        self.generated, self.prompts = self.generated + count, self.prompts + 1
        self.first_token_seconds.append(sequence.first_token - sequence.arrived)
        if count > 1:
            self.token_seconds.append((sequence.finished - sequence.first_token) / (count - 1))

    def to_dict(self) -> dict[str, float]:
        """JSON-ready: throughput in generated tokens a second, latencies in seconds, bytes."""
        return {
            "prompts": self.prompts,
            "generated_tokens": self.generated,
            "seconds": self.seconds,
            "tokens_per_second": self.generated / self.seconds if self.seconds else 0.0,
            "first_token_seconds": _middle(self.first_token_seconds),
            "first_token_seconds_p95": _middle(self.first_token_seconds, 0.95),
            "token_seconds": _middle(self.token_seconds),
            "token_seconds_p95": _middle(self.token_seconds, 0.95),
            "preemptions": self.preemptions,
            "rows_a_step": self.rows / self.steps if self.steps else 0.0,
            "peak_bytes": self.peak_bytes,
            "peak_dense_bytes": self.peak_dense_bytes,
        }

    _index = "latency"
    _bars = {"p95": ("95 %", 1.0), "p50": ("median", 1.0)}
    _unit = "s"

    def _title(self) -> str:
        found = self.to_dict()
        rate = f"{found['tokens_per_second']:,.1f} tokens/s"
        return f"{self.prompts:,} prompts, {self.generated:,} tokens, {rate}, {self.peak_bytes / 2**20:,.1f} MB at most"

    def _records(self) -> list[dict[str, float | str]]:
        lists = {"first token": self.first_token_seconds, "each later token": self.token_seconds}
        return [{"latency": n, "p50": _middle(own), "p95": _middle(own, 0.95)} for n, own in lists.items()]


def _middle(numbers: list[float], part: float = 0.5) -> float:
    ordered = sorted(numbers)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0.0
