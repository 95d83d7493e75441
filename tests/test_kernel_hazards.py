"""What goes wrong with compiled kernels though the arithmetic is right: memory and threads.

Functions called ``child_...`` run in an interpreter of their own, for they may crash or hang.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import sys
import threading
import time
from typing import Any

import kernel_tools as kt
import numpy as np
import pytest
import torch
from kernel_tools import LAYOUTS, NCHW, NHWC
from torch import Tensor

from neocog import compiler, functional, reference
from neocog.cpu import runtime
from neocog.problem import Block, Pool, parse, pooling
from neocog.program import Program

BLOCKS = (
    "conv n1 c19x5x5 k19 3x3 p1 | bias | add | relu",
    "conv n2 c3x5x7 k33 3x3 s2 p1 | bias",
    "conv n2 c19x1x1 k35 1x1 | bias | leaky_relu(0.5)",
    "conv n1 c1x6x6 k5 3x3 | bias | relu | max 2x2",
    "conv n2 c5x1x1 k3 3x3 p1 | bias | relu",
    "conv n1 c19x7x6 k19 3x3 p1 g19 | bias | relu | max 3x3 s2 p1",
    "conv n1 c6x7x7 k10 3x3 s2 d2 p2 g2 | bias | leaky_relu(0.5) | mean 2x2",
    "conv n1 c32x4x15 k64 3x3 p1 | bias | relu | max 2x2",
)
POOLS = (
    "max n2 c19x5x7 2x2",
    "max n1 c67x5x5 3x3 s2 p1 ceil",
    "max n2 c5x1x1 1x1",
    "max n1 c3x4x5 17x17 s1 p8",
    "mean n2 c19x5x7 3x3 s2 p1",
    "mean n1 c1x6x6 2x2",
)


def block_of(line: str) -> Block:
    problem = parse(line)
    assert isinstance(problem, Block)
    return problem


def pool_of(line: str) -> Pool:
    problem = parse(line)
    assert isinstance(problem, Pool)
    return problem


def check_all(run: kt.Runner, threads: int = 1) -> int:
    """Forward and backward of the problems above through ``run``; returns how many runs."""
    count = 0
    for problem in map(block_of, BLOCKS):
        inputs = kt.block_inputs(problem)
        truth = reference.block(problem, **kt.operands(inputs))
        grads = reference.block_grad(problem, inputs["grad"], **kt.operands(inputs))
        bounds = {} if kt.is_exact(problem) else kt.gradient_bounds(problem, inputs)
        bound = kt.rounded(truth.out) if bounds else None
        for layout in LAYOUTS:
            saved, context = kt.forward(
                problem, inputs, (layout,) * 3, True, threads=threads, run=run
            )
            context.check("out", saved["out"], truth.out, bound)
            ours, context = kt.backward(
                problem, inputs, saved, kt.needed(problem), (layout,) * 5, threads=threads, run=run
            )
            for name, grad in ours.items():
                context.check(name, grad, grads[name], bounds.get(name))
            count += 2
    for problem, layout in itertools.product(map(pool_of, POOLS), LAYOUTS):
        x, g = kt.integers(problem.in_shape, 0), kt.integers(problem.out_shape, 1)
        out, winners = reference.pool(problem, x)
        saved, context = kt.pool_forward(
            problem, x, (layout, layout), True, threads=threads, run=run
        )
        context.check("out", saved["out"], out, kt.rounded(out))
        gx, context = kt.pool_backward(
            problem, g, saved, (layout, layout), threads=threads, run=run
        )
        sizes = reference.pool_grad(problem, np.abs(g), winners)
        bound = kt.FLOAT32.error_bound(problem.rows.size * problem.cols.size, sizes)
        context.check("gx", gx, reference.pool_grad(problem, g, winners), bound)
        count += 2
    return count


# ---------------------------------------------------------------------------------------- memory

READ, WRITE = 1, 2  # mprotect's PROT_READ and PROT_WRITE; 0 forbids all access


class Guarded:
    """A copy of a tensor between two pages that nobody may touch, flush with one of them."""

    def __init__(self, t: Tensor, at_end: bool):
        flat = torch.as_strided(t, (t.numel(),), (1,)).numpy().view(np.uint8)
        page, self.size = mmap.PAGESIZE, flat.size
        self.room = -(-self.size // page) * page
        self.memory = mmap.mmap(-1, self.room + 2 * page)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.address = self.base + page + (self.room - self.size if at_end else 0)
        ctypes.memmove(self.address, flat.ctypes.data, self.size)
        self._allow(self.base, page, 0)
        self._allow(self.base + page + self.room, page, 0)

    def freeze(self) -> None:
        """Forbid writing."""
        self._allow(self.base + mmap.PAGESIZE, self.room, READ)

    def copy_to(self, t: Tensor) -> None:
        ctypes.memmove(t.data_ptr(), self.address, self.size)

    def close(self) -> None:
        """Give the pages back as ordinary memory: the mapping is freed by its owner."""
        self._allow(self.base, self.room + 2 * mmap.PAGESIZE, READ | WRITE)

    def _allow(self, start: int, size: int, rights: int) -> None:
        mprotect = ctypes.CDLL(None, use_errno=True).mprotect
        mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if size and mprotect(start, size, rights):
            raise OSError(ctypes.get_errno(), "mprotect")


def between_guards(at_end: bool) -> kt.Runner:
    def run(program: Program, inputs: Any, results: Any, threads: int) -> Any:
        given = {name: inputs[name] for name in kt.reads(program, results)}
        both = {name: Guarded(t, at_end) for name, t in (given | results).items()}
        for name in given:
            both[name].freeze()
        program.run(*(both[name].address for name in program.names), threads=threads)
        for name, t in results.items():
            both[name].copy_to(t)
        for guarded in both.values():
            guarded.close()
        return results

    return run


def child_between_guards() -> None:
    for at_end, threads in itertools.product((True, False), (1, 2)):
        print(at_end, check_all(between_guards(at_end), threads))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="guard pages need POSIX")
def test_nothing_outside_the_buffers_is_touched() -> None:
    """Neither before nor behind them, and inputs are not written to."""
    runs = 4 * len(BLOCKS) + 4 * len(POOLS)
    lines = kt.in_child("test_kernel_hazards", "child_between_guards").splitlines()
    assert lines == [f"{end} {runs}" for end in (True, True, False, False)]


def child_touches_a_guard() -> None:
    problem = block_of("conv n1 c4x5x5 k4 3x3 p1 | bias")
    inputs = {n: kt.tensor(v) for n, v in kt.block_inputs(problem).items()}
    wrong = torch.empty(1, 4, 5, 4)  # a column too narrow
    program = compiler.forward(problem, NCHW, inputs["w"].stride(), NCHW)
    between_guards(True)(program, inputs, {"out": wrong}, 1)


def test_guards_work() -> None:
    """The test above can fail: a buffer that is too small ends the child."""
    with pytest.raises(AssertionError, match="exit code -11"):
        kt.in_child("test_kernel_hazards", "child_touches_a_guard")


def test_unaligned_pointers() -> None:
    """One float32 past any alignment: views of larger tensors."""

    def shifted(t: Tensor) -> Tensor:
        room = torch.empty(t.numel() + 1, dtype=t.dtype)
        view = torch.as_strided(room, t.shape, t.stride(), 1)
        return view.copy_(t)

    def run(program: Program, inputs: Any, results: Any, threads: int) -> Any:
        tensors = {name: shifted(t) for name, t in (inputs | results).items()}
        assert not any(t.data_ptr() % 8 == 0 for t in tensors.values() if t.numel())
        program.run(*(tensors[name].data_ptr() for name in program.names), threads=threads)
        return {name: t.copy_(tensors[name]) for name, t in results.items()}

    assert check_all(run) == 4 * len(BLOCKS) + 4 * len(POOLS)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory that costs nothing")
def test_offsets_beyond_two_to_the_31() -> None:
    """A picture of 2^32 pixels, nearly all of them pages that were never touched."""
    side, stride, no_reserve = 1 << 16, 1 << 12, 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 4 * side * side, flags=flags)
    last = (side - stride) * side + side - stride
    picture = np.frombuffer(memory, dtype=np.float32)
    picture[last], picture[2**31 // stride * stride] = 7, 5
    for line in (
        f"max n1 c1x{side}x{side} 1x1 s{stride}",
        f"conv n1 c1x{side}x{side} k1 1x1 s{stride} |",
    ):
        problem = parse(line)
        out, w = torch.full((1, 1, 16, 16), float("nan")), torch.ones(1, 1, 1, 1)
        if isinstance(problem, Pool):
            program, given = compiler.pool_forward(problem, NHWC, NHWC, False), []
        else:
            program, given = compiler.forward(problem, NHWC, (1, 1, 1, 1), NHWC), [w.data_ptr()]
        program.run(picture.ctypes.data, *given, out.data_ptr(), threads=1)
        assert (out[0, 0, 15, 15], out[0, 0, 8, 0]) == (7, 5)
        assert out.sum() == 12


# --------------------------------------------------------------------------------------- threads

WORK = "conv n3 c16x18x17 k19 3x3 p1 | bias | relu | max 2x2"


def gradients(threads: int, layer: Any = None) -> list[Tensor]:
    """A block's result and gradients through the public functions; numbers, not whole ones."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 16, 18, 17), (19, 16, 3, 3), (19,))
    x, w, b = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    y = functional.conv_block(
        x, w, b, padding=1, activation="relu", pool=pooling("max", 2) if layer is None else layer
    )
    grad = torch.randn(y.shape, generator=generator)
    return [y.detach(), *torch.autograd.grad(y, (x, w, b), grad)]


