"""Models, tokenizers and texts for a run, from local folders or the hub."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..integrations.recall_model import load_recall_model
from ..integrations.recall_tasks import TASKS as RECALL_TASKS
from ..scoring import load_text, text_windows

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: above this many parameters a second copy in float32 is too dear
FLOAT32_PARAMETERS = 1_000_000_000
#: the name of the small model of this package that looks things up
RECALL = "recall"


def load_model(source: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Model in evaluation mode, and tokenizer; `recall` is the model of this package, which has none.

    Raises:
        ValueError: an unknown dtype; OSError: no such model.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if source == RECALL:
        return load_recall_model().to(device), None
    tokenizer = AutoTokenizer.from_pretrained(source)
    wanted: Any = "auto" if dtype == "auto" else DTYPES[dtype]
    return AutoModelForCausalLM.from_pretrained(source, dtype=wanted).eval().to(device), tokenizer


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

    def passages(self, text: str, number: int, length: int) -> list[torch.Tensor]:
        """`[1, length]` each, on the model's device. Raises ValueError if the text is shorter."""
        if self.tokenizer is None:
            return [RECALL_TASKS["filler"].make(i, length).context.to(self.model.device) for i in range(number)]
        found = text_windows(self.tokenizer, load_text(text), number, length)
        return [ids.to(self.model.device) for ids in found]

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
