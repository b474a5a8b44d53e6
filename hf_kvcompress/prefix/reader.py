"""Reading a prompt with a model, beginning with what is known of it, and keeping what is new."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..cache import CompressedCache
from ..config import expect
from ..fingerprints import of_calibration, of_codecs, of_model
from ..layer import CompressedLayer
from ..saving import FORMAT
from ..shards import agree
from .hashing import Tokens, root_of
from .store import Lease, PrefixStore
from .tree import Node, Origin

Prompt = str | Sequence[int] | torch.Tensor


class PrefixReader:
    """What makes caches for a model's prompts.

    Args:
        store: where prefixes are.
        settings: of the caches, or a function of the model's config that makes an empty one.
        remember, partial, revision, salt, device: see `PrefixCache`.
    """

    def __init__(
        self,
        store: PrefixStore,
        settings: Mapping[str, Any] | Callable[[Any], CompressedCache],
        remember: bool,
        partial: bool,
        revision: str | None,
        salt: str,
        device: torch.device | str | None,
    ):
        self.store, self.settings = store, settings
        self.remember, self.partial, self.revision, self.salt, self.device = remember, partial, revision, salt, device
        self.model: Any = None
        self.tokenizer: Any = None

        self.resident: Any = None  # of an engine: caches of prefixes that can be forked
        self.pads = False  # padding between a prefix and a suffix changes nothing: all layers see all tokens

    @property
    def block_size(self) -> int:
        return self.store.tree.block_size

    def bind(self, model: Any, tokenizer: Any = None) -> None:
        """Serve this model from now on; entries of other models stay and are never mixed up with its own."""
        config = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise expect("model", "a decoder: an encoder reads a prefix and what follows together", config.model_type)
        self.model, self.tokenizer = model, tokenizer
        empty = self.new_cache()
        calibrated = of_calibration(empty.settings, empty.calibration)
        told = {
            "format": FORMAT,
            "model": of_model(config),
            "name": getattr(config, "_name_or_path", None),
            "revision": self.revision or getattr(config, "_commit_hash", None),
            "dtype": str(model.dtype),
            "settings": empty.settings.to_dict() | empty.strategy(),
            "codecs": of_codecs(empty.settings),
            "calibration": calibrated,
            "salt": self.salt,
        }
        self.origin = Origin(root_of(told), empty.settings, empty.fingerprint, calibrated)
        self.pads = all(type(layer) is CompressedLayer and not layer.is_sliding for layer in _with_tokens(empty))
        self._kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def new_cache(self) -> CompressedCache:
        """An empty cache with the settings of this one's entries."""
        if self.model is None:
            raise expect("model", "a model, by PrefixCache(model=...) or bind(model)", None)
        if callable(self.settings):
            return self.settings(self.model.config)
        return CompressedCache(self.model.config, **self.settings)

    def tokens_of(self, prompt: Prompt, begins: bool = True) -> Tokens:
        """Token ids of a text (with the tokenizer's special tokens if it `begins` a prompt) or of a row of ids."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise expect("prompt", "token ids, as there is no tokenizer", prompt)
            return tuple(self.tokenizer(prompt, add_special_tokens=begins)["input_ids"])
        ids = prompt.flatten().tolist() if isinstance(prompt, torch.Tensor) else list(prompt)
        if not all(isinstance(token, int) for token in ids):
            raise expect("prompt", "a text or a row of token ids", type(prompt).__name__)
        return tuple(ids)

    # -- reading -------------------------------------------------------------------------------------------------------

    def open(
        self, prompt: Prompt, keep: bool | None = None, priority: str = "normal", passes: int = 0
    ) -> tuple[CompressedCache, int]:
        """A cache that has read the first n tokens of a prompt, and n; at least one token is left to read.

        With `keep` (None: `remember`) the model now reads what no entry has, up to the last whole block, in passes of
        at most `passes` tokens (0: in one), and an entry is made of it. Without, only what is known is used.
        """
        ids = self.tokens_of(prompt)
        if not ids:
            raise expect("prompt", "at least one token", "none")
        keep = self.remember if keep is None else keep
        end = (len(ids) - 1) // self.block_size * self.block_size
        with torch.no_grad():
            cache, have, lease = self._begin(ids, keep)
            try:
                self.store.stats.asked(have, len(ids) - have)
                known = self.store.known(self.origin.root, ids[:end]) if keep else 0
                stops = {end, known if agree(self.model, known) else end} if keep else set()
                for stop in sorted(stop for stop in stops if stop > have):
                    lease = self._read_on(cache, ids, have, stop, lease, priority, passes)
                    have = stop
            finally:
                self.store.release(lease)
        return cache, have

    def _begin(self, ids: Tokens, keep: bool) -> tuple[CompressedCache, int, Lease]:
        """A cache with the longest known prefix, its length, and a lease of the entry that it is of."""
        store, where = self.store, self.model.device
        if store.tiers:
            place = torch.device(self.device or where)
            store.fetch(self.origin, ids, self.model.config, self.model.dtype, place)
        cache = self.new_cache()
        lease = store.lease(self.origin.root, ids, self.partial)
        node, have = lease.node, lease.tokens
        if not agree(self.model, have):  # the ranks of a model must read the same tokens
            store.release(lease)
            return cache, 0, Lease(None, 0)
        if node is None:
            return cache, 0, lease
        try:
            ready = None if self.resident is None else self.resident.get(node.key)
            if ready is None:
                cache.put_back(lease.states(), where)
            else:
                cache = ready
            if have == node.end:
                if self.resident is not None and ready is None:
                    self.resident.put(node.key, cache)
                return cache, have, lease
            cache.crop(have - node.end)
        except BaseException:
            store.release(lease)
            raise
        store.release(lease)
        if not keep or have % self.block_size:
            return cache, have, Lease(None, 0)
        seconds = node.usage.seconds * have / node.end
        return cache, have, self._keep(cache, ids[:have], None, [], seconds, "normal")

    def _read_on(
        self, cache: CompressedCache, ids: Tokens, have: int, stop: int, lease: Lease, priority: str, passes: int
    ) -> Lease:
        """Let the cache read from `have` to `stop` and keep what it holds then."""
        base = lease.node if lease.held else None
        before = cache.sealed() if base is not None else []
        started = time.perf_counter()
        for first in range(have, stop, passes or stop):
            self.forward(ids[first : min(first + (passes or stop), stop)], cache)
        seconds = time.perf_counter() - started
        kept = self._keep(cache, ids[:stop], base, before, seconds, priority)
        self.store.release(lease)
        return kept

    def _keep(
        self,
        cache: CompressedCache,
        tokens: Tokens,
        base: Node | None,
        before: list[int],
        seconds: float,
        priority: str,
    ) -> Lease:
        state = cache.snapshot(before)
        if self.device is not None:
            state.tensors = {name: tensor.to(self.device) for name, tensor in state.tensors.items()}
        lease = self.store.put(tokens, state, self.origin, base, seconds, _croppable(cache), priority)
        if self.resident is not None and lease.node is not None:
            self.resident.put(lease.node.key, cache)
        return lease

    def forward(self, tokens: Sequence[int], cache: CompressedCache) -> torch.Tensor:
        """One pass of the model over tokens behind what the cache has read; the logits of the last one, `[1, 1, V]`."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        return self.model(ids, past_key_values=cache, use_cache=True, **self._kept).logits[:, -1:]


def _with_tokens(cache: CompressedCache) -> list[Any]:
    """The layers that hold anything."""
    return [layer for layer in cache.layers if type(layer).__name__ not in ("DummyLayer", "EmptyLayer")]


def _croppable(cache: CompressedCache) -> bool:
    """Whether the cache can go back to any number of tokens: all of them are still there, in layers of ours."""
    return all(type(layer) is CompressedLayer and layer.is_croppable for layer in _with_tokens(cache))
