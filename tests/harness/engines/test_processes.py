import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import threadpoolctl
import torch

from harness.engines import processes
from harness.engines.processes import package_on_path, process_context, take_environment, use_threads


def tell(channel: Connection, variables: dict[str, str]) -> None:
    """What a new process finds, and what it makes of it."""
    found = [name in sys.modules for name in processes._SHARED]
    take_environment(variables)
    use_threads(3)
    libraries = {library["num_threads"] for library in threadpoolctl.threadpool_info()}
    channel.send((found, dict(os.environ), torch.get_num_threads(), libraries, torch.cuda.is_initialized()))


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked on this system")
def test_a_forked_process_has_all_imported_and_the_environment_of_the_moment():
    context = process_context("cpu")
    reader, channel = context.Pipe(duplex=False)
    variables = {**os.environ, "SAGEBENCH_CACHE": "/of/this/moment"}
    with package_on_path():
        process = context.Process(target=tell, args=(channel, variables))
        process.start()
    imported, environment, threads, libraries, gpu_is_open = reader.recv()
    process.join()
    assert all(imported)
    assert environment == {**variables, "OMP_NUM_THREADS": "3"}
    assert (threads, libraries) == (3, {3})
    assert not gpu_is_open


@pytest.mark.parametrize(
    ("platform", "device", "method"),
    [
        ("linux", "cpu", "forkserver"),
        ("linux", "cuda:1", "spawn"),
        ("darwin", "cpu", "spawn"),
        ("win32", "cpu", "spawn"),
    ],
)
def test_only_what_may_be_forked_is(monkeypatch, platform, device, method):
    monkeypatch.setattr(sys, "platform", platform)
    assert process_context(device).get_start_method() == method


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_the_search_path_is_as_it_was(monkeypatch, before):
    if before is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", before)
    with package_on_path():
        first, *rest = os.environ["PYTHONPATH"].split(os.pathsep)
        assert (Path(first) / "harness" / "engines").is_dir()
        assert rest == [before] * (before is not None)
    assert os.environ.get("PYTHONPATH") == before
