"""What an error says, in one line."""

from __future__ import annotations

#: a module that is not there -> the extra that brings it
EXTRA_OF = {
    "accelerate": "eval",
    "datasets": "eval",
    "evaluate": "eval",
    "rouge_score": "eval",
    "lm_eval": "lm-eval",
    "matplotlib": "plot",
    "jinja2": "plot",
    "pandas": "plot",
    "redis": "redis",
    "fsspec": "fsspec",
}


def sentence(error: BaseException) -> str:
    """The first line of an error; for a module that is not installed, how to install it."""
    if isinstance(error, ImportError):
        extra = EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is not None:
            return f"{error.name} is not installed: pip install 'hf_kvcompress[{extra}]'"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
