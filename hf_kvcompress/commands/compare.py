"""Runs one model through several caches and measures each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..measure import tensor_bytes
from ..scoring import Decoded, Passkey, Score, decode, score
from .contenders import BASELINE, Contender, Unavailable, contender

WARM_UP = 192  # tokens: enough to seal pages, so that nothing is built while the clock runs


@dataclass
class Row:
    """One cache, measured. A cache that could not run has only a name and the reason.

    nbytes: storage of every tensor held after prompt, question and answer, in the model's own dtype.
    ratio: bytes of the uncompressed cache over these. bits: of a packed number, scales included; exact tokens apart.
    stored_ratio: the tokens stored in the model's dtype, over nbytes (`cache.stats()["compression_ratio"]`).
    """

    name: str
    note: str = ""
    unavailable: str = ""
    nbytes: int | None = None
    ratio: float | None = None
    stored_ratio: float | None = None
    bits: float | None = None
    perplexity: float | None = None
    delta_perplexity: float | None = None
    mean_kl: float | None = None
    top1_agreement: float | None = None
    answer: str | None = None
    passkey_found: bool | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """What is run: the same text, prompt and question for every cache.

    model runs the prompt and the question, for bytes, speed and the pass key; scoring_model runs the text for
    perplexity and KL (the same weights, in float32 where that is affordable: see docs/evaluation.md).
    """

    model: Any
    scoring_model: Any
    tokenizer: Any
    passkey: Passkey
    text: torch.Tensor  # [1, prompt + scored text]
    new_tokens: int
    step: int
    calibration: Any = None  # for caches that need one

    @property
    def prompt_length(self) -> int:
        return self.passkey.prompt.shape[1]

    def tokens_per_cache(self) -> int:
        """Forward tokens of one cache, for a progress bar."""
        return self.prompt_length + self.new_tokens - 1 + self.text.shape[1] - 1


def compare(names: list[str], task: Comparison, on_tokens: Callable[[str, int], None]) -> list[Row]:
    """Run every cache of `names`; the uncompressed one always runs, first."""
    rows: list[Row] = []
    reference: Score | None = None
    for name in [BASELINE, *(n for n in names if n != BASELINE)]:
        row = Row(name)
        rows.append(row)

        def advance(tokens: int, name: str = name) -> None:
            on_tokens(name, tokens)

        try:
            entrant = contender(name, task.model.config, task.calibration)
            row.note = entrant.note
            decoded, scored = _run(entrant, task, reference, advance)
        except Unavailable as reason:
            row.unavailable = str(reason)
            continue
        reference = reference or scored
        _fill(row, rows[0], decoded, scored, reference, task)
    return rows


def _run(
    entrant: Contender, task: Comparison, reference: Score | None, on_tokens: Callable[[int], None]
) -> tuple[Decoded, Score]:
    try:
        with entrant.around(task.model):
            prompt = task.passkey.prompt
            decode(task.model, prompt[:, :WARM_UP], task.passkey.question, entrant.make, 3)
            decoded = decode(task.model, prompt, task.passkey.question, entrant.make, task.new_tokens, on_tokens)
        with entrant.around(task.scoring_model):
            scored = score(
                task.scoring_model, task.text, entrant.make, task.prompt_length, task.step, None, reference, on_tokens
            )
    except Exception as error:
        if entrant.peer:  # somebody else's cache, or a compiler it wants: not this program's failure
            raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        raise
    return decoded, scored


def _fill(row: Row, first: Row, decoded: Decoded, scored: Score, reference: Score, task: Comparison) -> None:
    cache = decoded.cache
    row.nbytes = cache.nbytes if hasattr(cache, "nbytes") else tensor_bytes(cache)
    row.ratio = (first.nbytes or row.nbytes) / row.nbytes
    row.bits = packed_bits(cache) or float(task.model.dtype.itemsize * 8)
    if row is first:
        row.stored_ratio = 1.0
    elif hasattr(cache, "stats"):
        row.stored_ratio = cache.stats()["compression_ratio"]
    row.perplexity = scored.perplexity
    row.delta_perplexity = scored.perplexity - reference.perplexity
    row.mean_kl, row.top1_agreement = scored.mean_kl, scored.top1_agreement
    answer = task.tokenizer.decode(decoded.tokens[:12])
    row.answer = answer.strip()
    row.passkey_found = task.passkey.found_in(answer)
    row.prefill_tokens_per_second, row.decode_tokens_per_second = decoded.prefill_rate, decoded.decode_rate


def packed_bits(cache: Any) -> float | None:
    """Bits of a packed number, scales included, mean over layers; None for a cache that packs nothing."""
    if hasattr(cache, "stats"):
        bits = [bits for bits in cache.stats()["bits_per_layer"].values() if bits]
        return sum(bits) / len(bits) if bits else None
    names = ("_quantized_keys", "_quantized_values")  # where transformers' quantized layers keep theirs
    packed = [getattr(layer, name) for layer in cache.layers for name in names if hasattr(layer, name)]
    return 8 * tensor_bytes(packed) / sum(part.numel() for part in packed) if packed else None
