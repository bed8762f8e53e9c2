"""Schemathesis tests the plain routes against their OpenAPI document; no request may end in a 500."""

from __future__ import annotations

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.runtime.serving.pictures import encoded, noise

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


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


@pytest.mark.parametrize("images", ["fuzzed", "real"])
@pytest.mark.parametrize("path", ["/match", "/heat-map", "/features"])
def test_nothing_ends_in_a_500(server, api, path, images):
    """Requests use arbitrary files, and also two images, so that the other fields are tried too."""
    files = dict.fromkeys(("source", "target", "image"), encoded(noise(1)))

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(api[path]["POST"].as_strategy(), st.data())
    def sent(case, data):
        if images == "real" and isinstance(case.body, dict):
            real = {**files, "points": ["1,1"], "point": "1,1"}
            kept = {name: value for name, value in case.body.items() if data.draw(st.booleans())}
            case.body = {**{name: real[name] for name in real.keys() & case.body.keys()}, **kept}
            case.body |= {name: files[name] for name in files.keys() & case.body.keys()}
        answer = case.call(base_url=server.url)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    statuses = set()
    sent()
    assert statuses <= {200, 400, 404, 413, 422}
    assert images == "fuzzed" or 200 in statuses


def test_the_list_of_bundles(server, api):
    api["/bundles"]["GET"].Case().call_and_validate(base_url=server.url, checks=CHECKS)
