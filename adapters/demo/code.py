"""Signature and docstring to a Python function; a reply is right when its unit tests pass.

A function takes something apart (a source), keeps some of it (a filter), changes what it kept
(a map) and gathers it (a reducer). Which split a combination of the four belongs to is fixed by
a hash of their names, so that validation and test hold only combinations never trained on.
"""

# ruff: noqa: S311, SIM905 - randomness is seeded; a word list reads best as one text
from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import string
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adapters.demo.task import Item, Split, Task, distinct_items, unfenced

WALL_SECONDS = 10
CPU_SECONDS = 2
MEMORY_BYTES = 512 << 20

# The last line answers with the word it was given only if every assert before it held, so a reply
# that ends the process early has not passed. NPROC does not bind root, the audit hook does.
RUNNER = f"""
import json, resource, sys
task = json.load(sys.stdin)
for limit, value in (
    (resource.RLIMIT_CPU, {CPU_SECONDS}),
    (resource.RLIMIT_AS, {MEMORY_BYTES}),
    (resource.RLIMIT_FSIZE, 0),
    (resource.RLIMIT_NPROC, 0),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))
denied = ("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill",
          "subprocess.", "socket.", "ctypes.", "_thread.", "os.remove", "os.rmdir", "os.rename",
          "os.chmod", "os.chown", "os.truncate", "os.link", "os.symlink", "os.mkdir", "pty.")
def hook(event, args):
    if event.startswith(denied) or event == "open" and args[1] not in ("r", "rb", None):
        raise PermissionError(event)
sys.addaudithook(hook)
space = {{"__name__": "reply"}}
exec(task["code"], space)
for test in task["tests"]:
    exec(test, space)
sys.__stdout__.write(task["word"])
"""


@dataclass(frozen=True)
class Filter:
    """Which elements are kept: an adjective before the noun or a clause after it; the test."""

    name: str
    adjective: str
    clause: str
    test: str


@dataclass(frozen=True)
class Map:
    """What an element becomes: said of many (`{}` is the noun), said of one, in code; its type."""

    name: str
    many: str
    one: str
    code: str
    gives: str


@dataclass(frozen=True)
class Source:
    """What a function takes apart, and how its elements are called."""

    name: str
    weight: int
    parameters: tuple[str, ...]
    noun: str
    place: str
    loop: str
    over: str
    element: str
    filters: tuple[Filter, ...]
    maps: tuple[Map, ...]
    argument: Callable[[random.Random, dict[str, Any]], Any]
    edges: tuple[Any, ...]


def _plain(gives: str, code: str, many: str = "{}") -> Map:
    return Map("", many, "itself", code, gives)


