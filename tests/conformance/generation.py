"""The ways of generating that a cache must survive, each a function of a model, a prompt and a fresh cache.

Every function takes `(entry, model, make)`, where `make()` returns an empty cache ready to be passed as
`past_key_values`, and returns the tokens and the logits of each step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin

from .prompts import Inputs, encoder_inputs, ids_of, prompt, row_alone, text_ids
from .zoo import Entry

MakeCache = Callable[[], Any]
NEW_TOKENS = 10
PADDED_LENGTHS = (23, 37, 30)


@dataclass
class Outcome:
    """Tokens `[rows, T]` and logits `[steps, rows, V]` of one run."""

    tokens: torch.Tensor
    logits: torch.Tensor


Mode = Callable[[Entry, Any, MakeCache], Outcome]
MODES: dict[str, Mode] = {}


def mode(function: Mode) -> Mode:
    MODES[function.__name__] = function
    return function


def generate(entry: Entry, model: Any, inputs: Inputs, cache: Any, **options: Any) -> Outcome:
    """`generate` with the cache: the common one, since Whisper's own cuts audio into windows first."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    torch.manual_seed(7)
    out = GenerationMixin.generate(
        model, **inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options
    )
    return Outcome(out.sequences, torch.stack(out.logits))


# -- generate ----------------------------------------------------------------------------------------------------------


@mode
def greedy(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    return generate(entry, model, prompt(entry), make())


@mode
def sampling(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    return generate(entry, model, prompt(entry), make(), do_sample=True, temperature=0.8)


@mode
def beams(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    return generate(entry, model, prompt(entry), make(), num_beams=4)


@mode
def beam_sampling(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    return generate(entry, model, prompt(entry, (29, 29)), make(), num_beams=3, do_sample=True)


@mode
def num_return_sequences(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    return generate(entry, model, prompt(entry), make(), do_sample=True, num_return_sequences=3)


@mode
def beams_returned(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    return generate(entry, model, prompt(entry, (21, 33)), make(), num_beams=4, num_return_sequences=2)


@mode
def prompt_lookup(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    return generate(entry, model, prompt(entry), make(), prompt_lookup_num_tokens=4, max_matching_ngram_size=1)


@mode
def assistant(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    return generate(entry, model, prompt(entry), make(), assistant_model=entry.assistant)


@mode
def left_padded(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    return generate(entry, model, prompt(entry, PADDED_LENGTHS), make())


@mode
def prefill_chunks(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    return generate(entry, model, prompt(entry, (45,)), make(), prefill_chunk_size=13)


@mode
def prefill_chunks_left_padded(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    """The first chunk of the shortest row is padding alone."""
    return generate(entry, model, prompt(entry, PADDED_LENGTHS), make(), prefill_chunk_size=13)


@mode
def inputs_embeds(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    """Encoder-decoder models take them in a loop, not in `generate`."""
    inputs = prompt(entry)
    embeds = model.get_input_embeddings()(ids_of(entry, inputs))
    if entry.kind == "encoder_decoder":
        inputs = {**encoder_inputs(entry, 1), "decoder_inputs_embeds": embeds}
        return loop(entry, model, make(), inputs, steps=3)
    del inputs["input_ids"]
    return generate(entry, model, {**inputs, "inputs_embeds": embeds}, make())


@mode
def second_turn(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    """Generate, add words of the user's, generate again on the same cache: only the new tokens are fed."""
    cache = make()
    inputs = prompt(entry, (26,))
    first = generate(entry, model, inputs, cache, max_new_tokens=7)
    ids = torch.cat([first.tokens, text_ids(1, 12, seed=5)], dim=1)
    again = {key: value for key, value in inputs.items() if key not in ("pixel_values", "image_grid_thw")}
    if entry.kind == "encoder_decoder":
        again |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    else:
        again |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in again:
        kinds = again["mm_token_type_ids"]
        again["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, ids.shape[1] - kinds.shape[1]))
    second = generate(entry, model, again, cache)
    return Outcome(second.tokens, torch.cat([first.logits, second.logits]))


# -- plain loops over `model(x, past_key_values=cache)` ----------------------------------------------------------------


@mode
def token_loop(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    """Prompt in one call, then one token a call, without masks: as a user's own loop would do it."""
    inputs = {key: value for key, value in prompt(entry).items() if not key.endswith("attention_mask")}
    return loop(entry, model, make(), inputs, steps=NEW_TOKENS)


@mode
def chunk_loop(entry: Entry, model: Any, make: MakeCache) -> Outcome:
    """A fixed text in chunks of odd sizes; all logits of all chunks count."""
    cache, parts, start = make(), [], 0
    inputs = prompt(entry, (21,))
    ids = torch.cat([ids_of(entry, inputs), text_ids(1, 40, seed=3)], dim=1)
    for size in (21, 1, 7, 3, 17, 2, 1, 1, 8):
        parts.append(forward(entry, model, cache, inputs, ids[:, start : start + size]).logits[0])
        start += size
        inputs = encoder_inputs(entry, 1) if entry.kind == "encoder_decoder" else {}
    return Outcome(ids, torch.cat(parts)[:, None])


def forward(entry: Entry, model: Any, cache: Any, inputs: Inputs, ids: torch.Tensor) -> Any:
    """One `model(...)` call that adds `ids` to the cache."""
    name = "decoder_input_ids" if entry.kind == "encoder_decoder" else "input_ids"
    skipped = {name, "decoder_attention_mask"} | ({"attention_mask"} if entry.kind != "encoder_decoder" else set())
    rest = {key: value for key, value in inputs.items() if key not in skipped}
    return model(**{**rest, name: ids}, past_key_values=cache, use_cache=True)


def loop(entry: Entry, model: Any, cache: Any, inputs: Inputs, steps: int) -> Outcome:
    """Greedy decoding by hand; `inputs` go into the first call, later calls get a token (and the encoder's input)."""
    name = "decoder_input_ids" if entry.kind == "encoder_decoder" else "input_ids"
    later = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
    later = later if entry.kind == "encoder_decoder" else {}
    out = model(**inputs, past_key_values=cache, use_cache=True)
    logits, tokens = [out.logits[:, -1]], []
    for _ in range(steps):
        tokens.append(logits[-1].argmax(-1, keepdim=True))
        out = model(**{**later, name: tokens[-1]}, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1])
    return Outcome(torch.cat(tokens, dim=1), torch.stack(logits))


# -- rows by themselves ------------------------------------------------------------------------------------------------


def rows_alone(entry: Entry, model: Any, make: MakeCache) -> list[Outcome]:
    """What `left_padded` does, but each row in a call of its own, without padding."""
    inputs = prompt(entry, PADDED_LENGTHS)
    return [generate(entry, model, row_alone(entry, inputs, row), make()) for row in range(len(PADDED_LENGTHS))]
