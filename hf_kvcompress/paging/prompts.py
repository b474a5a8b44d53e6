"""Reading prompts: behind what is known of them, several of unequal length in one pass."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..enable import enable
from ..prefix.cache import PrefixCache
from ..prefix.hashing import chain
from .cache import PagedCache
from .joining import align, holding, join

WASTE = 1.5  # a pass may be so much longer, with its padding, than what it reads
REMEMBERED = 1 << 17  # blocks of prompts whose beginnings are remembered


class Beginnings:
    """How often each beginning of a prompt was seen, in whole blocks: what two prompts share is worth an entry."""

    def __init__(self, root: str, block_size: int):
        self.root, self.block_size = root, block_size
        self._seen: OrderedDict[str, int] = OrderedDict()

    def note(self, tokens: Sequence[int]) -> None:
        """Take in a prompt."""
        for name in chain(self.root, tokens, self.block_size):
            self._seen[name] = self._seen.pop(name, 0) + 1
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def shared(self, tokens: Sequence[int]) -> tuple[int, str]:
        """Tokens at the beginning that another prompt has as well, whole blocks and not all; and the name of these."""
        names = chain(self.root, tokens[: len(tokens) - 1], self.block_size)
        for number, name in reversed(list(enumerate(names))):
            if self._seen.get(name, 0) > 1:
                return (number + 1) * self.block_size, name
        return 0, ""


class PromptReader:
    """Makes caches of prompts.

    Args:
        model: what reads them.
        config: the model's.
        new_cache: makes an empty cache.
        prefixes: what is known of prompts, if anything is kept.
        tokens: of a prompt that are read in one pass; of several prompts with their padding.
    """

    def __init__(self, model: Any, new_cache: Callable[[], PagedCache], prefixes: PrefixCache | None, tokens: int):
        self.model, self.new_cache, self.prefixes, self.tokens = model, new_cache, prefixes, tokens
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._beginnings = None
        if prefixes is not None:
            self._beginnings = Beginnings(prefixes.reader.origin.root, prefixes.reader.block_size)

    def note(self, prompts: Iterable[Sequence[int]]) -> None:
        """Look at prompts that will come, for what they share."""
        if self._beginnings is not None:
            for prompt in prompts:
                self._beginnings.note(prompt)

    def shared(self, ids: Sequence[int]) -> tuple[int, str]:
        """Tokens at the beginning that other prompts have as well, and their name."""
        return (0, "") if self._beginnings is None else self._beginnings.shared(ids)

    def together(self, lengths: Sequence[int]) -> bool:
        """Whether prompts with so many tokens to read are read in one pass."""
        padded = len(lengths) * max(lengths)
        return padded <= self.tokens and padded <= WASTE * sum(lengths)

    @torch.no_grad()
    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[PagedCache, torch.Tensor]:
        """One cache with a row of each prompt, in order, and the logits `[rows, V]` behind its last token."""
        begun = [self._begin(ids) for ids in prompts]
        order: list[int] = []
        caches, logits = [], []
        for known in (False, True):  # empty rows have nothing that they could be joined by
            rows = [row for row, (_, have) in enumerate(begun) if (have > 0) == known]
            if rows:
                cache, found = self._read_rows([begun[row] for row in rows], [prompts[row] for row in rows])
                caches.append(cache)
                logits.append(found)
                order += rows
        cache = caches[0] if len(caches) == 1 else join(caches, self.model.config)
        if order != sorted(order):
            back = sorted(range(len(order)), key=order.__getitem__)
            cache.batch_select_indices(torch.tensor(back))
            return cache, torch.cat(logits)[back]
        return cache, torch.cat(logits)

    def _begin(self, ids: Sequence[int]) -> tuple[PagedCache, int]:
        """A cache that has read the first n tokens of a prompt, and n."""
        if self.prefixes is None or self._beginnings is None:
            return self.new_cache(), 0
        reader, store = self.prefixes.reader, self.prefixes.store
        wanted = list(ids)
        if not reader.remember:
            best = store.lease(reader.origin.root, tuple(ids), False)
            store.release(best)
            shared = max(self.shared(ids)[0], best.tokens)
            wanted = wanted[: shared + 1] if shared else wanted
            keep = shared > 0
        else:
            keep = True
        with enable(self.model):
            cache, have = reader.open(wanted, keep=keep, passes=self.tokens)
        assert isinstance(cache, PagedCache)
        return cache, have

    def _read_rows(
        self, begun: Sequence[tuple[PagedCache, int]], prompts: Sequence[Sequence[int]]
    ) -> tuple[PagedCache, torch.Tensor]:
        haves = [have for _, have in begun]
        if len(begun) == 1:
            return self._read_one(*begun[0], prompts[0])
        cache = join([own for own, _ in begun], self.model.config) if haves[0] else begun[0][0]
        new = [ids[have:] for ids, have in zip(prompts, haves, strict=True)]
        length, longest = max(map(len, new)), max(haves)
        ids = torch.tensor([[*own, *[0] * (length - len(own))] for own in new])
        # Rows end together before this pass; behind it stands the padding of those with fewer new tokens.
        at = torch.arange(longest + length)
        first = longest - torch.tensor(haves)[:, None]
        end = longest + torch.tensor([len(own) for own in new])[:, None]
        mask = ((at >= first) & (at < end)).long()
        positions = torch.tensor(haves)[:, None] + torch.arange(length)
        lasts = [len(own) - 1 for own in new]
        logits = self.forward(ids, cache, lasts, attention_mask=mask, position_ids=positions)
        cache.commit()
        for _, layer in holding(cache):
            align(layer)
        return cache, logits

    def _read_one(self, cache: PagedCache, have: int, ids: Sequence[int]) -> tuple[PagedCache, torch.Tensor]:
        """A prompt by itself, in several passes if it is long."""
        logits = torch.empty(0)
        for start in range(have, len(ids), self.tokens):
            own = torch.tensor([ids[start : start + self.tokens]])
            logits = self.forward(own, cache, [own.shape[1] - 1])
        cache.commit()
        return cache, logits

    def forward(
        self, ids: torch.Tensor, cache: PagedCache, lasts: Sequence[int], **inputs: torch.Tensor
    ) -> torch.Tensor:
        """A pass over tokens `[B, q]`; logits of the token `lasts[row]` of each row, `[B, V]`."""
        device = self.model.device
        more: dict[str, Any] = {name: tensor.to(device) for name, tensor in inputs.items()}
        places = sorted(set(lasts))
        if self._selects:
            more["logits_to_keep"] = torch.tensor(places, device=device)
        with enable(self.model):
            logits = self.model(ids.to(device), past_key_values=cache, use_cache=True, **more).logits
        columns = [places.index(last) if self._selects else last for last in lasts]
        return logits[torch.arange(len(lasts), device=device), torch.tensor(columns, device=device)]
