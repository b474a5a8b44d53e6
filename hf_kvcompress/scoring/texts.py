"""Real texts that every Python brings along, and the user's own."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch

#: Topics of the Python manual that are mostly prose, in reading order.
PROSE = ("execmodel", "customization", "attribute-access", "compound", "import", "typesseq", "types")
#: Modules of the standard library, as text.
CODE = ("argparse", "dataclasses", "textwrap", "heapq")
#: Modules for calibrations: none of those that are scored.
CALIBRATION_CODE = ("tarfile", "difflib", "inspect", "logging", "ast") + (
    ("csv", "shutil", "statistics", "random", "fractions")
)


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


def calibration_texts() -> list[str]:
    """What a model is calibrated on by default: the rest of the Python manual, and other modules of the library.

    No paragraph of `standard_text` is in them, so that it stays a text that a calibration has not seen.
    """
    from pydoc_data.topics import topics

    scored = {_words(part) for part in standard_text().split("\n\n")}
    others = (part for topic in sorted(topics) if topic not in PROSE for part in topics[topic].split("\n\n"))
    manual = dict.fromkeys(part for part in others if _words(part) not in scored)  # topics repeat each other
    code = (inspect.getsource(importlib.import_module(module)) for module in CALIBRATION_CODE)
    return ["\n\n".join(manual), "\n\n".join(code)]


def _words(text: str) -> str:
    """The text without its layout: topics indent and break the same paragraph differently."""
    return " ".join(text.split())


def read_text(path: str | Path) -> str:
    """A UTF-8 text file."""
    return Path(path).read_text(encoding="utf-8")


def load_text(name: str | Path) -> str:
    """`prose`, `code`, a UTF-8 file, or `datasets:NAME[:CONFIG][:SPLIT][:COLUMN]` of the datasets library.

    Raises:
        ValueError: nothing of that name is there; OSError, UnicodeDecodeError: the file cannot be read.
    """
    if name in ("prose", "code"):
        return standard_text(str(name))
    if isinstance(name, str) and name.startswith("datasets:"):
        return _dataset_text(name)
    if not Path(name).is_file():
        raise ValueError(f"text: expected prose, code, a file or datasets:NAME, got {str(name)!r}")
    return read_text(name)


def _dataset_text(name: str) -> str:
    """A column of a data set, its rows one after the other."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"text: {name!r} needs datasets: pip install 'hf_kvcompress[eval]'") from None
    path, config, split, column = (name.removeprefix("datasets:").split(":") + ["", "", ""])[:4]
    if path.endswith((".json", ".jsonl", ".txt", ".csv")):
        kind = {"jsonl": "json", "txt": "text"}.get(path.rsplit(".", 1)[1], path.rsplit(".", 1)[1])
        rows = load_dataset(kind, data_files=path, split=split or "train")
    else:
        rows = load_dataset(path, config or None, split=split or "test")
    if (column or "text") not in rows.column_names:
        raise ValueError(f"text: expected a column of {', '.join(rows.column_names)}, got {column or 'text'!r}")
    return "\n".join(rows[column or "text"])


def text_windows(tokenizer: Any, text: str, number: int, length: int) -> list[torch.Tensor]:
    """`number` windows `[1, length]`, evenly spread and without overlap, each with the usual special tokens before it.

    Raises:
        ValueError: the text has fewer.
    """
    prefix = tokenizer("")["input_ids"]
    size = length - len(prefix)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = len(ids) // size
    if pieces < number:
        raise ValueError(f"text: expected {number} windows of {size} tokens, got a text of {len(ids)} tokens")
    starts = [index * (pieces - 1) // max(number - 1, 1) * size for index in range(number)]
    return [torch.tensor([prefix + ids[start : start + size]]) for start in starts]


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
