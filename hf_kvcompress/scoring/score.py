"""Perplexity, KL divergence and top-1 agreement of a text that is read through a cache."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..environment import synchronize

MakeCache = Callable[[], Any]
OnTokens = Callable[[int], None]
#: takes logits `[1, V]` and gives the next token
Choose = Callable[[torch.Tensor], int]


@dataclass(frozen=True)
class Score:
    """One text scored through one cache. The tensors have one entry a scored position, `[N]`, on the CPU.

    nll: negative log-likelihood of the next token, in nats.
    kl: KL(reference || this) of the next-token distribution, in nats; None for a reference.
    agree: whether the most likely token is the reference's; None for a reference.
    logits: `[N, V]` in the model's dtype, kept only for a reference.
    cache: the cache as the scored text left it.
    """

    nll: torch.Tensor
    kl: torch.Tensor | None
    agree: torch.Tensor | None
    logits: torch.Tensor | None = field(repr=False)
    cache: Any = field(repr=False)
    prefill_seconds: float
    feed_seconds: float

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nll.mean().item())

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence from the reference, in nats; 0 for the reference itself."""
        return 0.0 if self.kl is None else self.kl.mean().item()

    @property
    def top1_agreement(self) -> float:
        """Share of positions whose most likely token is the reference's."""
        return 1.0 if self.agree is None else self.agree.float().mean().item()