NUMBER_FILTERS = (
    Filter("even", "even", "that are even", "x % 2 == 0"),
    Filter("odd", "odd", "that are odd", "x % 2 != 0"),
    Filter("above", "", "that are greater than {k}", "x > {k}"),
    Filter("below", "", "that are less than {k}", "x < {k}"),
    Filter("at least", "", "that are at least {k}", "x >= {k}"),
    Filter("at most", "", "that are at most {k}", "x <= {k}"),
    Filter("multiple", "", "that are divisible by {d}", "x % {d} == 0"),
    Filter("no multiple", "", "that are not divisible by {d}", "x % {d} != 0"),
    Filter("other than", "", "that are not equal to {k}", "x != {k}"),
)
SIGNED_FILTERS = (
    Filter("positive", "positive", "that are positive", "x > 0"),
    Filter("negative", "negative", "that are negative", "x < 0"),
    Filter("nonzero", "nonzero", "that are nonzero", "x != 0"),
    Filter("between", "", "that are between {k} and {m}", "{k} <= x <= {m}"),
)
NUMBER_MAPS = (
    _plain("number", "x"),
    Map("square", "the squares of {}", "its square", "x * x", "number"),
    Map("cube", "the cubes of {}", "its cube", "x ** 3", "number"),
    Map("double", "the doubles of {}", "its double", "x * 2", "number"),
    Map("times", "{} multiplied by {j}", "its product with {j}", "x * {j}", "number"),
    Map("plus", "{} plus {j}", "its sum with {j}", "x + {j}", "number"),
    Map("minus", "{} minus {j}", "itself minus {j}", "x - {j}", "number"),
    Map(
        "modulo", "the remainders modulo {d} of {}", "its remainder modulo {d}", "x % {d}", "number"
    ),
    Map("half", "the halves, rounded down, of {}", "its half, rounded down", "x // 2", "number"),
    Map("text", "the decimal strings of {}", "its decimal string", "str(x)", "text"),
)
SIGNED_MAPS = (
    Map("negated", "the negatives of {}", "its negative", "-x", "number"),
    Map("absolute", "the absolute values of {}", "its absolute value", "abs(x)", "number"),
)
WORD_FILTERS = (
    Filter("longer", "", "that are longer than {n} letters", "len(w) > {n}"),
    Filter("shorter", "", "that are shorter than {n} letters", "len(w) < {n}"),
    Filter("length", "", "that have exactly {n} letters", "len(w) == {n}"),
    Filter("starts", "", "that start with '{a}'", "w.startswith('{a}')"),
    Filter("ends", "", "that end with '{a}'", "w.endswith('{a}')"),
    Filter("contains", "", "that contain '{a}'", "'{a}' in w"),
    Filter("lacks", "", "that do not contain '{a}'", "'{a}' not in w"),
    Filter("upper", "upper-case", "that are in upper case", "w.isupper()"),
    Filter("lower", "lower-case", "that are in lower case", "w.islower()"),
    Filter("digits", "numeric", "that are made of digits", "w.isdigit()"),
    Filter("palindrome", "palindromic", "that are palindromes", "w == w[::-1]"),
)
WORD_MAPS = (
    _plain("text", "w"),
    Map("length", "the lengths of {}", "its length", "len(w)", "number"),
    Map("upper", "{} in upper case", "its upper-case form", "w.upper()", "text"),
    Map("lower", "{} in lower case", "its lower-case form", "w.lower()", "text"),
    Map("capital", "{} capitalized", "its capitalized form", "w.capitalize()", "text"),
    Map("reverse", "{} reversed", "its reverse", "w[::-1]", "text"),
    Map("first", "the first letters of {}", "its first letter", "w[0]", "text"),
    Map("last", "the last letters of {}", "its last letter", "w[-1]", "text"),
    Map("prefix", "the first {n} letters of {}", "its first {n} letters", "w[:{n}]", "text"),
    Map("twice", "{} repeated twice", "itself repeated twice", "w * 2", "text"),
)
CHAR_FILTERS = (
    Filter("vowel", "", "that are vowels", "c.lower() in 'aeiou'"),
    Filter("letter", "", "that are letters", "c.isalpha()"),
    Filter("digit", "", "that are digits", "c.isdigit()"),
    Filter("upper", "upper-case", "that are in upper case", "c.isupper()"),
    Filter("lower", "lower-case", "that are in lower case", "c.islower()"),
    Filter("not space", "", "that are not spaces", "c != ' '"),
    Filter("not", "", "that are not equal to '{a}'", "c != '{a}'"),
    Filter("after", "", "that come after '{a}' in the alphabet", "c > '{a}'"),
)
CHAR_MAPS = (
    _plain("text", "c"),
    Map("upper", "{} in upper case", "its upper-case form", "c.upper()", "text"),
    Map("lower", "{} in lower case", "its lower-case form", "c.lower()", "text"),
    Map("swap", "{} with the case swapped", "its case-swapped form", "c.swapcase()", "text"),
    Map("twice", "{} repeated twice", "itself repeated twice", "c * 2", "text"),
    Map("code", "the character codes of {}", "its character code", "ord(c)", "number"),
)
ENTRY_FILTERS = (
    Filter("above", "", "whose value is greater than {k}", "v > {k}"),
    Filter("below", "", "whose value is less than {k}", "v < {k}"),
    Filter("at least", "", "whose value is at least {k}", "v >= {k}"),
    Filter("even", "", "whose value is even", "v % 2 == 0"),
    Filter("odd", "", "whose value is odd", "v % 2 != 0"),
    Filter("multiple", "", "whose value is divisible by {d}", "v % {d} == 0"),
    Filter("starts", "", "whose key starts with '{a}'", "k.startswith('{a}')"),
    Filter("contains", "", "whose key contains '{a}'", "'{a}' in k"),
    Filter("longer", "", "whose key is longer than {n} letters", "len(k) > {n}"),
)
ENTRY_MAPS = (
    Map("pair", "the (key, value) pairs of {}", "itself", "(k, v)", "pair"),
    Map("key", "the keys of {}", "its key", "k", "text"),
    Map("value", "the values of {}", "its value", "v", "number"),
    Map("upper key", "the upper-case keys of {}", "its upper-case key", "k.upper()", "text"),
    Map("key length", "the key lengths of {}", "the length of its key", "len(k)", "number"),
    Map("square", "the squared values of {}", "its squared value", "v * v", "number"),
    Map("double", "the doubled values of {}", "its doubled value", "v * 2", "number"),
    Map("plus", "the values plus {j} of {}", "its value plus {j}", "v + {j}", "number"),
)

