"""Schema and question to SQL; a reply is right when its rows are those of the reference query."""

# ruff: noqa: S311, S608, SIM905 - randomness is seeded; writing SQL is the task; as one text, a
# word list reads best
from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapters.demo.sql_domains import DOMAINS
from adapters.demo.task import Item, Split, Task, distinct_items, unfenced

PEOPLE = (
    "Ada Alan Amir Anna Boris Bruno Carla Chen Clara Dana David Diego Elena Emma Eric Fatima Felix"
    " Frida George Greta Hana Hugo Ines Ivan Jana Jonas Julia Karim Kate Kofi Lara Leo Lina Luca"
    " Maria Marco Mina Nadia Nils Nora Oscar Olga Paula Pedro Petra Quinn Rosa Ravi Rita Sam Sara"
    " Sven Tara Tom Uma Vera Victor Wanda Xena Yara Yusuf Zoe Omar Ruth Ingrid Milo Tessa Arun"
).split()
CITIES = (
    "Rome Oslo Paris Lima Cairo Delhi Tokyo Quito Dublin Boston Madrid Lagos Milan Seoul Perth"
    " Vienna Prague Austin Geneva Havana Lisbon Nairobi Athens Denver"
).split()
COUNTRIES = (
    "Spain Peru Japan Kenya India Chile Norway Canada Egypt Italy Ghana Poland Brazil France"
    " Greece Mexico Sweden Turkey Nepal Cuba Iran Mali Fiji Oman Qatar Laos Chad Togo Malta Iraq"
).split()
FIRST = "Silent Golden Broken Hidden Northern Crystal Silver Wild Distant Amber Iron Velvet".split()
SECOND = "River Garden Crown Harbor Signal Forest Mirror Anchor Summit Lantern Meadow Arrow".split()
THINGS = "lamp chair melon ladder kettle basket hammer ribbon pillow bucket candle mango".split()
SHADES = "small large round plain heavy light striped smooth".split()
NAME_POOLS = {
    "@person": PEOPLE,
    "@city": CITIES,
    "@country": COUNTRIES,
    "@title": [f"{a} {b}" for a in FIRST for b in SECOND],
    "@thing": [f"{a} {b}" for a in SHADES for b in THINGS],
}
PARENT_ROWS, CHILD_ROWS = 22, 48
DATABASES_PER_ITEM = 2
QUESTIONS_PER_SCHEMA = {"train": 6, "validation": 2, "test": 1}
MAX_SECONDS = 2.0
MAX_ROWS = 10_000


@dataclass(frozen=True)
class Column:
    """A column and what its cells may hold: a pool of texts, or whole numbers low..high."""

    name: str
    texts: tuple[str, ...] = ()
    low: int = 0
    high: int = 0
    is_name: bool = False

    @property
    def label(self) -> str:
        """The column's name as it is said in a question."""
        return self.name.replace("_", " ")

    @property
    def is_number(self) -> bool:
        return not self.texts

    @property
    def is_orderable(self) -> bool:
        """Whether every row gets a number of its own, so that a sorted answer has no ties."""
        return self.is_number and self.high - self.low >= CHILD_ROWS + 4

    def cells(self, rows: int, rng: random.Random) -> list[str | int]:
        """Random cells for a whole table; different from row to row where the pool allows."""
        pool: Sequence[str | int] = self.texts or range(self.low, self.high + 1)
        if (self.is_name or self.is_number) and len(pool) >= rows:
            return list(rng.sample(pool, rows))
        return [rng.choice(pool) for _ in range(rows)]


@dataclass(frozen=True)
class Table:
    """A table without its `id` and foreign key, which every table of a pair gets."""

    plural: str
    singular: str
    columns: tuple[Column, ...]

    @classmethod
    def parse(cls, line: str) -> Table:
        head, _, body = line.partition(":")
        plural, singular = head.split()
        columns = []
        for field in body.split(";"):
            name, _, values = field.strip().partition("=")
            low, dots, high = values.partition("..")
            if dots:
                columns.append(Column(name, low=int(low), high=int(high)))
            elif values in NAME_POOLS:
                unique = values not in ("@city", "@country") or name == "name"
                columns.append(Column(name, tuple(NAME_POOLS[values]), is_name=unique))
            else:
                columns.append(Column(name, tuple(values.split(","))))
        return cls(plural, singular, tuple(columns))

    def some_columns(self, rng: random.Random) -> Table:
        """The table with its first column and a random few of the others, in random order."""
        rest = rng.sample(self.columns[1:], rng.randint(2, len(self.columns) - 1))
        columns = [self.columns[0], *rest]
        if rng.random() < 0.3:
            rng.shuffle(columns)
        return Table(self.plural, self.singular, tuple(columns))

    def ddl(self, parent: Table | None) -> str:
        cells = ["id INTEGER"]
        if parent:
            cells.append(f"{parent.singular}_id INTEGER")
        cells += [f"{c.name} {'INTEGER' if c.is_number else 'TEXT'}" for c in self.columns]
        return f"CREATE TABLE {self.plural} ({', '.join(cells)})"

    def pick(self, rng: random.Random, fits: Callable[[Column], bool]) -> Column:
        """A random column that fits; raises IndexError where there is none."""
        return rng.choice([c for c in self.columns if fits(c)])


