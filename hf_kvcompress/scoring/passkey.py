"""A number hidden in a long text, asked for after the text."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

SENTENCE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
#: The sentence is begun again and the model completes it: models that follow no instructions can do that too.
QUESTION = "\n\nThe pass key is"


@dataclass(frozen=True)
class Passkey:
    """A prompt `[1, T]` with `key` in it, and the question `[1, Q]` that asks for it."""

    key: str
    prompt: torch.Tensor
    question: torch.Tensor
    #: where the sentence stands in the prompt, in tokens
    position: int
    #: tokens of the text that are in the prompt, the sentence not counted
    text_tokens: int

    def found_in(self, answer: str) -> bool:
        """Whether the answer begins with the key; tokenizers may put spaces between digits."""
        return "".join(answer.split()).startswith(self.key)


def hide_passkey(
    tokenizer: Any, text_ids: torch.Tensor, depth: float = 0.35, seed: int = 0, digits: int = 5
) -> Passkey:
    """Put a random number into a text, at the first line end after `depth` of it.

    Args:
        text_ids: `[1, T]` tokens of the text. The prompt is as long: the text loses what the sentence takes.
        depth: 0 is the beginning, 1 the end.
        seed: the number follows from it.

    Raises:
        ValueError: `depth` is outside 0 to 1, or the text is shorter than the sentence.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth: expected 0 to 1, got {depth}")
    key = "".join(random.Random(seed).choices("123456789", k=digits))
    sentence = _ids(tokenizer, SENTENCE.format(key=key))
    room = text_ids.shape[1] - len(sentence)
    if room < 1:
        raise ValueError(f"text_ids: expected more than {len(sentence)} tokens, got {text_ids.shape[1]}")
    text = text_ids[0, :room].tolist()
    position = max(1, round(depth * room))  # after a beginning-of-text token
    for ahead in range(position, min(position + 64, room)):
        if "\n" in tokenizer.decode([text[ahead - 1]]):
            position = ahead
            break
    prompt = text[:position] + sentence + text[position:]
    device = text_ids.device
    return Passkey(
        key,
        torch.tensor([prompt], device=device),
        torch.tensor([_ids(tokenizer, QUESTION)], device=device),
        position,
        room,
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
