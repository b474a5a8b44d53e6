"""One compressed cache in one file: safetensors, with a JSON header that says what the tensors are and a checksum.

A file that another model, dtype, codec version or package wrote, or that is cut or changed, is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .config import expect
from .fingerprints import differences, of_codecs, of_model, version
from .snapshots import Snapshot

FORMAT = 1
_KEY = "hf_kvcompress"


# -- bytes -------------------------------------------------------------------------------------------------------------


def pack(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors file of CPU copies of the tensors, with the header and a checksum over both as metadata."""
    held = {name: _own(tensor) for name, tensor in tensors.items()}
    text = json.dumps(header, sort_keys=True)
    return save(held, {_KEY: text, "checksum": _checksum(text, held)})


def unpack(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of what `pack` made. Raises ValueError, with `name`, for anything that is not whole."""
    try:
        length = struct.unpack("<Q", data[:8])[0]
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        text, checksum = metadata[_KEY], metadata["checksum"]
        tensors = load(data)
    except (SafetensorError, struct.error, KeyError, TypeError, ValueError, UnicodeDecodeError, OverflowError) as error:
        raise expect(
            name, "a whole file of a compressed cache", f"one that is cut, or no such file ({error})"
        ) from None
    if checksum != _checksum(text, tensors):
        raise expect(name, f"a file with checksum {checksum[:12]}", "contents that were changed since it was written")
    return json.loads(text), tensors


def _own(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the header and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            flat = tensor.as_strided((tensor.numel(),), (1,))  # a single number may have any stride
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, whenever the process or the machine stops."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# -- headers -----------------------------------------------------------------------------------------------------------


def header_of(
    snapshot: Snapshot, settings: Any, model: Mapping[str, Any] | None, calibration: str | None
) -> dict[str, Any]:
    """Everything about a snapshot but its tensors.

    `settings` are a `CacheConfig`, `model` is from `of_model`, `calibration` from `of_calibration`.
    """
    return {
        "format": FORMAT,
        "package": _package_version(),
        "settings": settings.to_dict(),
        "codecs": of_codecs(settings),
        "model": model,
        "calibration": calibration,
        "dtype": dtype_of(snapshot),
        "layers": snapshot.layers,
        "since": snapshot.since,
    }


def dtype_of(snapshot: Snapshot) -> str | None:
    """Dtype of the keys and values that went in, None of an empty cache."""
    return next((layer["dtype"] for layer in snapshot.layers if "dtype" in layer), None)


def check(
    header: Mapping[str, Any], config: Any, dtype: torch.dtype | None, name: str, calibration: str | None = None
) -> None:
    """Raise ValueError, with `name`, unless a file with this header can be read here, for this model.

    calibration: the fingerprint of the one at hand; one that the file's codecs do not ask for is no harm.
    """
    if header.get("format") != FORMAT:
        raise expect(name, f"a file of format {FORMAT}", f"format {header.get('format')}, by {header.get('package')}")
    for codec, written in header["codecs"].items():
        if version(codec) != written:
            raise expect(name, f"codec {codec} of format {version(codec)}", f"format {written}")
    told, model = header["model"], of_model(config)
    if (told is None) != (model is None):
        wanted = "the config of the model that it was saved with" if model is None else "no config, as it was saved"
        raise expect("config", wanted, "None" if model is None else config.model_type)
    if told is not None and model is not None and (other := differences(told, model)):
        parts = "; ".join(f"{key} {told.get(key)!r} and not {model.get(key)!r}" for key in other)
        raise ValueError(f"{name}: expected a file of this model, got one of a model with {parts}")
    own = header.get("calibration")
    if own is not None and own != calibration:
        got = "None" if calibration is None else f"the one with fingerprint {calibration[:12]}"
        raise ValueError(
            f"calibration: expected the one that {name} was saved with (fingerprint {own[:12]}), got {got}"
        )
    dtype = dtype or getattr(config, "dtype", None)
    if dtype is not None and header["dtype"] not in (None, str(dtype).removeprefix("torch.")):
        raise expect(name, f"a cache in {str(dtype).removeprefix('torch.')}, as the model is", header["dtype"])


def _package_version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("hf_kvcompress")
    except PackageNotFoundError:
        return "unknown"
