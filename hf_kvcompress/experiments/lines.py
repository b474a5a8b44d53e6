"""JSON that knows its lines, so that a mistake can be shown where it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_NAME = re.compile(r'"((?:[^"\\]|\\.)*)"\s*:')


class Fields(dict[str, Any]):
    """An object of a file.

    Attributes:
        line: where it begins. lines: where the value of each field begins.
    """

    line: int
    lines: dict[str, int]


class _Decoder(json.JSONDecoder):
    """The standard decoder in its Python form, with an ear on where values begin."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.parse_object = self._object
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _object(
        self, start: tuple[str, int], strict: bool, scan_once: Callable[[str, int], Any], *others: Any
    ) -> tuple[Fields, int]:
        text, _ = start
        begins: list[int] = []

        def listen(string: str, index: int) -> Any:
            begins.append(index)
            return scan_once(string, index)

        def fields(pairs: list[tuple[str, Any]]) -> Fields:
            found = Fields(pairs)
            found.line = _line(text, start[1])
            places = [_line(text, index) for index in begins]
            found.lines = {name: line for (name, _), line in zip(pairs, places, strict=True)}
            twice = [i for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i])]
            if twice:
                raise ValueError(
                    f"{self.place}: line {places[twice[0]]}, field {pairs[twice[0]][0]!r}: expected it once"
                )
            return found

        return json.decoder.JSONObject(start, strict, listen, None, fields)  # type: ignore[attr-defined,no-any-return]


def read_json(text: str, place: str) -> Any:
    """What a JSON text says, its objects as `Fields`.

    Args:
        place: what messages call the text.

    Raises:
        ValueError: no JSON, by line, column and the field before; or a field that comes twice.
    """
    try:
        return _Decoder(place).decode(text)
    except json.JSONDecodeError as error:
        before = _NAME.findall(text[: error.pos])
        field = f", after field {before[-1]!r}" if before else ""
        raise ValueError(
            f"{place}: line {error.lineno}, column {error.colno}{field}: expected JSON, got: {error.msg}"
        ) from None


def _line(text: str, index: int) -> int:
    return text.count("\n", 0, index) + 1
