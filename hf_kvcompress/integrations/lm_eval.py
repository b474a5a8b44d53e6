"""lm-evaluation-harness with a compressed cache: importing this registers the model `hf-kvcompress`.

lm-eval's own `hf` model scores a continuation in one forward whose cache is never read, so compression is invisible to
it. Here the context is put into the cache first, and every scored token reads it from there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..environment import installed
from ..harness.specs import CacheSpec

NAME = "hf-kvcompress"
SCORES = ("split", "chunk", "step")
#: choices of one context that are scored together
CHOICES = 16
#: context and continuation of one request: key of lm-eval's cache, tokens, tokens
Request = tuple[Any, list[int], list[int]]


@register_model(NAME)
class CompressedHFLM(HFLM):
    """A Hugging Face causal model that reads its context through a cache.

    Args:
        pretrained: name or folder, as for `hf`.
        cache: as `kvcompress eval --cache` takes it; ";" may stand for "," since lm-eval splits its arguments there.
            "none" is the uncompressed control, which scores what `hf` does.
        score: how a continuation is fed after its context: "split" in one pass, "chunk" in passes of `chunk` tokens,
            "step" one token at a time. Rolling likelihoods have no context, so "split" goes in chunks there.
        chunk: tokens of a pass.
        kwargs: those of `hf`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self, pretrained: Any, cache: str | None = "balanced", score: str = "split", chunk: int = 32, **kwargs: Any
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk: expected a whole number of at least 1, got {chunk!r}")
        self.spec = CacheSpec.parse(str(cache or "none").replace(";", ","))
        if not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # or it takes each process for the only one
        super().__init__(pretrained, **{"device": "cuda" if torch.cuda.is_available() else "cpu", **kwargs})
        if self.backend != "causal":
            raise ValueError(f"pretrained: expected a causal language model, got {type(self.model).__name__}")
        self.entrant = self.spec.entrant(self.model.config)
        self.score, self.chunk = score, chunk
        self._named = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        self._share()

    def _share(self) -> None:
        """One part of the requests for each process; lm-eval does so by itself on several GPUs only."""
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
            self._device = accelerator.device
            self.model.to(self._device)

    def settings(self) -> dict[str, Any]:
        """What an answer depends on, JSON-ready."""
        return {
            "model": self._named,
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
            "cache": self.spec.to_dict(),
            "score": self.score,
            "chunk": self.chunk,
            "version": installed("hf_kvcompress"),
        }

    def get_model_info(self) -> dict[str, Any]:
        return {**super().get_model_info(), "kvcompress": self.settings()}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Keep the answers of `--use_cache` in a table of these settings: others must not be taken for theirs."""
        answers = cache_hook.dbdict
        if answers is not None:
            digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()
            answers.tablename = f"kvcompress_{digest[:24]}"
            answers.conn.execute(f'CREATE TABLE IF NOT EXISTS "{answers.tablename}" (key TEXT PRIMARY KEY, value BLOB)')
            answers.conn.commit()
        super().set_cache_hook(cache_hook)

    # -- likelihoods -----------------------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        with self._at_most("chunk"):
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return found

    @contextmanager
    def _at_most(self, score: str) -> Iterator[None]:
        """Passes no longer than those of `score`."""
        before = self.score
        self.score = max(before, score, key=SCORES.index)
        try:
            yield
        finally:
            self.score = before

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        from tqdm.auto import tqdm

        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            by_context.setdefault(tuple(self._kept(context, continuation)), []).append(index)
        found: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Likelihoods through the cache")
        with self.entrant.around(self.model):
            # long contexts first: what does not fit fails at once
            for cut, indices in sorted(by_context.items(), key=lambda item: -len(item[0])):
                answers = self._of_context(list(cut), [requests[i][2] for i in indices])
                for index, answer in zip(indices, answers, strict=True):
                    found[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                bar.update(len(indices))
        bar.close()
        return [found[index] for index in range(len(requests))]

    def _kept(self, context: list[int], continuation: list[int]) -> list[int]:
        """The part of a context that fits, cut from the left as `hf` does."""
        if not context or not continuation or len(continuation) > self.max_length:
            lengths = f"{len(context)} and {len(continuation)}"
            raise ValueError(f"request: expected a context and 1 to {self.max_length} tokens after it, got {lengths}")
        return (context + continuation)[-(self.max_length + 1) :][: -len(continuation)]

    def _of_context(self, context: list[int], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Sum of log-probabilities, and whether decoding would give it, of each continuation of one context."""
        size = 1 if self.entrant.peer else CHOICES
        groups = [continuations[i : i + size] for i in range(0, len(continuations), size)]
        read = None if self.entrant.peer else self._read(context)
        answers = []
        for index, group in enumerate(groups):
            last = index == len(groups) - 1
            cache = self._read(context) if read is None else read if last else copy.deepcopy(read)
            if len(group) > 1:
                cache.batch_repeat_interleave(len(group))
            answers += self._of_group(context, group, cache)
        return answers

    def _read(self, context: list[int]) -> Any:
        """A cache that has read all of a context but its last token, whose pass is the first to be scored."""
        cache = self.entrant.make()
        if len(context) > 1:
            ids = torch.tensor([context[:-1]], device=self.device)
            self._forward(ids, cache, logits_to_keep=1)
        return cache

    def _of_group(self, context: list[int], group: list[list[int]], cache: Any) -> list[tuple[float, bool]]:
        longest = max(map(len, group))
        # what fills up a shorter row comes after all its tokens, which therefore do not see it
        rows = [[context[-1], *own[:-1], *[0] * (longest - len(own))] for own in group]
        ids = torch.tensor(rows, device=self.device)
        step = {"split": longest, "chunk": self.chunk, "step": 1}[self.score]
        sums, greedy = [0.0] * len(group), [True] * len(group)
        for start in range(0, longest, step):
            logits = self._forward(ids[:, start : start + step], cache)
            logs = torch.nn.functional.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
            for row, own in enumerate(group):
                wanted = torch.tensor(own[start : start + step], device=self.device)
                here = logs[row, : len(wanted)]
                sums[row] += float(here.gather(1, wanted[:, None]).sum()) if len(wanted) else 0.0
                greedy[row] &= bool((here.argmax(-1) == wanted).all())
        return list(zip(sums, greedy, strict=True))

    def _forward(self, ids: torch.Tensor, cache: Any, **kwargs: Any) -> torch.Tensor:
        kind, enabled = self.mixed_precision_dtype, self.mixed_precision_dtype is not None
        with torch.autocast(device_type=self.device.type, dtype=kind, enabled=enabled):
            logits: torch.Tensor = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits
        return logits

    # -- generation ------------------------------------------------------------------------------------------------

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> torch.Tensor:
        with self.entrant.around(self.model):
            cache = self.entrant.make()
            answer: torch.Tensor = super()._model_generate(
                context, max_length, stop, past_key_values=cache, **generation_kwargs
            )
        return answer
