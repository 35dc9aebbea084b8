"""Whatever is sent: only answers that the document has, and none without a key."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server import app
from server.routes.access import ACCESS
from tests.conftest import with_base
from tests.http.conftest import Running, serve
from tests.http.conftest import settings as chosen

ADMIN_KEY = "the-operators-own-key"
EXAMPLES = int(os.environ.get("CONTRACT_EXAMPLES", "10"))  # of each call, with a key and without
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def guarded(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = with_base(tmp_path_factory.mktemp("contract") / "home", base_folder)
    yield from serve(chosen(home, "--admin-key", ADMIN_KEY), base_folder)


# The document is the same whatever is served.
NOTHING: Any = None
schema = schemathesis.openapi.from_dict(app.create_app(NOTHING, NOTHING, NOTHING).openapi())
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@schema.parametrize()
@many
def test_with_a_key(case: schemathesis.Case, guarded: Running) -> None:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    case.call_and_validate(base_url=guarded.url, headers=headers, checks=CHECKS)


@schema.parametrize()
@many
def test_without_a_key(case: schemathesis.Case, guarded: Running) -> None:
    case.headers = {
        name: value
        for name, value in dict(case.headers or {}).items()
        if name.lower() not in ("authorization", "x-api-key")
    }
    response = case.call(base_url=guarded.url)
    scopes = {
        path.replace(":path", ""): s
        for (m, path), s in ACCESS.items()
        if m == case.operation.method.upper()
    }
    if response.status_code == 404 and response.json()["error"]["code"] == "not_found":
        return  # odd characters in the path: it is no route at all
    if scopes[case.operation.path] is not None:
        assert response.status_code == 401, response.text
    else:
        case.validate_response(response, checks=CHECKS)
