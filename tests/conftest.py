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

import browsing
import explained
import pytest
import tiny
import torch
from hypothesis import settings

import neocog

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


# The page of `neocog explain` in a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    with browsing.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def network():
    """A network with one of each kind of layer, and a picture for it."""
    return explained.sampler()


@pytest.fixture(scope="module")
def page(network, tmp_path_factory):
    """The page about it, and the file it is in."""
    made = neocog.explain(*network, classes=explained.CLASSES, name="sampler")
    return made, made.save(tmp_path_factory.mktemp("page") / "sampler.html")


@pytest.fixture
def tab(browser, page):
    """That file in a tab of its own."""
    with browsing.opened(browser, page[1]) as found:
        yield found