POOL = (
    "apple Anna level radar code data Rome stone eagle table NASA UNESCO 42 2024 noon sea desk"
    " cat dog Tree easel bread salt cabinet dance else area sad test about deed Bob abcde tent"
    " 7 see candle EU seed"
).split()


def _numbers(rng: random.Random, slots: dict[str, Any]) -> list[int]:
    edge = [slots[name] + by for name in ("k", "m", "d") for by in (-1, 0, 1)]
    drawn = [rng.randint(-30, 40) for _ in range(rng.randint(3, 6))]
    return rng.sample(drawn + rng.sample(edge, 4) + drawn[:1], k=len(drawn) + 5)


def _words(rng: random.Random, slots: dict[str, Any]) -> list[str]:
    a = slots["a"]
    words = [*rng.sample(POOL, rng.randint(5, 9)), a + "nt", "rh" + a, "m" + a + "th"]
    words.append("planetary"[: slots["n"]])
    return rng.sample(words + words[:1], k=len(words) + 1)


def _text(rng: random.Random, slots: dict[str, Any]) -> str:
    return " ".join(_words(rng, slots))


def _characters(rng: random.Random, slots: dict[str, Any]) -> str:
    drawn = rng.choices(string.ascii_letters + string.digits + "aeiou   ", k=rng.randint(8, 14))
    return "".join(rng.sample([*drawn, slots["a"], slots["a"].upper()], k=len(drawn) + 2))


def _entries(rng: random.Random, slots: dict[str, Any]) -> dict[str, int]:
    return dict(zip(dict.fromkeys(_words(rng, slots)), _numbers(rng, slots), strict=False))


SOURCES = (
    Source("list", 30, ("xs", "nums", "numbers", "values"), "numbers", "in {p}", "x", "{p}", "x",
           NUMBER_FILTERS + SIGNED_FILTERS, NUMBER_MAPS + SIGNED_MAPS, _numbers, ([], [0], [5, 5])),
    Source("range", 10, ("n", "limit", "end"), "numbers", "from 1 to {p}", "x",
           "range(1, {p} + 1)", "x", NUMBER_FILTERS, NUMBER_MAPS,
           lambda rng, slots: rng.randint(2, 45), (0, 1, 10)),
    Source("digits", 10, ("n", "number", "num"), "digits", "of {p}", "x", "map(int, str({p}))",
           "x", NUMBER_FILTERS, NUMBER_MAPS, lambda rng, slots: rng.randint(10, 10**9), (0, 7)),
    Source("words", 15, ("words", "names", "items"), "words", "in {p}", "w", "{p}", "w",
           WORD_FILTERS, WORD_MAPS, _words, ([], ["a"])),
    Source("text", 12, ("text", "s", "sentence"), "words", "of {p}", "w", "{p}.split()", "w",
           WORD_FILTERS, WORD_MAPS, _text, ("", "a")),
    Source("characters", 12, ("text", "s", "string"), "characters", "of {p}", "c", "{p}", "c",
           CHAR_FILTERS, CHAR_MAPS, _characters, ("", "a")),
    Source("dict", 12, ("d", "data", "scores"), "entries", "of the dict {p}", "k, v",
           "{p}.items()", "(k, v)", ENTRY_FILTERS, ENTRY_MAPS, _entries, ({}, {"a": 1})),
)  # fmt: skip

