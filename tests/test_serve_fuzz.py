"""Whatever the OpenAPI schema allows, and much that it does not: never a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from serving import serving

from qrank import Reranker
from qrank.serve.guard import Limits


@pytest.fixture(scope="module")
def described() -> Iterator[Any]:
    """The API of a running server."""
    with (
        Reranker("mini", backend="fakes:length") as reranker,
        serving({"mini": reranker}, limits=Limits(documents=50, body=100_000)) as url,
    ):
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@pytest.mark.filterwarnings("ignore")
@schema.parametrize()
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
def test_no_input_makes_the_server_fail(case: Any) -> None:
    case.call_and_validate(checks=[not_a_server_error])
