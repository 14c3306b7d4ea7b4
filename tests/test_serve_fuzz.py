"""No request, allowed by the OpenAPI schema or not, may cause a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from serving import serving

from qrank import Reranker
from qrank.serve.request import Limits


@pytest.fixture(scope="module")
def schema() -> Iterator[Any]:
    """The OpenAPI schema of a running server."""
    with (
        Reranker("mini", backend="fakes:length") as reranker,
        serving({"mini": reranker}, limits=Limits(documents=50, body=100_000)) as url,
    ):
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.filterwarnings("ignore")
def test_no_input_makes_the_server_fail(schema: Any) -> None:
    statuses: set[int] = set()
    # Without schemathesis' own plugin, which does not support this pytest version yet.
    for operation in (found.ok() for found in schema.get_all_operations()):
        # A GET has no arguments that could be invalid.
        for mode in list(GenerationMode)[: 1 if operation.method == "get" else None]:

            @settings(max_examples=25, suppress_health_check=list(HealthCheck), database=None)
            @given(operation.as_strategy(generation_mode=mode))
            def fuzz(case: Any) -> None:
                response = case.call_and_validate(checks=[not_a_server_error])
                statuses.add(response.status_code)

            fuzz()
    # Valid requests succeed, and invalid ones are refused.
    assert {200, 422} <= statuses