@dataclass(frozen=True)
class Condition:
    """A filter in words and in SQL, with a cell that lies exactly on its boundary."""

    words: str
    sql: str
    table: str
    column: str
    value: str | int


@dataclass(frozen=True)
class Question:
    """A question, its reference query, and the filters the data must be able to tell apart."""

    kind: str
    words: str
    sql: str
    conditions: tuple[Condition, ...] = ()


COMPARISONS = {
    ">": ("above {}", "greater than {}", "more than {}", "over {}"),
    "<": ("below {}", "less than {}", "under {}", "smaller than {}"),
    ">=": ("at least {}", "{} or more", "no less than {}"),
    "<=": ("at most {}", "{} or less", "no more than {}"),
}
AGGREGATES = {
    "AVG": ("average", "mean"),
    "SUM": ("total", "sum of"),
    "MIN": ("lowest", "smallest", "minimum"),
    "MAX": ("highest", "largest", "maximum"),
}


class Writer:
    """Draws questions about one table, or about a table and its parent."""

    def __init__(self, table: Table, parent: Table | None, rng: random.Random) -> None:
        self.table, self.parent, self.rng = table, parent, rng

    def condition(self, table: Table, prefix: str = "", avoid: str = "") -> Condition:
        """One random filter; column names get `prefix`, the column `avoid` is not used."""
        rng = self.rng
        column = table.pick(rng, lambda c: c.name != avoid)
        sql_name = prefix + column.name
        whose = f"whose {column.label} is"

        def done(words: str, sql: str, value: str | int) -> Condition:
            return Condition(words, sql, table.plural, column.name, value)

        if column.is_number:
            span = column.high - column.low
            value = rng.randint(column.low + span // 5, column.high - span // 5)
            if span > 40 and rng.random() < 0.5:
                step = 10 ** (len(str(value)) - 1) // 2 or 1
                value = max(column.low + 1, value // step * step)
            shape = rng.random()
            if shape < 0.15:
                end = rng.randint(value + 1, column.high)
                words = f"{whose} between {value} and {end}"
                return done(words, f"{sql_name} BETWEEN {value} AND {end}", value)
            if shape < 0.22 and span < 150:
                return done(f"{whose} {value}", f"{sql_name} = {value}", value)
            sign = rng.choice(list(COMPARISONS))
            phrase = rng.choice(COMPARISONS[sign]).format(value)
            start = rng.choice([whose, whose, f"with {column.label}", f"with a {column.label} of"])
            if start.endswith(" of") and not phrase[0].isdigit() and "at " not in phrase:
                start = whose
            return done(f"{start} {phrase}", f"{sql_name} {sign} {value}", value)
        text = rng.choice(column.texts)
        said = rng.choice([text, f"'{text}'"])
        if column.is_name and rng.random() < 0.8:
            shape = rng.randrange(3)
            if shape == 0:
                words = (
                    f"whose {column.label} starts with {rng.choice(['', 'the letter '])}{text[0]}"
                )
                return done(words, f"{sql_name} LIKE '{text[0]}%'", text)
            if shape == 1:
                words = f"whose {column.label} ends with '{text[-1]}'"
                return done(words, f"{sql_name} LIKE '%{text[-1]}'", text)
            at = rng.randrange(len(text.split()[-1]) - 1)
            bit = text.split()[-1].lower()[at : at + 2]
            return done(
                f"whose {column.label} contains '{bit}'", f"{sql_name} LIKE '%{bit}%'", text
            )
        shape = rng.randrange(8)
        if shape == 0:
            return done(f"{whose} not {said}", f"{sql_name} <> '{text}'", text)
        if shape == 1:
            other = rng.choice([t for t in column.texts if t != text])
            words = f"{whose} {text} or {other}"
            return done(words, f"{sql_name} IN ('{text}', '{other}')", text)
        words = rng.choice([f"{whose} {said}", f"with {column.label} {said}"])
        return done(words, f"{sql_name} = '{text}'", text)

    def where(self, always: bool = True) -> tuple[str, str, tuple[Condition, ...]]:
        """Words, SQL and conditions of a WHERE with two filters, one, or (not `always`) none."""
        if not always and self.rng.random() < 0.5:
            return "", "", ()
        first = self.condition(self.table)
        if self.rng.random() < 0.7:
            return f" {first.words}", f" WHERE {first.sql}", (first,)
        second = self.condition(self.table, avoid=first.column)
        words, sql = f" {first.words} and {second.words}", f" WHERE {first.sql} AND {second.sql}"
        return words, sql, (first, second)

    def shown(self, avoid: str = "") -> tuple[str, str]:
        """One or two columns to show: in words, in SQL."""
        columns = [c for c in self.table.columns if c.name != avoid]
        chosen = [columns[0] if self.rng.random() < 0.5 else self.rng.choice(columns)]
        if self.rng.random() < 0.35 and len(columns) > 1:
            chosen.append(self.rng.choice([c for c in columns if c is not chosen[0]]))
        return " and ".join(c.label for c in chosen), ", ".join(c.name for c in chosen)

    def list_rows(self) -> Question:
        says, cols = self.shown()
        words, sql, conditions = self.where()
        t = self.table
        asked = self.rng.choice(
            [
                f"List the {says} of all {t.plural}{words}.",
                f"Show the {says} of every {t.singular}{words}.",
                f"What is the {says} of each {t.singular}{words}?",
                f"Find the {says} of {t.plural}{words}.",
                f"Give me the {says} for {t.plural}{words}.",
            ]
        )
        return Question("list", asked, f"SELECT {cols} FROM {t.plural}{sql}", conditions)

    def count_rows(self) -> Question:
        words, sql, conditions = self.where()
        t = self.table
        asked = self.rng.choice(
            [
                f"How many {t.plural} are there{words}?",
                f"Count the {t.plural}{words}.",
                f"What is the number of {t.plural}{words}?",
                f"Find the number of {t.plural}{words}.",
            ]
        )
        return Question("count", asked, f"SELECT COUNT(*) FROM {t.plural}{sql}", conditions)

    def aggregate(self) -> Question:
        words, sql, conditions = self.where(always=False)
        t, column = self.table, self.table.pick(self.rng, lambda c: c.is_number)
        function = self.rng.choice(list(AGGREGATES))
        said = f"{self.rng.choice(AGGREGATES[function])} {column.label}"
        asked = self.rng.choice(
            [
                f"What is the {said} of {t.plural}{words}?",
                f"Find the {said} of all {t.plural}{words}.",
                f"Show the {said} among {t.plural}{words}.",
            ]
        )
        return Question(
            "aggregate", asked, f"SELECT {function}({column.name}) FROM {t.plural}{sql}", conditions
        )

    def top(self) -> Question:
        t, column = self.table, self.table.pick(self.rng, lambda c: c.is_orderable)
        says, cols = self.shown(avoid=column.name)
        down = self.rng.random() < 0.5
        most = self.rng.choice(["highest", "largest"] if down else ["lowest", "smallest"])
        if self.rng.random() < 0.5:
            k, asked = (
                1,
                self.rng.choice(
                    [
                        f"What is the {says} of the {t.singular} with the {most} {column.label}?",
                        f"Which {t.singular} has the {most} {column.label}? Give its {says}.",
                    ]
                ),
            )
        else:
            k = self.rng.randint(2, 9)
            asked = self.rng.choice(
                [
                    f"List the {says} of the {k} {t.plural} with the {most} {column.label},"
                    f" {most} first.",
                    f"Show the {says} of the top {k} {t.plural} by {most} {column.label}.",
                ]
            )
        order = f" ORDER BY {column.name}{' DESC' if down else ''} LIMIT {k}"
        return Question("top", asked, f"SELECT {cols} FROM {t.plural}{order}")

    def in_order(self) -> Question:
        t, column = self.table, self.table.pick(self.rng, lambda c: c.is_orderable)
        says, cols = self.shown()
        words, sql, conditions = self.where(always=False)
        down = self.rng.random() < 0.5
        way = self.rng.choice(
            [
                f"by {column.label} in {'de' if down else 'a'}scending order",
                f"from {'highest to lowest' if down else 'lowest to highest'} {column.label}",
            ]
        )
        asked = self.rng.choice(
            [
                f"List the {says} of all {t.plural}{words}, sorted {way}.",
                f"Show the {says} of {t.plural}{words}, ordered {way}.",
            ]
        )
        order = f" ORDER BY {column.name}{' DESC' if down else ''}"
        return Question("order", asked, f"SELECT {cols} FROM {t.plural}{sql}{order}", conditions)

    def distinct(self) -> Question:
        t, column = self.table, self.table.pick(self.rng, lambda c: bool(c.texts) and not c.is_name)
        if self.rng.random() < 0.5:
            asked = self.rng.choice(
                [
                    f"List the different {column.label} values of the {t.plural}.",
                    f"What distinct {column.label} values do the {t.plural} have?",
                ]
            )
            return Question("distinct", asked, f"SELECT DISTINCT {column.name} FROM {t.plural}")
        asked = self.rng.choice(
            [
                f"How many different {column.label} values do the {t.plural} have?",
                f"Count the distinct {column.label} values of the {t.plural}.",
            ]
        )
        return Question("distinct", asked, f"SELECT COUNT(DISTINCT {column.name}) FROM {t.plural}")

    def group(self) -> Question:
        t, column = self.table, self.table.pick(self.rng, lambda c: bool(c.texts) and not c.is_name)
        each = self.rng.choice([f"For each {column.label}, show", f"Per {column.label}, give"])
        if self.rng.random() < 0.5:
            says = f"the {column.label} and the number of {t.plural}"
            cols = f"{column.name}, COUNT(*)"
        else:
            number = t.pick(self.rng, lambda c: c.is_number)
            function = self.rng.choice(list(AGGREGATES))
            said = f"{self.rng.choice(AGGREGATES[function])} {number.label}"
            says = f"the {column.label} and the {said} of its {t.plural}"
            cols = f"{column.name}, {function}({number.name})"
        sql = f"SELECT {cols} FROM {t.plural} GROUP BY {column.name}"
        return Question("group", f"{each} {says}.", sql)

    def having(self) -> Question:
        t, column = self.table, self.table.pick(self.rng, lambda c: bool(c.texts) and not c.is_name)
        sign = self.rng.choice([">", ">=", "<"])
        k = self.rng.randint(2, 14)
        said = {">": f"more than {k}", ">=": f"at least {k}", "<": f"fewer than {k}"}[sign]
        asked = self.rng.choice(
            [
                f"Which {column.label} values have {said} {t.plural}?",
                f"List every {column.label} that has {said} {t.plural}.",
            ]
        )
        sql = f"SELECT {column.name} FROM {t.plural} GROUP BY {column.name}"
        sql += f" HAVING COUNT(*) {sign} {k}"
        return Question("having", asked, sql)

    def beyond_average(self) -> Question:
        t, column = self.table, self.table.pick(self.rng, lambda c: c.is_number)
        says, cols = self.shown()
        sign, side = self.rng.choice([(">", "above"), ("<", "below")])
        asked = self.rng.choice(
            [
                f"List the {says} of {t.plural} whose {column.label} is {side} the average"
                f" {column.label}.",
                f"Show the {says} of all {t.plural} with {side}-average {column.label}.",
            ]
        )
        inner = f"(SELECT AVG({column.name}) FROM {t.plural})"
        return Question(
            "average", asked, f"SELECT {cols} FROM {t.plural} WHERE {column.name} {sign} {inner}"
        )

    def join(self) -> Question:
        parent, t, rng = self.parent, self.table, self.rng
        if parent is None:
            raise IndexError("a join needs two tables")
        joined = (
            f"{t.plural} JOIN {parent.plural}"
            f" ON {t.plural}.{parent.singular}_id = {parent.plural}.id"
        )
        shown = t.columns[0] if rng.random() < 0.5 else rng.choice(t.columns)
        cell = f"{t.plural}.{shown.name}"
        title = parent.columns[0] if parent.columns[0].is_name else None
        number = t.pick(rng, lambda c: c.is_number)
        shape = rng.randrange(7)
        if shape in (0, 1, 2):
            condition = self.condition(parent, prefix=f"{parent.plural}.")
            belong = f"{parent.plural} {condition.words}"
            where = f"FROM {joined} WHERE {condition.sql}"
            if shape == 0:
                asked = rng.choice(
                    [
                        f"List the {shown.label} of {t.plural} that belong to {belong}.",
                        f"Show the {shown.label} of all {t.plural} of {belong}.",
                    ]
                )
                return Question("join list", asked, f"SELECT {cell} {where}", (condition,))
            if shape == 1:
                asked = rng.choice(
                    [
                        f"How many {t.plural} belong to {belong}?",
                        f"Count the {t.plural} of {belong}.",
                    ]
                )
                return Question("join count", asked, f"SELECT COUNT(*) {where}", (condition,))
            function = rng.choice(["AVG", "SUM", "MAX", "MIN"])
            said = f"{rng.choice(AGGREGATES[function])} {number.label}"
            return Question(
                "join aggregate",
                f"What is the {said} of {t.plural} that belong to {belong}?",
                f"SELECT {function}({t.plural}.{number.name}) {where}",
                (condition,),
            )
        if shape == 3:
            condition = self.condition(t, prefix=f"{t.plural}.")
            asked_column = rng.choice(parent.columns)
            asked = (
                f"List the different {asked_column.label} values of {parent.plural} that have"
                f" {t.plural} {condition.words}."
            )
            name = f"{parent.plural}.{asked_column.name}"
            sql = f"SELECT DISTINCT {name} FROM {joined} WHERE {condition.sql}"
            return Question("join distinct", asked, sql, (condition,))
        if title is None:
            raise IndexError("no column names the parent")
        name = f"{parent.plural}.{title.name}"
        if shape == 4:
            asked = rng.choice(
                [
                    f"Show the {shown.label} of every {t.singular} together with the"
                    f" {title.label} of its {parent.singular}.",
                    f"For each {t.singular}, list its {shown.label} and the {title.label} of its"
                    f" {parent.singular}.",
                ]
            )
            return Question("join pair", asked, f"SELECT {cell}, {name} FROM {joined}")
        if shape == 5:
            asked = rng.choice(
                [
                    f"For each {parent.singular}, show its {title.label} and the number of its"
                    f" {t.plural}.",
                    f"How many {t.plural} does each {parent.singular} have? Show its"
                    f" {title.label} and the count.",
                ]
            )
            sql = f"SELECT {name}, COUNT(*) FROM {joined} GROUP BY {parent.plural}.id"
            return Question("join group", asked, sql)
        function = rng.choice(["AVG", "SUM", "MAX"])
        said = f"{rng.choice(AGGREGATES[function])} {number.label}"
        asked = (
            f"For each {parent.singular}, show its {title.label} and the {said} of its {t.plural}."
        )
        cols = f"{name}, {function}({t.plural}.{number.name})"
        return Question(
            "join group", asked, f"SELECT {cols} FROM {joined} GROUP BY {parent.plural}.id"
        )

    def question(self) -> Question:
        """A random question; raises IndexError where the tables lack the column it needs."""
        if self.parent is not None and self.rng.random() < 0.6:
            return self.join()
        kinds = [self.list_rows, self.count_rows, self.aggregate, self.top, self.in_order]
        more = [self.distinct, self.group, self.having, self.beyond_average]
        return self.rng.choice([*kinds, *kinds, *more])()


def filled(
    table: Table,
    parent: Table | None,
    conditions: tuple[Condition, ...],
    rows: int,
    rng: random.Random,
) -> str:
    """SQL that creates and fills a table; each condition's boundary value is in some row."""
    cells: dict[str, list[str | int]] = {"id": list(range(1, rows + 1))}
    if parent:
        # Every parent has a child, so that JOIN and LEFT JOIN are both right.
        keys = [*range(1, PARENT_ROWS + 1), *rng.choices(range(1, PARENT_ROWS + 1), k=rows)]
        cells[f"{parent.singular}_id"] = list(rng.sample(keys[:rows], rows))
    for column in table.columns:
        cells[column.name] = column.cells(rows, rng)
    for condition in conditions:
        column_cells = cells.get(condition.column, [])
        if condition.table == table.plural and condition.value not in column_cells:
            column_cells[rng.randrange(rows)] = condition.value
    lines = [f"({', '.join(map(repr, row))})" for row in zip(*cells.values(), strict=True)]
    values = ",\n".join(lines)
    return f"{table.ddl(parent)};\nINSERT INTO {table.plural} VALUES\n{values};"


def databases(
    tables: list[Table], conditions: tuple[Condition, ...], rng: random.Random
) -> tuple[str, ...]:
    """SQL scripts of the databases a query about the tables (parent first) is tried on."""
    scripts = []
    for _ in range(DATABASES_PER_ITEM):
        parts = [filled(tables[0], None, conditions, PARENT_ROWS, rng)] if len(tables) == 2 else []
        parent = tables[0] if len(tables) == 2 else None
        parts.append(filled(tables[-1], parent, conditions, CHILD_ROWS, rng))
        scripts.append("\n".join(parts))
    return tuple(scripts)


def prompt_of(tables: list[Table], question: str) -> str:
    parent = tables[0] if len(tables) == 2 else None
    schema = [parent.ddl(None)] if parent else []
    schema.append(tables[-1].ddl(parent))
    return (
        "Write one SQLite query that answers the question. Reply with the query only.\n\n"
        + "\n".join(schema)
        + f"\n\nQuestion: {question}"
    )


def items(split: Split, n: int, seed: int) -> list[Item]:
    """`n` items about the split's own tables; raises TooFewItems beyond what exists."""
    rng = random.Random(f"sql {split} {seed}")
    pairs = [(Table.parse(a), Table.parse(b)) for a, b in DOMAINS[split]]

    def draw() -> list[Item]:
        parent, child = (table.some_columns(rng) for table in rng.choice(pairs))
        tables = [parent, child] if rng.random() < 0.5 else [rng.choice([parent, child])]
        writer = Writer(tables[-1], parent if len(tables) == 2 else None, rng)
        drawn: list[Item] = []
        for _ in range(QUESTIONS_PER_SCHEMA[split]):
            try:
                asked = writer.question()
            except IndexError:
                continue
            tests = databases(tables, asked.conditions, rng)
            if all(tells_apart(script, asked) for script in tests):
                drawn.append(Item(prompt_of(tables, asked.words), asked.sql, tests, asked.kind))
        return drawn

    return distinct_items(draw, n)


def tells_apart(script: str, asked: Question) -> bool:
    """Whether the reference finds something there, and each of its filters matters."""
    rows = rows_of(script, asked.sql)
    if not rows or rows in ([(None,)], [(0,)]):
        return False
    for condition in asked.conditions:
        if rows == rows_of(script, asked.sql.replace(condition.sql, "1")):
            return False
    return True


class _Refused(Exception):
    """A query that may not run, ran too long or returned too much."""


def rows_of(script: str, query: str) -> list[tuple[object, ...]]:
    """Runs `query`, read-only, on a database made by `script`; raises on anything wrong with it."""
    deadline = time.monotonic() + MAX_SECONDS
    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
    allowed.add(sqlite3.SQLITE_RECURSIVE)

    def authorize(action: int, *_: object) -> int:
        return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY

    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(script)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
        connection.set_authorizer(authorize)
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        rows = connection.execute(query).fetchmany(MAX_ROWS + 1)
        if len(rows) > MAX_ROWS:
            raise _Refused(f"more than {MAX_ROWS} rows")
        return rows
    finally:
        connection.close()


def _comparable(row: tuple[object, ...]) -> tuple[str, ...]:
    """A row as texts, with numbers rounded so that the order of a sum does not matter."""
    return tuple(
        f"{cell:.6g}"
        if isinstance(cell, float) and not cell.is_integer()
        else f"{int(cell)}"
        if isinstance(cell, int | float)
        else repr(cell)
        for cell in row
    )


def check(item: Item, reply: str) -> bool:
    """Whether the reply's query gives the reference's rows on every database of the item.

    Columns count in their order; rows in theirs only where the reference has ORDER BY.
    """
    query = unfenced(reply).strip().rstrip(";").strip()
    for script in item.tests:
        wanted = [_comparable(row) for row in rows_of(script, item.answer)]
        try:
            found = [_comparable(row) for row in rows_of(script, query)]
        except (sqlite3.Error, sqlite3.Warning, _Refused, ValueError, OverflowError):
            return False
        if "ORDER BY" not in item.answer:
            wanted.sort()
            found.sort()
        if wanted != found:
            return False
    return True


TASK = Task(
    name="sql",
    checked_by="its rows, on two SQLite databases",
    max_tokens=120,
    items=items,
    check=check,
)
