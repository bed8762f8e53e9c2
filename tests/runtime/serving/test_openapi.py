"""Schemathesis against what the plain routes say of themselves; nothing it sends may end in a 500."""

from __future__ import annotations

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)


@pytest.fixture(scope="module")
def document(server):
    return requests.get(f"{server.url}/openapi.json", timeout=10).json()


@pytest.fixture(scope="module")
def api(server, document):
    return schemathesis.openapi.from_dict(document)


def test_the_routes(document):
    assert set(document["paths"]) == {"/bundles", "/match", "/heat-map", "/features"}
    assert document["paths"]["/match"]["post"]["responses"].keys() >= {
        "200",
        "400",
        "413",
        "422",
        "503",
        "504",
    }


@pytest.mark.parametrize(
    ("path", "method"),
    [("/bundles", "GET"), ("/match", "POST"), ("/heat-map", "POST"), ("/features", "POST")],
)
def test_nothing_ends_in_a_500(server, api, path, method):
    operation = api[path][method]
    cases = operation.as_strategy()

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def sent(case):
        answer = case.call(base_url=server.url)
        case.validate_response(
            answer,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )

    sent()