@pytest.fixture
def threads_kept() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layer", [None, pooling("mean", 3, 2, 1)], ids=str)
def test_the_same_bits_on_any_number_of_threads(threads_kept: None, layer: Any) -> None:
    one = gradients(1, layer)
    for threads in (2, 3, 7):
        for ours, theirs in zip(gradients(threads, layer), one, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("line", [*BLOCKS, WORK])
def test_the_same_bits_of_small_layers(line: str) -> None:
    """Fewer pieces of work than threads."""
    problem = block_of(line)
    inputs = kt.block_inputs(problem, kt.normals)
    results = []
    for threads in (1, 2, 3):
        saved, _ = kt.forward(problem, inputs, save=True, threads=threads)
        grads, _ = kt.backward(problem, inputs, saved, kt.needed(problem), threads=threads)
        results.append(saved | grads)
    for other in results[1:]:
        assert all(torch.equal(other[name], t) for name, t in results[0].items())


def test_threads_call_one_program_at_the_same_time() -> None:
    problem = block_of(WORK)
    program = compiler.forward(problem, NCHW, (144, 9, 3, 1), NCHW)
    failures: list[str] = []
    begin = threading.Barrier(3)

    def work(seed: int) -> None:
        inputs = kt.block_inputs(problem, lambda shape, n: kt.integers(shape, n + 10 * seed))
        truth = torch.tensor(reference.block(problem, **kt.operands(inputs)).out)
        x, w, bias = (kt.tensor(inputs[n]) for n in ("x", "w", "bias"))
        begin.wait()
        for turn in range(60):
            out = kt.unwritten(problem.out_shape)
            pointers = (t.data_ptr() for t in (x, w, bias, out))
            program.run(*pointers, threads=1 + (turn + seed) % 2)
            if not torch.equal(out.double(), truth):
                failures.append(f"thread {seed}, turn {turn}")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def child_has_fewer_threads_than_it_asks_for() -> None:
    one = gradients(1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(2), one, strict=True))


