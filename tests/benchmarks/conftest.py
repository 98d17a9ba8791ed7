"""Timings say something only on a machine that does nothing else: `tox -e bench` runs these, the ordinary suite does
not."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before fixtures load a model for nothing
def pytest_runtest_setup(item: pytest.Item) -> None:
    if not item.config.getoption("benchmark_enable"):
        pytest.skip("a timing; run by tox -e bench")
