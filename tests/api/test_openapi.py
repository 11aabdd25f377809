"""The OpenAPI document is true: it has every route, and no generated request is answered otherwise than it says."""

import schemathesis
from fastapi import APIRouter
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from dsv4serve.api import app
from dsv4serve.api.routes_page import FILES

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 8


def test_every_route_is_in_the_document(server):
    document = server.client.get("/openapi.json").json()
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    routers = [module.router for module in vars(app).values() if isinstance(getattr(module, "router", None), APIRouter)]
    assert len(routers) >= 8
    served = {(*route.methods, route.path.replace(":path", "")) for router in routers for route in router.routes}
    assert described == {(method, path) for method, path in served if path not in FILES}
    for method, path in described:
        if method == "GET":
            assert server.client.get(path.format(name="demo")).status_code == 200, path
        else:
            assert server.client.post(path, json={"x": 1}).status_code in (200, 400), path


def test_generated_requests_get_only_documented_answers(server):
    document = server.client.get("/openapi.json").json()
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=10)

        check()
