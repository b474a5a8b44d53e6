"""Quality of a cache, measured through it: later tokens attend to what the cache stored."""

from .passkey import Passkey, hide_passkey
from .score import Decoded, Score, decode, score
from .texts import load_text, read_text, standard_text, text_windows, tokenize

__all__ = [
    "Decoded",
    "Passkey",
    "Score",
    "decode",
    "hide_passkey",
    "load_text",
    "read_text",
    "score",
    "standard_text",
    "text_windows",
    "tokenize",
]
