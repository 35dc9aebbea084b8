"""Which modules PEFT's names and patterns mean.

The rules are those of PEFT's `check_target_module_exists` and `get_pattern_key`. The patterns
come from an upload, so matching them has a time budget.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import regex  # type: ignore[import-untyped]

ALL_LINEAR = "all-linear"
OUTPUT_LAYER = "lm_head"

_MAX_PATTERN = 4096
_MAX_GROUPS = 64
_BUDGET_S = 2.0
# Compiling (((a{999}){999}){999}), or a+ in a hundred groups that are repeated too, takes all the
# memory there is, and the engine compiles rank_pattern again with the same library. So groups
# are not repeated (an optional group is fine), counts are small, and of the extensions only plain
# and named groups and assertions are known. Other braces are text to `re`, which PEFT uses, but
# may mean fuzzy matching to `regex`.
_UNSAFE = re.compile(
    r"\)\s*[*+{]"  # a repeated group
    r"|\(\?(?!:|=|!|<=|<!|P<)"  # flags, conditions, recursion
    r"|\{(?!\d{1,2}(,(\d{1,2})?)?\})"  # a brace that is no small count
    r"|\[:|&&|\|\||--|~~"  # classes and sets that `re` and `regex` read differently
)

V = TypeVar("V")


class BadPattern(Exception):
    """A pattern that is too long, does not compile, or takes too long."""


class Patterns:
    """Compiles and matches patterns; everything one instance does shares one time budget."""

    def __init__(self, seconds: float = _BUDGET_S) -> None:
        self._deadline = time.monotonic() + seconds
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def match(self, pattern: str, text: str) -> regex.Match[str] | None:
        """`re.match(pattern, text)`; raises BadPattern."""
        return self._run(pattern, text, full=False)

    def fullmatch(self, pattern: str, text: str) -> regex.Match[str] | None:
        """`re.fullmatch(pattern, text)`; raises BadPattern."""
        return self._run(pattern, text, full=True)

    def _run(self, pattern: str, text: str, full: bool) -> regex.Match[str] | None:
        compiled = self._compiled.get(pattern) or self._compile(pattern)
        left = self._deadline - time.monotonic()
        call = compiled.fullmatch if full else compiled.match
        try:
            if left <= 0:
                raise TimeoutError
            # concurrent: other threads (the server's event loop) run while this one matches.
            return call(text, timeout=left, concurrent=True)
        except TimeoutError as error:
            raise BadPattern(f"The pattern {pattern[:80]!a} takes too long to match.") from error

    def _compile(self, pattern: str) -> regex.Pattern[str]:
        if len(pattern) > _MAX_PATTERN or pattern.count("(") > _MAX_GROUPS:
            raise BadPattern(
                f"The pattern {pattern[:80]!a} has more than {_MAX_PATTERN} characters or "
                f"{_MAX_GROUPS} groups."
            )
        if found := _UNSAFE.search(pattern):
            raise BadPattern(f"The pattern {pattern[:80]!a} has {found[0]!a}, which is not safe.")
        try:
            re.compile(pattern)
            compiled = regex.compile(pattern, cache_pattern=False)
        except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
            raise BadPattern(f"The pattern {pattern[:80]!a} is not valid: {error}.") from error
        self._compiled[pattern] = compiled
        return compiled


def per_module(patterns: Patterns, rules: Mapping[str, V], modules: Iterable[str]) -> dict[str, V]:
    """For each module that a key of `rules` matches, the value of the first such key."""
    found = {}
    for module in modules:
        for key, value in rules.items():
            if patterns.match(rf"(.*\.)?({key})$", module):
                found[module] = value
                break
    return found


def suffixes(module: str) -> set[str]:
    """The names that mean `module` in a list of targets: `a.b.c`, `b.c` and `c`."""
    parts = module.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


@dataclass(frozen=True, slots=True)
class Targets:
    """What an adapter's config says it adapts.

    `modules` and `exclude` are a list of names or one pattern; `layers` restricts a list of
    names to these layer numbers, found behind one of `layers_pattern` if there are any.
    """

    modules: tuple[str, ...] | str
    exclude: tuple[str, ...] | str = ()
    layers: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()

    def among(self, modules: Iterable[str]) -> set[str]:
        """Those of `modules` that PEFT would adapt; raises BadPattern."""
        patterns = Patterns()
        return {
            m for m in modules if not self._excluded(m, patterns) and self._included(m, patterns)
        }

    def _excluded(self, module: str, patterns: Patterns) -> bool:
        if isinstance(self.exclude, str):
            return bool(self.exclude) and bool(patterns.fullmatch(self.exclude, module))
        return not suffixes(module).isdisjoint(self.exclude)

    def _included(self, module: str, patterns: Patterns) -> bool:
        if isinstance(self.modules, str):
            if self.modules.lower() == ALL_LINEAR:
                return module.rsplit(".", 1)[-1] != OUTPUT_LAYER
            return bool(patterns.fullmatch(self.modules, module))
        if suffixes(module).isdisjoint(self.modules):
            return False
        # A name given in full is adapted whatever the layers say: PEFT returns before it looks.
        if not self.layers or module in self.modules:
            return True
        return self._layer(module, patterns) in self.layers

    def _layer(self, module: str, patterns: Patterns) -> int | None:
        starts = [rf"(?:^|.*?\.){p}" for p in self.layers_pattern] or [r".*?\.[^.]*"]
        for start in starts:
            if found := patterns.match(rf"{start}\.(?P<idx>\d+)\.", module):
                return int(found.group("idx"))
        return None
