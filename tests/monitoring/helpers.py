"""A tiny model that generates under a monitor, and what it takes to be sure of what that saw."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

import hf_kvcompress as kvc
from hf_kvcompress.monitoring import throttle

from ..tiny_model import tiny_llama

PROMPT = 130
SMALL = {"page_size": 8, "residual_length": 8, "sink_length": 2, "group_size": 8}


def model(**changes: Any) -> Any:
    return tiny_llama(**changes)


def prompt(length: int = PROMPT, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def generate(own: Any, cache: Any, tokens: int = 16, ids: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """Logits of every step behind the tokens: two runs are alike only if these are."""
    torch.manual_seed(7)
    ids = prompt() if ids is None else ids
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    out = own.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.cat([out.sequences.double().flatten(), torch.stack(out.logits).double().flatten()])


class Generous(throttle.Throttle):
    """There is always time: every pass is looked at."""

    def allows(self, kind: str) -> bool:
        return True


def plain(own: Any) -> DynamicCache:
    return DynamicCache(config=own.config)


def compressed(own: Any, **settings: Any) -> kvc.CompressedCache:
    return kvc.CompressedCache(own.config, **{**SMALL, **settings})
