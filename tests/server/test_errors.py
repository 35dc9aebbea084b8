"""Every exception that a request can meet has a status."""

import inspect

import pytest

from adapters import errors as adapter_errors
from adapters.errors import AdapterError, InvalidAdapter, Problem
from server import errors
from server.errors import STATUS, ServerError, describe

CLASSES = [
    cls
    for module in (adapter_errors, errors)
    for _, cls in inspect.getmembers(module, inspect.isclass)
    if issubclass(cls, AdapterError | ServerError)
]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_is_in_the_table(cls: type[Exception]) -> None:
    assert 400 <= STATUS[cls] < 600
    assert not {"code"} - set(dir(cls))


def test_codes_tell_classes_apart() -> None:
    codes = [cls.code for cls in CLASSES]  # type: ignore[attr-defined]
    assert len(codes) == len(set(codes))


def test_every_problem_is_told() -> None:
    problems = [Problem("a", "here", "Bad.", "Mend it."), Problem("b", "there", "Worse.", "Stop.")]
    status, body = describe(InvalidAdapter(problems))
    assert status == 422
    assert [problem["code"] for problem in body["error"]["problems"]] == ["a", "b"]
    assert set(body["error"]) == {"message", "type", "param", "code", "problems"}