# Reducer: what it says, what its body is, which element types it takes. `{M}` is what the map
# makes of the kept elements, `{N}` the kept elements; `{gen}` is the comprehension's inside.
ANY = ("number", "text", "pair")
REDUCERS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "sum": (("Return the sum of {M}.", "Add up {M}."), "return sum({gen})", ("number",)),
    "list": (("Return a list of {M}.", "Collect {M} in a list."), "return [{gen}]", ANY),
    "ascending": (
        ("Return {M}, sorted in ascending order.", "Return a sorted list of {M}."),
        "return sorted({gen})",
        ANY,
    ),
    "descending": (
        ("Return {M}, sorted in descending order.",),
        "return sorted(({gen}), reverse=True)",
        ANY,
    ),
    "largest": (
        ("Return the largest of {M}, or 0 if there are none.",),
        "return max(({gen}), default=0)",
        ("number",),
    ),
    "smallest": (
        ("Return the smallest of {M}, or 0 if there are none.",),
        "return min(({gen}), default=0)",
        ("number",),
    ),
    "first": (
        ("Return the first of {M}, or None if there are none.",),
        "return next(({gen}), None)",
        ANY,
    ),
    "distinct": (
        ("Return the number of different values among {M}.",),
        "return len({{{gen}}})",
        ANY,
    ),
    "unique": (
        ("Return the different values among {M}, sorted in ascending order.",),
        "return sorted({{{gen}}})",
        ANY,
    ),
    "product": (
        ("Return the product of {M}.", "Multiply {M} together."),
        "result = 1\nfor {loop} in {over}:\n{if}result *= {map}\nreturn result",
        ("number",),
    ),
    "average": (
        ("Return the average of {M}, or 0 if there are none.",),
        "kept = [{gen}]\nreturn sum(kept) / len(kept) if kept else 0",
        ("number",),
    ),
    "counts": (
        ("Return a dict that counts how often each value occurs among {M}.",),
        "counts = {{}}\nfor {loop} in {over}:\n{if}counts[{map}] = counts.get({map}, 0) + 1\n"
        "return counts",
        ANY,
    ),
    "join": (
        ("Return {M}, joined with '{g}'.", "Join {M} with '{g}'."),
        "return '{g}'.join({gen})",
        ("text",),
    ),
    "concatenate": (
        ("Return {M} as one string.",),
        "return ''.join({gen})",
        ("text",),
    ),
    "longest": (
        ("Return the longest of {M}, or '' if there are none.",),
        "return max(({gen}), key=len, default='')",
        ("text",),
    ),
}
# These look at the kept elements themselves, not at what a map makes of them.
KEEPERS: dict[str, tuple[tuple[str, ...], str]] = {
    "count": (
        ("Count {N}.", "Return the number of {N}."),
        "return sum(1 for {loop} in {over}{cond})",
    ),
    "any": (
        ("Return True if there are any {N}, else False.",),
        "return any({test} for {loop} in {over})",
    ),
    "all": (
        ("Return True if all {all} {are}, else False.",),
        "return all({test} for {loop} in {over})",
    ),
    "positions": (
        ("Return the positions, counted from 0, of {N}.",),
        "return [i for i, {element} in enumerate({over}){cond}]",
    ),
}
# These need the element and what the map makes of it.
PAIRERS: dict[str, tuple[tuple[str, ...], str]] = {
    "dict": (
        ("Return a dict that maps each of {N} to {one}.",),
        "return {{{element}: {map} for {loop} in {over}{cond}}}",
    ),
    "groups": (
        ("Group {N} by {one} in a dict of lists.",),
        "groups = {{}}\nfor {loop} in {over}:\n{if}groups.setdefault({map}, []).append({element})\n"
        "return groups",
    ),
    "sorted by": (
        ("Return a list of {N}, sorted by {one}.",),
        "return sorted([{element} for {loop} in {over}{cond}], key=lambda {key}: {map})",
    ),
}
NAMES = ("f", "solve", "compute", "process", "answer", "run", "calculate", "transform", "result")