def test_openmp_may_grant_fewer_threads() -> None:
    """OMP_THREAD_LIMIT wins over torch.set_num_threads: no work may be left undone."""
    kt.in_child("test_kernel_hazards", "child_has_fewer_threads_than_it_asks_for",
                OMP_THREAD_LIMIT="1")  # fmt: skip


def child_forks() -> None:
    expected = gradients(2)
    other = pooling("max", 3)  # its kernels will be compiled in the forked child
    if (child := os.fork()) == 0:
        # As in a DataLoader's worker: the parent's threads are gone, libgomp would wait for them.
        right = all(torch.equal(a, b) for a, b in zip(gradients(2), expected, strict=True))
        right &= runtime.thread_count() == 1 and runtime.threading_note().startswith("serial")
        right &= bool(torch.isfinite(gradients(2, other)[1]).all())
        os._exit(0 if right else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"the forked child ended with status {status}"
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        raise AssertionError("the forked child hangs")
    assert all(torch.equal(a, b) for a, b in zip(gradients(2), expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_a_fork_after_use_runs_serially_and_right() -> None:
    kt.in_child("test_kernel_hazards", "child_forks", PYTHONWARNINGS="ignore::DeprecationWarning")


def child_with_a_small_stack() -> None:
    threading.stack_size(1 << 20)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(gradients(2)))
    thread.start()
    thread.join()
    assert len(results) == 4


@pytest.mark.slow
def test_a_stack_of_one_mebibyte_is_enough() -> None:
    """To compile and to run."""
    kt.in_child("test_kernel_hazards", "child_with_a_small_stack")


def child_exits() -> None:
    gradients(2)
    threading.Thread(target=gradients, args=(2,)).start()
    print("done")


@pytest.mark.slow
def test_the_interpreter_exits_cleanly() -> None:
    assert kt.in_child("test_kernel_hazards", "child_exits") == "done\n"
