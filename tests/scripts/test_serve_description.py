"""The server against its own OpenAPI description: whatever fits it or breaks it, answers are of a kind that it says."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from exactivations.scripts.serve_work import RequestLimits

from .served import serving

# What fits the description may still be refused: a prompt longer than this server takes, say, or an id of no token.
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection,
]  # fmt: skip


@pytest.fixture(scope="module")
def url():
    with serving(asked=RequestLimits(max_completions=4, max_prompt_tokens=20, max_new_tokens=4)) as served:
        yield served.url


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_as_described(url, mode):
    seen = set()
    for operation in (found.ok() for found in schemathesis.openapi.from_url(url + "/openapi.json").get_all_operations()):
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # it takes nothing that could be wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def holds(case):
            case.call_and_validate(checks=CHECKS)
            seen.add(case.operation.path)

        holds()
    assert len(seen) == (4 if mode is GenerationMode.NEGATIVE else 8)
