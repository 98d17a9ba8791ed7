"""Timings say something only on a machine that does nothing else: `tox -e bench` runs these, the ordinary suite does
not."""

import pytest


@pytest.fixture(autouse=True)
def _on_request(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("benchmark_enable"):
        pytest.skip("a timing; run by tox -e bench")
