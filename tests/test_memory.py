"""Memory that is used again: never while anybody holds any of it, and always afterwards."""

from __future__ import annotations

import gc
import math
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neocog import memory
from neocog.memory import IDLE, SMALL, Piece, Pool

LARGE = SMALL // 4 + 1
"""The fewest float32 that come from the pool."""


@pytest.fixture
def pool() -> Pool:
    return Pool()


def pieces(pool: Pool) -> int:
    return sum(map(len, pool.pieces.values()))


# -------------------------------------------------------------------------------- used again


def test_what_nobody_holds_is_used_again(pool: Pool) -> None:
    t = pool.empty((LARGE,))
    address = t.data_ptr()
    del t
    for shape in ((LARGE,), (1, LARGE), (LARGE, 1, 1, 1)):
        assert pool.empty(shape).data_ptr() == address, "sizes count, not shapes"
    assert pieces(pool) == 1
    assert pool.empty((LARGE + 1,)).data_ptr() != address
    assert pieces(pool) == 2


class Reader:
    """Holds a tensor in a cycle."""

    def __init__(self, t: Tensor) -> None:
        self.t, self.me = t, self


HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "the tensor": lambda t: t,
    "a view": lambda t: t[5:6],
    "a view of a view": lambda t: t.view(-1)[3:].view(torch.int32)[:1],
    "an alias": lambda t: t.detach(),
    "its data": lambda t: t.data,
    "a parameter": lambda t: torch.nn.Parameter(t),
    "a gradient": lambda t: setattr(p := torch.zeros_like(t, requires_grad=True), "grad", t) or p,
    "a result that saved it": lambda t: torch.ones_like(t, requires_grad=True) * t,
    "an array": lambda t: t.numpy(),
    "a view of an array": lambda t: t.numpy()[7:8].reshape(1, 1),
    "a memoryview": lambda t: memoryview(t.numpy())[2:],
    "a capsule": lambda t: torch.utils.dlpack.to_dlpack(t),
    "another library's array": lambda t: np.from_dlpack(t),
    "its storage": lambda t: t.untyped_storage(),
    "a closure": lambda t: lambda: t,
    "a cycle": Reader,
}
"""Ways to hold some of a tensor's memory."""


@pytest.mark.parametrize("how", HOLDERS)
def test_whoever_holds_some_of_it_keeps_it(pool: Pool, how: str) -> None:
    t = pool.empty((LARGE,))
    address = t.data_ptr()
    holder = HOLDERS[how](t)
    del t
    other = pool.empty((LARGE,))
    assert other.data_ptr() != address
    assert pieces(pool) == 2
    del holder
    gc.collect()
    assert pool.empty((LARGE,)).data_ptr() == address


def test_what_somebody_holds_is_not_written_to(pool: Pool) -> None:
    kept = [pool.empty((2, LARGE)).fill_(i)[1].numpy() for i in range(5)]
    assert len({a.ctypes.data for a in kept}) == 5
    assert all((a == i).all() for i, a in enumerate(kept))


def test_what_went_to_another_process_is_not_used_again(pool: Pool) -> None:
    """Its memory may be read there when nobody here holds it any more."""
    t = pool.empty((LARGE,)).fill_(1).share_memory_()
    address = t.data_ptr()
    del t
    assert pool.empty((LARGE,)).data_ptr() != address


def test_a_storage_that_its_user_has_resized(pool: Pool) -> None:
    for elements in (0, 2 * LARGE):
        pool.empty((LARGE,)).untyped_storage().resize_(4 * elements)
        again = pool.empty((LARGE,)).fill_(1)
        assert again.untyped_storage().nbytes() >= 4 * LARGE
        del again


def test_copies_do_not_hold_it(pool: Pool) -> None:
    t = pool.empty((LARGE,)).fill_(3)
    address = t.data_ptr()
    copies = t.clone(), t.tolist(), pickle.dumps(t), t.sum(), t.numpy().copy()
    del t
    assert pool.empty((LARGE,)).data_ptr() == address
    assert (copies[0] == 3).all()


# -------------------------------------------------------------------------- sizes and formats


def test_small_ones_do_not_come_from_the_pool(pool: Pool) -> None:
    for shape in ((), (0,), (3, 0, 10**6), (LARGE - 1,), (1, 2, 3, 4)):
        t = pool.empty(shape)
        assert (t.shape, t.dtype, t.device.type) == (shape, torch.float32, "cpu")
    assert pieces(pool) == 0
    kept = pool.empty((LARGE,))
    assert pieces(pool) == 1
    assert kept.untyped_storage().nbytes() == 4 * LARGE > SMALL


