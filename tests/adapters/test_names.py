from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import AdapterError, InvalidName, InvalidReference, ReservedName
from adapters.names import Reference, check_alias, check_name

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,127}", fullmatch=True).filter(lambda n: ".." not in n)
aliases = names.filter(lambda n: not n.isdigit())
selectors = st.one_of(
    st.just({}),
    st.builds(lambda n: {"version": n}, st.integers(1, 999_999_999)),
    st.builds(lambda a: {"alias": a}, aliases),
    st.builds(lambda b: {"digest": f"sha256:{b.hex()}"}, st.binary(min_size=32, max_size=32)),
)


@given(names, selectors)
def test_a_reference_reads_back_as_it_is_written(name, selector):
    reference = Reference(name, **selector)
    assert Reference.parse(str(reference)) == reference


@given(st.text())
def test_any_text_is_a_reference_or_refused_as_one(text):
    try:
        assert str(Reference.parse(text)) == text
    except InvalidReference as error:
        error.message.encode()


@pytest.mark.parametrize(
    "text",
    [
        "", "@", "sql@", "@3", "SQL", "a/b", "a..b", ".a", "-a", "a" * 129, "sql@0", "sql@03",
        "sql@1234567890", "sql@3@4", "sql@sha256:ab12", "sql@SHA256:" + "a" * 64, "sql@a/b",
        "sql\n", "sql@prod\n", "sqĺ", "sql@٣",
    ],
)  # fmt: skip
def test_refused_references(text):
    with pytest.raises(InvalidReference):
        Reference.parse(text)


def test_names_and_aliases():
    assert check_name("team-a.sql_2") == "team-a.sql_2"
    assert check_name("7") == "7"
    assert check_alias("v7") == "v7"
    for bad in ("", "A", "a b", "../x", "x..y", "a" * 129, "a@b"):
        with pytest.raises(InvalidName) as refused:
            check_name(bad)
        assert refused.value.param == "name"
    for bad in ("7", "sha256:x", "Prod"):
        with pytest.raises(InvalidName) as refused:
            check_alias(bad)
        assert refused.value.param == "alias"
    with pytest.raises(ReservedName):
        check_alias("latest")


def test_every_error_has_its_own_code():
    classes, codes = [AdapterError], []
    while classes:
        found = classes.pop()
        classes += found.__subclasses__()
        codes.append(found.code)
    assert len(codes) == len(set(codes)) > 10