@dataclass(frozen=True)
class Plan:
    """One combination, with its constants filled in."""

    source: Source
    filter: Filter | None
    map: Map
    reducer: str
    slots: dict[str, Any]

    @property
    def key(self) -> str:
        kept = self.filter.name if self.filter else ""
        return f"{self.source.name}|{kept}|{self.map.name}|{self.reducer}"

    @property
    def split(self) -> Split:
        bucket = zlib.crc32(self.key.encode()) % 10
        return "test" if bucket == 0 else "validation" if bucket == 1 else "train"

    def template(self) -> tuple[tuple[str, ...], str]:
        for table in (KEEPERS, PAIRERS):
            if self.reducer in table:
                return table[self.reducer]
        return REDUCERS[self.reducer][:2]

    def docstring(self, rng: random.Random) -> str:
        """What the function does, in one of several phrasings."""
        s, slots = self.source, self.slots
        place = s.place.format(**slots)
        everything = f"the {s.noun} {place}"
        kept, are = everything, ""
        if self.filter:
            clause = self.filter.clause.format(**slots)
            are = clause.removeprefix("that ").replace("whose", "have a")
            are = are.replace(" value ", " value that ").replace(" key ", " key that ")
            if self.filter.adjective and rng.random() < 0.6:
                kept = f"the {self.filter.adjective} {s.noun} {place}"
            else:
                kept = f"{everything} {clause}"
        words = rng.choice(self.template()[0])
        if self.reducer == "any":
            kept = kept.removeprefix("the ")
        many = self.map.many.replace("{}", "\0").format(**slots).replace("\0", kept)
        one = self.map.one.format(**slots)
        return words.format(**slots, M=many, N=kept, all=everything, are=are, one=one)

    def body(self) -> str:
        """The function's body, not indented."""
        s, slots = self.source, self.slots
        over, mapped = s.over.format(**slots), self.map.code.format(**slots)
        test = self.filter.test.format(**slots) if self.filter else ""
        cond = f" if {test}" if test else ""
        gen = f"{mapped} for {s.loop} in {over}{cond}"
        return self.template()[1].format(
            **slots,
            **{"if": f"    if {test}:\n        " if test else "    "},
            gen=gen,
            map=mapped,
            loop=s.loop,
            over=over,
            cond=cond,
            test=test,
            element=s.element,
            key=s.loop,
        )

    def code(self) -> str:
        lines = "\n".join(f"    {line}" for line in self.body().split("\n"))
        return f"def {self.slots['f']}({self.slots['p']}):\n{lines}"


