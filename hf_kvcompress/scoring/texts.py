"""Real texts that every Python brings along, and the user's own."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

#: Topics of the Python manual that are mostly prose, in reading order.
PROSE = ("execmodel", "customization", "attribute-access", "compound", "import", "typesseq", "types")
#: Modules of the standard library, as text.
CODE = ("argparse", "dataclasses", "textwrap", "heapq")


def standard_text(name: str = "prose") -> str:
    """A long real text from the standard library.

    Args:
        name: "prose" (the Python manual, 40,000 tokens or more) or "code" (standard modules). Both change a little
            from one Python version to the next, so compare only scores of one version.
    """
    if name == "prose":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[topic] for topic in PROSE if topic in topics)
    if name == "code":
        return "\n\n".join(inspect.getsource(__import__(module)) for module in CODE)
    raise ValueError(f"name: expected 'prose' or 'code', got {name!r}")


def read_text(path: str | Path) -> str:
    """A UTF-8 text file."""
    return Path(path).read_text(encoding="utf-8")


def tokenize(tokenizer: Any, text: str, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The first `length` tokens of a text, `[1, length]`, with the tokenizer's usual special tokens before them.

    Raises:
        ValueError: the text is shorter.
    """
    # a token is rarely longer than 16 characters on average: do not tokenize a whole novel for a page
    ids = tokenizer(text[: length * 16], return_tensors="pt")["input_ids"][:, :length]
    if ids.shape[1] < length:
        raise ValueError(f"text: expected at least {length} tokens, got {ids.shape[1]}")
    return ids.to(device)
