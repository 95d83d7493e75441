"""What tests share: how hypothesis generates its examples, threads, a data set, a folder."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Tests run in several processes on few cores: OpenMP threads that spin while they wait for one
# another would keep the awaited ones from running. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Machine code compiled by one test serves the next, in all processes of this run and in no other.
if "NEOCOG_CACHE_DIR" not in os.environ:
    os.environ["NEOCOG_CACHE_DIR"] = tempfile.mkdtemp(prefix="neocog-tests-")
    atexit.register(shutil.rmtree, os.environ["NEOCOG_CACHE_DIR"], ignore_errors=True)

import pytest
import tiny
import torch
from hypothesis import settings

# The same examples in every run and on every machine, however slow.
settings.register_profile("ci", derandomize=True, deadline=None)
# `pytest --hypothesis-profile=explore`: new examples each time, many of them.
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("ci")
torch.set_num_threads(1)  # tests that are about threads set their own number


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """`--threads` sets the threads of the process that runs the tests: put them back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bars(tmp_path_factory) -> Path:
    """The folder of pictures that all runs here learn from."""
    return tiny.folder(tmp_path_factory.mktemp("data") / "bars")


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
