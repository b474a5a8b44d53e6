"""`kvcompress lm-eval`: lm-evaluation-harness's own command, with the model `hf-kvcompress` known to it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

HOW_TO_INSTALL = "pip install 'hf_kvcompress[lm-eval]'"
#: what takes the place of the command's own name in lm-eval's messages
PROGRAM = "kvcompress lm-eval"


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness through a cache: `lm-eval run --model_args pretrained=NAME,cache=balanced --tasks ...`.

    The model is `hf-kvcompress` unless --model names another. A local model with local tasks touches no network.
    """
    arguments = list(context.args)
    if arguments[:1] == ["run"] and not any(a == "--model" or a.startswith("--model=") for a in arguments):
        arguments[1:1] = ["--model", "hf-kvcompress"]
    if _is_local(arguments):
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
            os.environ.setdefault(name, "1")
    try:
        from lm_eval.__main__ import cli_evaluate

        from ..integrations import lm_eval as _  # noqa: F401  # registers the model
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: {HOW_TO_INSTALL}") from None
    before, sys.argv = sys.argv, [PROGRAM, *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _is_local(arguments: list[str]) -> bool:
    """The model is a folder, and tasks come from one."""
    words = [word for argument in arguments for word in argument.replace('"', "").replace(",", " ").split()]
    models = [word.partition("=")[2] for word in words if word.startswith("pretrained=")]
    return any(Path(model).is_dir() for model in models) and "--include_path" in arguments
