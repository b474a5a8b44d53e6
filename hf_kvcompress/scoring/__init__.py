"""Quality of a cache, measured through it: later tokens attend to what the cache stored."""

from .passkey import Passkey, hide_passkey
from .score import Choose, Decoded, Score, decode, greedy, score
from .texts import calibration_texts, load_text, read_text, standard_text, text_windows, tokenize

__all__ = [
    "Choose",
    "Decoded",
    "Passkey",
    "Score",
    "calibration_texts",
    "decode",
    "greedy",
    "hide_passkey",
    "load_text",
    "read_text",
    "score",
    "standard_text",
    "text_windows",
    "tokenize",
]