@dataclass(frozen=True)
class Decoded:
    """Greedy decoding through one cache: the new token ids and how long each forward took, in seconds.

    prefill_seconds: 0 where the cache held the prompt already.
    """

    tokens: list[int]
    cache: Any = field(repr=False)
    prefill_seconds: float
    prefill_tokens: int
    step_seconds: list[float]

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else math.inf

    @property
    def decode_rate(self) -> float:
        """Tokens a second, from the median step: one slow step on a busy machine does not count."""
        steps = sorted(self.step_seconds)
        return 1.0 / steps[len(steps) // 2]


@torch.inference_mode()
def score(
    model: Any,
    input_ids: torch.Tensor,
    make_cache: MakeCache,
    prompt_length: int,
    step: int = 32,
    prefill_step: int | None = None,
    reference: Score | None = None,
    on_tokens: OnTokens | None = None,
    prefilled: bool = False,
) -> Score:
    """Prefill a prompt, feed the text after it through the same cache, and score every token of that text.

    The text goes in steps, so that its tokens attend to what the cache made of the prompt and of the earlier steps.
    An uncached forward would never read the cache, and would score any codec as perfect.

    Args:
        input_ids: `[1, T]`, prompt and text, without padding.
        make_cache: makes an empty cache.
        prompt_length: tokens of the prompt; the text begins there. The first scored position is the text's first
            token, which predicts its second: the prompt's own logits have not passed through the cache.
        step: tokens of a forward. 1 is plain decoding; 32 is many times faster and scores nearly the same.
        prefill_step: tokens of a forward of the prompt; None takes all of it at once.
        reference: the uncompressed score of the same text. Without it this score is a reference and keeps its logits.
        on_tokens: called with the number of tokens of each finished forward.
        prefilled: `make_cache` gives a cache that holds the prompt already (`Prompt.through`).

    Raises:
        ValueError: `input_ids` is not one row, or a length does not fit.
    """
    total = _check(input_ids, prompt_length, step, prefill_step)
    targets = input_ids[0, prompt_length + 1 :].cpu()
    if reference is not None and (reference.logits is None or len(reference.logits) != len(targets)):
        held = "no logits" if reference.logits is None else f"{len(reference.logits)} positions"
        raise ValueError(f"reference: expected the logits of {len(targets)} positions, got {held}")
    device, cache = input_ids.device, make_cache()
    prompt = input_ids[:, :prompt_length]
    prefill_seconds = 0.0 if prefilled else _prefill(model, prompt, cache, prefill_step, on_tokens)

    nll, kl, agree, kept = [], [], [], []
    feed_seconds = 0.0
    for start in range(prompt_length, total - 1, step):
        chunk = input_ids[:, start : min(start + step, total - 1)]
        begun = time.perf_counter()
        logits = model(input_ids=chunk, past_key_values=cache, use_cache=True).logits[0]  # [step, V]
        synchronize(device)
        feed_seconds += time.perf_counter() - begun
        first = start - prompt_length
        rows = slice(first, first + chunk.shape[1])
        log_probs = logits.float().log_softmax(-1)
        nll.append(-log_probs.gather(1, targets[rows, None].to(device))[:, 0].cpu())
        if reference is None:
            kept.append(logits.cpu())
        else:
            assert reference.logits is not None
            base = reference.logits[rows].to(device).float().log_softmax(-1)
            kl.append((base.exp() * (base - log_probs)).sum(-1).cpu())
            agree.append((base.argmax(-1) == log_probs.argmax(-1)).cpu())
        if on_tokens:
            on_tokens(chunk.shape[1])
    return Score(
        nll=torch.cat(nll),
        kl=torch.cat(kl) if kl else None,
        agree=torch.cat(agree) if agree else None,
        logits=torch.cat(kept) if kept else None,
        cache=cache,
        prefill_seconds=prefill_seconds,
        feed_seconds=feed_seconds,
    )


def greedy(logits: torch.Tensor) -> int:
    """The most likely token."""
    return int(logits.argmax(-1))


@torch.inference_mode()
def decode(
    model: Any,
    prompt: torch.Tensor,
    question: torch.Tensor,
    make_cache: MakeCache,
    new_tokens: int,
    on_tokens: OnTokens | None = None,
    prefilled: bool = False,
    choose: Choose = greedy,
) -> Decoded:
    """Prefill `prompt`, then feed `question` through the cache and decode.

    The question comes after the prompt was compressed, so its answer can only be read from the compressed prompt.

    Args:
        prompt: `[1, T]`; question: `[1, Q]`.
        new_tokens: tokens to decode; generation does not stop at an end-of-text token, so that speeds compare.
        prefilled: `make_cache` gives a cache that holds the prompt already (`Prompt.through`).
        choose: the next token from logits `[1, V]`; greedy by default.
    """
    if question.ndim != 2 or question.shape[1] == 0:
        raise ValueError(f"question: expected a [1, Q] tensor with Q > 0, got {tuple(question.shape)}")
    cache = make_cache()
    prefill_seconds = 0.0 if prefilled else _prefill(model, prompt, cache, None, on_tokens)
    logits = model(input_ids=question, past_key_values=cache, use_cache=True).logits[:, -1]
    tokens, seconds = [choose(logits)], []
    while len(tokens) < new_tokens:
        begun = time.perf_counter()
        next_id = torch.tensor([[tokens[-1]]], device=prompt.device)
        logits = model(input_ids=next_id, past_key_values=cache, use_cache=True).logits[:, -1]
        tokens.append(choose(logits))  # waits for the device
        seconds.append(time.perf_counter() - begun)
        if on_tokens:
            on_tokens(1)
    return Decoded(tokens, cache, prefill_seconds, prompt.shape[1], seconds)


def _prefill(model: Any, prompt: torch.Tensor, cache: Any, step: int | None, on_tokens: OnTokens | None) -> float:
    """Feed the prompt; return the seconds taken."""
    # the logits of a whole prompt can be larger than the model: ask for the last ones only, where the model can
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    synchronize(prompt.device)
    begun = time.perf_counter()
    for chunk in prompt.split(step or prompt.shape[1], dim=1):
        model(input_ids=chunk, past_key_values=cache, use_cache=True, **last_only)
        if on_tokens:
            on_tokens(chunk.shape[1])
    synchronize(prompt.device)
    return time.perf_counter() - begun


def _check(input_ids: torch.Tensor, prompt_length: int, step: int, prefill_step: int | None) -> int:
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids: expected one row, [1, T], got {tuple(input_ids.shape)}")
    total = input_ids.shape[1]
    if not 1 <= prompt_length <= total - 2:
        raise ValueError(f"prompt_length: expected 1 to {total - 2} for a text of {total} tokens, got {prompt_length}")
    if step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")
    if prefill_step is not None and prefill_step < 1:
        raise ValueError(f"prefill_step: expected at least 1 or None, got {prefill_step}")
    return total
