"""JSON from strangers: stricter than the standard library, and never a surprise."""

from __future__ import annotations

import json
import math
from typing import Any

# Reading, comparing and writing values recurses; what passes here can be handled anywhere.
_MAX_DEPTH = 32
# Parsing keeps every other thread waiting. A weights file of 120,000 tensors has a million.
_MAX_ITEMS = 1_500_000


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object in `data` (UTF-8); raises ValueError for anything else.

    Refused besides what is not JSON: duplicate keys, NaN and infinities, deep nesting, millions
    of values, and strings with lone surrogates or NUL, which databases and replies cannot carry.
    """
    if sum(map(data.count, (b"[", b"{", b","))) > _MAX_ITEMS:
        raise ValueError(f"it has more than {_MAX_ITEMS} parts")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        _check(value)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeError as error:
        raise ValueError("it is not valid UTF-8 text") from error
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!a} appears twice")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _check(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str):
                _check_text(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number in it is too large")
        if not below:
            return
        level = below
    raise ValueError("it is nested too deeply")


def _check_text(text: str) -> None:
    # Escapes can smuggle in lone surrogates, which the UTF-8 decoding cannot see.
    text.encode("utf-8")
    if "\0" in text:
        raise ValueError("it has a NUL character in a string")
