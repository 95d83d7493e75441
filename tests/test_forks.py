"""A fork while other threads compute and compile: the child must neither hang nor err."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from neocog.cpu import forks, runtime
from neocog.memory import POOL
from neocog.parameters import Live
from neocog.target import host

if not hasattr(os, "fork"):
    pytest.skip("this system does not fork", allow_module_level=True)

SECONDS = 20
"""More than a child needs on a busy machine; one that hangs is killed."""


def in_child(work: Callable[[], bool]) -> str:
    """Run ``work`` in a forked child: "right", "wrong" or "hung"."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "right" if status == 0 else "wrong"
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hung"


class Holding:
    """Another thread inside ``lock``, as long as the block lasts."""

    def __init__(self, lock):
        self.lock, self.inside, self.leave = lock, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.hold)

    def hold(self):
        with self.lock:
            self.inside.set()
            self.leave.wait()

    def __enter__(self):
        self.thread.start()
        self.inside.wait()

    def __exit__(self, *_):
        self.leave.set()
        self.thread.join()


def taken(lock):
    with lock:
        return True


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_locks_that_another_thread_held_are_open_in_the_child():
    live = Live({}, host())
    for lock in (forks.lock(), POOL.lock, live.lock):
        with Holding(lock):
            assert not lock.acquire(blocking=False)
            assert in_child(lambda lock=lock: taken(lock)) == "right"
            assert not lock.acquire(blocking=False), "the parent's is as it was"
    plain = threading.Lock()
    with Holding(plain):
        assert in_child(lambda: not plain.acquire(timeout=0.1)) == "right", "the others are closed"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_is_serial_and_knows_that_it_is_one():
    before = forks.generation()
    assert in_child(lambda: runtime.thread_count() == 1) == "right"
    assert in_child(lambda: forks.generation() == before + 1) == "right"
    assert in_child(lambda: "forked" in runtime.threading_note()) == "right"
    assert forks.generation() == before


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_reads_live_weights_anew():
    """A fork may have met the thread that was packing them."""
    read = []

    class Counted(Live):
        def _read(self, names):
            read.append(names)
            return super()._read(names)

        @property
        def known(self):
            return self._contents is not None

    live = Counted({}, host())
    live.refresh({})
    assert live.known

    def forgets():
        seen = []
        live._read = lambda names: (seen.append(live._contents), Counted._read(live, names))[1]
        live.refresh({})
        return seen == [None]

    assert in_child(forgets) == "right"


BUSY = """
import os, sys, threading, time
import torch
from torch import nn
import neocog, neocog.functional as F

torch.set_num_threads(2)
model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
x = torch.randn(2, 3, 16, 16)
frozen, trained = neocog.freeze(model, x), torch.compile(model, backend="neocog")
want = frozen(x).clone()
trained(x).sum().backward()

def computes():
    while True:
        frozen(x)
        trained(x).sum().backward()

def compiles():
    for k in range(1, 1000000):
        F.conv2d(torch.ones(1, k % 40 + 1, 9, 9), torch.ones(k // 40 % 40 + 1, k % 40 + 1, 1, 3))

def child():
    torch.set_num_threads(1)  # PyTorch's own part would hang in GNU OpenMP, as DataLoader knows
    same = torch.equal(frozen(x), want)
    new = torch.equal(F.conv2d(torch.ones(1, 43, 7, 7), torch.ones(2, 43, 3, 3)),
                      torch.full((1, 2, 5, 5), 43 * 9.0))
    close = torch.allclose(trained(x), want, atol=1e-5)
    trained(x).sum().backward()
    return same and new and close

for work in (computes, compiles):
    threading.Thread(target=work, daemon=True).start()
sys.path.insert(0, sys.argv[1])
from test_forks import in_child
found = []
for i in range(8):
    time.sleep(0.03 * i)
    found.append(in_child(child))
print(*found)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_forks_while_two_threads_compute_and_compile():
    done = subprocess.run(
        [sys.executable, "-c", BUSY, os.path.dirname(__file__)],
        env=os.environ | {"NEOCOG_CACHE_DIR": "off"},
        capture_output=True, text=True, timeout=9 * SECONDS,
    )  # fmt: skip
    assert done.stdout.split() == ["right"] * 8, done.stderr[-2000:]
