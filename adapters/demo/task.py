"""What every demo task is made of: items with a checkable answer, split so that none is shared."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_FENCE = re.compile(r"```[a-zA-Z0-9]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Item:
    """One question.

    `prompt` is what a user writes, `answer` is a reply that passes, `tests` is what a reply is
    checked against (its meaning belongs to the task), `kind` names the family it came from.
    """

    prompt: str
    answer: str
    tests: tuple[str, ...]
    kind: str


def _as_it_is(item: Item, reply: str) -> str:
    return reply


@dataclass(frozen=True)
class Task:
    """A named generator of items and the check that decides whether a reply solves one.

    `items(split, n, seed)` gives `n` items with `n` different prompts; the same arguments give
    the same items. `check(item, reply)` never raises: a reply it cannot read has failed.
    `max_tokens` is room enough for any answer of the task, in tokens of the base.
    `without_topic(item, reply)` is the reply with what was only copied from the prompt left out,
    so that one text with a slot in it counts as one.
    """

    name: str
    checked_by: str
    max_tokens: int
    items: Callable[[Split, int, int], list[Item]]
    check: Callable[[Item, str], bool]
    without_topic: Callable[[Item, str], str] = _as_it_is


class TooFewItems(ValueError):
    """More items were asked for than the split can give without repeating a prompt."""


def unfenced(reply: str) -> str:
    """The first fenced block of a reply, or the whole reply where nothing is fenced."""
    fence = _FENCE.search(reply)
    return (fence.group(1) if fence else reply).strip("\n")


def distinct_items(draw: Callable[[], list[Item]], n: int) -> list[Item]:
    """Calls `draw` until it has given `n` items with different prompts.

    Raises TooFewItems when 200 draws in a row bring nothing new.
    """
    found: dict[str, Item] = {}
    idle = 0
    while len(found) < n:
        before = len(found)
        for item in draw():
            if len(found) < n:
                found.setdefault(item.prompt, item)
        idle = idle + 1 if len(found) == before else 0
        if idle == 200:
            raise TooFewItems(f"asked for {n} items, but only {before} different ones exist")
    return list(found.values())
