"""Models, tokenizers and texts for a run, from local folders or the hub."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..integrations.recall_model import load_recall_model
from ..integrations.recall_tasks import TASKS as RECALL_TASKS
from ..scoring import Choose, greedy, load_text, text_windows
from ..scoring.replay import Prompt

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: above this many parameters a second copy in float32 is too dear
FLOAT32_PARAMETERS = 1_000_000_000
#: the name of the small model of this package that looks things up
RECALL = "recall"


def load_model(source: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Model in evaluation mode, and tokenizer; `recall` is the model of this package, which has none.

    Raises:
        ValueError: an unknown dtype, or a model that is missing or gated.
    """
    wanted: Any = dtype_of(dtype) or "auto"
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if source == RECALL:
        return load_recall_model().to(device), None
    with _naming(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted)
    return model.eval().to(device), tokenizer


def load_config(source: str) -> Any:
    """A model's config alone. Raises ValueError for one that is missing or gated."""
    with _naming(source):
        return AutoConfig.from_pretrained(source)


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype of a name; None for auto. Raises ValueError for any other."""
    if name not in ("auto", *DTYPES):
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES.get(name)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Turn transformers' paragraphs on a model that cannot be read into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, with its own words
            raise
        line = str(error).splitlines()[0].strip().rstrip(".:")
        gated = "; accept its terms there and sign in with `hf auth login`" if "gated" in str(error).lower() else ""
        raise ValueError(
            f"model: expected a folder or a name on the hub that you may read, got {source!r} ({line}{gated})"
        ) from error


def scoring_copy(model: Any, score_dtype: str = "auto") -> Any:
    """The model for perplexity and KL: in float32 where that is affordable, since KL below .001 is noise in bfloat16.

    Args:
        score_dtype: "auto" (float32 up to a billion parameters), "same" or "float32".
    """
    if score_dtype not in ("auto", "same", "float32"):
        raise ValueError(f"score-dtype: expected auto, same or float32, got {score_dtype!r}")
    if score_dtype == "auto":
        score_dtype = "float32" if model.num_parameters() <= FLOAT32_PARAMETERS else "same"
    same = score_dtype == "same" or model.dtype == torch.float32
    return model if same else copy.deepcopy(model).float()


def check_length(model: Any, length: int, what: str) -> None:
    """Raise ValueError if the model was not made for so many tokens."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(f"{what}: expected at most {most} for this model, got {length}")


@dataclass(frozen=True)
class Bench:
    """What caches are measured on: a model, the one to score with, and passages of text.

    Without a tokenizer the passages are contexts of the recall model's language.
    """

    model: Any
    scoring_model: Any
    tokenizer: Any
    texts: tuple[str, ...] = ("prose",)
    records: tuple[str, ...] = ()
    _last: dict[tuple[int, bytes], Prompt] = field(default_factory=dict, compare=False, repr=False)

    def passages(self, text: str, number: int, length: int) -> list[torch.Tensor]:
        """`[1, length]` each, on the model's device. Raises ValueError if the text is shorter."""
        if self.tokenizer is None:
            return [RECALL_TASKS["filler"].make(i, length).context.to(self.model.device) for i in range(number)]
        found = text_windows(self.tokenizer, load_text(text), number, length)
        return [ids.to(self.model.device) for ids in found]

    def chooser(self) -> Choose:
        """How the next token is chosen, anew for every cache."""
        return greedy

    def prompt(self, model: Any, ids: torch.Tensor) -> Prompt:
        """A prompt `[1, T]`, whose last token is not read, through the uncompressed model; the last one is kept."""
        key = (id(model), ids.cpu().numpy().tobytes())
        if key not in self._last:
            self._last.clear()  # a prompt holds the queries, keys and values of every layer
            self._last[key] = Prompt(model, ids)
        return self._last[key]

    def fingerprint(self) -> dict[str, Any]:
        """What a result depends on besides its settings, JSON-ready: weights and texts by their hashes."""
        weights = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            part = parameter.detach().flatten()[:64].float().cpu()
            weights.update(f"{name} {tuple(parameter.shape)} {part.tolist()}".encode())
        texts = {} if self.tokenizer is None else {text: load_text(text) for text in self.texts}
        return {
            "model_type": self.model.config.model_type,
            "weights": weights.hexdigest()[:16],
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "score_dtype": str(self.scoring_model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "records": list(self.records),
            "texts": {Path(name).name: hashlib.sha256(t.encode()).hexdigest()[:16] for name, t in texts.items()},
        }