@given(
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
)
def test_strides_are_pytorchs(shape: list[int], axis: int, last: bool, large: bool) -> None:
    shape[axis] *= -(-2 * LARGE // math.prod(shape)) if large else 1
    format = torch.channels_last if last else None
    theirs = torch.empty(shape, memory_format=format or torch.contiguous_format)
    ours = Pool().empty(shape, format)
    assert ours.shape == theirs.shape
    assert ours.stride() == theirs.stride()
    assert ours.storage_offset() == 0
    assert ours.untyped_storage().nbytes() == theirs.untyped_storage().nbytes()


def test_one_piece_serves_both_formats(pool: Pool) -> None:
    shape = (2, 3, 100, 101)
    address = pool.empty(shape).data_ptr()
    t = pool.empty(torch.Size(shape), torch.channels_last)
    assert t.data_ptr() == address
    assert t.is_contiguous(memory_format=torch.channels_last)
    t.copy_(torch.arange(t.numel(), dtype=torch.float32).view(shape))
    assert (t.flatten() == torch.arange(t.numel())).all()


@pytest.fixture
def odd_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.usefixtures("odd_defaults")
@pytest.mark.parametrize("elements", [3, LARGE])
def test_defaults_of_pytorch_do_not_matter(pool: Pool, elements: int) -> None:
    t = pool.empty((elements,))
    assert (t.dtype, t.device.type, t.numel()) == (torch.float32, "cpu", elements)


# ------------------------------------------------------------------------------- given back


def test_idle_pieces_go(pool: Pool) -> None:
    used, idle = (LARGE,), (2 * LARGE,)
    pool.empty(used), pool.empty(idle)
    for _ in range(IDLE):
        pool.next_pass()
        pool.empty(used)
    assert pieces(pool) == 2
    pool.next_pass()
    assert list(pool.pieces) == [4 * LARGE]


def test_more_pieces_than_are_needed_go(pool: Pool) -> None:
    """Three at once in one pass, then one in each: two of a size go."""
    first = [pool.empty((LARGE,)) for _ in range(3)]
    del first
    for _ in range(IDLE + 1):
        pool.next_pass()
        pool.empty((LARGE,))
    assert pieces(pool) == 1


def test_idle_pieces_in_use_stay_with_their_users(pool: Pool) -> None:
    held = pool.empty((LARGE,)).fill_(7)
    for _ in range(IDLE + 1):
        pool.next_pass()
    assert pieces(pool) == 0
    other = pool.empty((LARGE,)).fill_(8)
    assert other.data_ptr() != held.data_ptr()
    assert (held == 7).all()


def test_clear_gives_everything_back(pool: Pool) -> None:
    held = pool.empty((LARGE,)).fill_(7)
    for i in range(2, 5):
        pool.empty((i * LARGE,))
    assert pieces(pool) == 4
    pool.clear()
    assert pieces(pool) == 0
    assert pool.empty((LARGE,)).fill_(8).data_ptr() != held.data_ptr()
    assert (held == 7).all()


def test_a_pool_that_holds_nothing_ready(pool: Pool) -> None:
    pool.holds = False
    t = pool.empty((2, 3, 100, 101), torch.channels_last)
    assert t.is_contiguous(memory_format=torch.channels_last)
    assert pieces(pool) == pool.size == 0


def test_the_size_counts_what_is_ready_and_what_is_in_use(pool: Pool) -> None:
    held = [
        pool.empty((LARGE,)),
        pool.empty((2 * LARGE,)),
        pool.empty((2 * LARGE,)),
        pool.empty((3,)),
    ]
    assert pool.size == 5 * 4 * LARGE
    del held
    assert pool.size == 5 * 4 * LARGE
    pool.clear()
    assert pool.size == 0


# ---------------------------------------------------------------------------------- threads


@pytest.fixture
def slow_finders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has found a free piece lets the other threads run before it takes it."""
    found = Piece.free.fget

    def free(piece: Piece) -> bool:
        is_free = found(piece)
        time.sleep(1e-4)
        return is_free

    monkeypatch.setattr(Piece, "free", property(free))


@pytest.mark.usefixtures("slow_finders")
def test_two_threads_never_get_the_same_memory(pool: Pool) -> None:
    """Each writes its own number everywhere, and finds nothing else there a moment later."""
    wrong: list[str] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for i in range(30):
            tensors = [pool.empty((LARGE,)).fill_(number) for _ in range(1 + i % 3)]
            if i % 10 == number:
                pool.next_pass()
            for t in tensors:
                if not bool((t == number).all()):
                    wrong.append(f"thread {number}, round {i}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))  # raises what a thread has raised
    assert not wrong
    assert 1 <= pieces(pool) <= 4 * 6, "three of a round and three of the one before, in each"


def test_a_piece_that_another_thread_gave_back_is_used_again(pool: Pool) -> None:
    addresses: list[int] = []

    def work() -> None:
        addresses.append(pool.empty((LARGE,)).data_ptr())

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(set(addresses)) == 1


def test_there_is_one_pool_of_the_process() -> None:
    assert isinstance(memory.POOL, Pool)
    t = memory.POOL.empty((LARGE,))
    assert any(p.storage.data_ptr() == t.data_ptr() for p in memory.POOL.pieces[4 * LARGE])