def draw_plan(rng: random.Random) -> Plan | None:
    """A random combination, or None where the draw is one that makes no sense."""
    source = rng.choices(SOURCES, [s.weight for s in SOURCES])[0]
    group = rng.choices((REDUCERS, KEEPERS, PAIRERS), (70, 14, 16))[0]
    reducer = rng.choice(list(group))
    kept = rng.choice(source.filters) if rng.random() < 0.8 or group is KEEPERS else None
    mapped = rng.choice(source.maps)
    if group is KEEPERS or (rng.random() < 0.3 and group is REDUCERS):
        mapped = source.maps[0]
    if group is REDUCERS and mapped.gives not in REDUCERS[reducer][2]:
        return None
    if group is PAIRERS and (mapped.one.startswith("itself") or source.name == "dict"):
        return None
    if kept is None and mapped is source.maps[0]:
        return None
    if source.name == "dict" and (reducer, mapped.name) == ("counts", "pair"):
        return None
    if source.name == "dict" and reducer == "positions":
        return None
    low, high = {"digits": (1, 8), "range": (2, 20)}.get(source.name, (-9, 20))
    slots: dict[str, Any] = {
        "p": rng.choice(source.parameters),
        "f": rng.choice(NAMES),
        "k": rng.randint(low, high),
        "m": rng.randint(high + 1, high + 15),
        "d": rng.randint(3, 9),
        "j": rng.randint(2, 12),
        "n": rng.randint(2, 6),
        "a": rng.choice("abcdehlnorst"),
        "g": rng.choice(["-", ",", "+", "/", "_", ":"]),
    }
    return Plan(source, kept, mapped, reducer, slots)


def outcome(code: str, name: str, argument: Any) -> Any:
    """What a reference gives for an argument."""
    space: dict[str, Any] = {}
    exec(code, space)  # noqa: S102 - only ever our own reference
    return space[name](argument)


def tests_of(plan: Plan, rng: random.Random) -> tuple[str, ...] | None:
    """Asserts that the reference passes, or None where they could not tell filter or map apart."""
    name, code = plan.slots["f"], plan.code()
    arguments = list(plan.source.edges)
    arguments += [plan.source.argument(rng, plan.slots) for _ in range(6)]
    wanted = [outcome(code, name, argument) for argument in arguments]
    simpler = [Plan(plan.source, None, plan.map, plan.reducer, plan.slots)]
    if plan.reducer in KEEPERS:
        simpler = []
    elif plan.map.name not in ("", "pair") and plan.reducer in REDUCERS:
        plainest = Plan(plan.source, plan.filter, plan.source.maps[0], plan.reducer, plan.slots)
        if plan.source.maps[0].gives in REDUCERS[plan.reducer][2]:
            simpler.append(plainest)
    for other in simpler:
        if other.body() == plan.body():
            continue
        if [outcome(other.code(), name, argument) for argument in arguments] == wanted:
            return None
    if len({repr(value) for value in wanted}) < (2 if plan.reducer in ("any", "all") else 3):
        return None
    pairs = zip(arguments, wanted, strict=True)
    return tuple(f"assert {name}({argument!r}) == {value!r}" for argument, value in pairs)


def prompt_of(signature: str, docstring: str) -> str:
    return (
        "Complete this Python function. Reply with the whole function only.\n\n"
        f'{signature}\n    """{docstring}"""'
    )


def items(split: Split, n: int, seed: int) -> list[Item]:
    """`n` items of combinations that belong to the split; TooFewItems beyond what exists."""
    rng = random.Random(f"code {split} {seed}")

    def draw() -> list[Item]:
        plan = draw_plan(rng)
        if plan is None or plan.split != split:
            return []
        tests = tests_of(plan, rng)
        if tests is None:
            return []
        code = plan.code()
        prompt = prompt_of(code.split("\n", 1)[0], plan.docstring(rng))
        return [Item(prompt, code, tests, f"{plan.source.name} {plan.reducer}")]

    return distinct_items(draw, n)


def check(item: Item, reply: str) -> bool:
    """Whether the reply defines a function that passes every assert of the item.

    It runs in a process of its own: 2 s of CPU, 512 MiB, no file to write, no process to start.
    """
    word = secrets.token_hex(8)
    task = json.dumps({"code": unfenced(reply), "tests": item.tests, "word": word})
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(  # noqa: S603 - running it, within limits, is the point
            [sys.executable, "-I", "-S", "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(task.encode(), timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode == 0 and output.decode(errors="replace").endswith(word)


TASK = Task(
    name="code",
    checked_by="its unit tests, in a limited process",
    max_tokens=160,
    items=items,
    check=check,
)
