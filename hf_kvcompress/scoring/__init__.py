"""Quality of a cache, measured through it: later tokens attend to what the cache stored."""

from .passkey import Passkey, hide_passkey
from .score import Decoded, Score, decode, score
from .texts import read_text, standard_text, tokenize

__all__ = ["Decoded", "Passkey", "Score", "decode", "hide_passkey", "read_text", "score", "standard_text", "tokenize"]
