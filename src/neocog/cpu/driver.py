"""The compiled driver: runs a program table in one parallel region.

A program is a list of sections. The steps of a section run ``iterations`` times, each time on
buffers moved on by a stride (its next images). A section is either *shared*: in every iteration
all threads take their contiguous share of each step's items and wait at a barrier between steps,
unless these may run alongside each other; or *private*: every thread runs whole iterations by
itself, in scratch of its own, and waits once at the end. With one thread there is no region and no
barrier.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from llvmlite import ir

from ..target import Target, host
from .lanes import I32, I64, KERNEL_TYPE, PTR, VOID, Emitter
from .runtime import Kernel, cached, compile_kernel

HEADER = (
    "sections", "parallel", "barrier", "thread_num", "num_threads",
    "real_buffers", "virtual_buffers", "locals_offset", "locals_stride",
)  # fmt: skip
"""Words at the head of the table: counts, the addresses of :class:`runtime.OpenMP`, and where in
the arena (buffer 1) each thread keeps its own list of buffers, in bytes."""

SECTION = ("private", "iterations", "moves", "moves_at", "steps", "steps_at")
"""Words of a section, after the header."""

MOVE = ("target", "base", "offset", "per_iteration", "per_thread")
"""Words of a move: buffer ``target`` stands so many bytes behind buffer ``base``."""

STEP = ("kernel", "items", "fields", "alongside")
"""Words of a step: kernel address, work items, address of its fields, whether no thread has to wait
for its end before the next step."""

ARENA = 1
"""The buffer that is scratch."""


@dataclass(frozen=True)
class _Walker:
    """What the region knows of its team."""

    thread: ir.Value
    threads: ir.Value
    parallel: bool


def _words(e: Emitter, where: ir.Value, names: tuple[str, ...]) -> SimpleNamespace:
    return SimpleNamespace(**{name: e.load(I64, where, i) for i, name in enumerate(names)})


def _record(e: Emitter, first: ir.Value, number, names: tuple[str, ...]) -> ir.Value:
    return e.at_byte(first, e.mul(number, 8 * len(names)))


def _pointer(e: Emitter, address: ir.Value) -> ir.Value:
    return e.b.inttoptr(address, PTR)


@functools.cache
def _driver() -> tuple[Callable[..., None], Kernel]:
    """The compiled ``launch(bases, program, threads)``, and its owner."""
    kernel = cached(emit, host())
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return kind(kernel.address), kernel


def emit(target: Target) -> Kernel:
    """Compile ``launch(bases, program, threads)``."""
    e = Emitter(target, "launch")
    with e.function("region", [PTR]) as (region, (context,)):
        # The team may be smaller than asked for: inside another region, or under a thread limit.
        head, count = _words(e, e.load(PTR, context, 1), HEADER), ir.FunctionType(I32, [])
        number, threads = (e.call_address(a, count) for a in (head.thread_num, head.num_threads))
        _walk(e, context, _Walker(e.b.sext(number, I64), e.b.sext(threads, I64), True))
    with e.function("alone", [PTR]) as (alone, (context,)):
        _walk(e, context, _Walker(I64(0), I64(1), False))
    with e.function("launch", [PTR, PTR, I64], internal=False) as (_, (bases, program, threads)):
        context = e.stack(2)
        for slot, value in enumerate((bases, program)):
            e.b.store(value, e.at_byte(context, 8 * slot))

        def fork() -> None:
            kind = ir.FunctionType(VOID, [PTR, PTR, I32, I32])
            work = [region, context, e.b.trunc(threads, I32), I32(0)]
            e.call_address(e.load(I64, program, HEADER.index("parallel")), kind, work)

        e.choose(e.less(1, threads), fork, lambda: e.b.call(alone, [context]) and None)
    return compile_kernel(e, ())


def _walk(e: Emitter, context: ir.Value, w: _Walker) -> None:
    bases, program = e.load(PTR, context, 0), e.load(PTR, context, 1)
    head = _words(e, program, HEADER)
    own = e.at_byte(e.load(PTR, bases, ARENA), head.locals_offset)
    own = e.at_byte(own, e.mul(w.thread, head.locals_stride))
    moved = e.less(0, head.virtual_buffers)

    def copy() -> None:
        def one(i: ir.Value) -> None:
            e.b.store(e.load(I64, bases, i), e.at_byte(own, e.mul(i, 8)))

        e.loop(0, head.real_buffers, one)

    e.choose(moved, copy)
    buffers = e.b.select(moved, own, bases)
    first = e.at_byte(program, 8 * len(HEADER))

    def section(number: ir.Value) -> None:
        s = _words(e, _record(e, first, number, SECTION), SECTION)
        private = e.less(0, s.private)
        start = e.divmod(e.mul(s.iterations, w.thread), w.threads)[0]
        stop = e.divmod(e.mul(s.iterations, e.add(w.thread, 1)), w.threads)[0]
        start = e.b.select(private, start, I64(0))
        stop = e.b.select(private, stop, s.iterations)
        e.loop(start, stop, lambda i: _iteration(e, w, head, s, buffers, private, i))
        _barrier(e, w, head, private)

    e.loop(0, head.sections, section)


def _iteration(e: Emitter, w: _Walker, head, s, buffers, private, iteration) -> None:
    def move(number: ir.Value) -> None:
        m = _words(e, _record(e, _pointer(e, s.moves_at), number, MOVE), MOVE)
        offset = e.add(e.mul(m.per_iteration, iteration), e.mul(m.per_thread, w.thread))
        address = e.add(e.load(I64, buffers, m.base), e.add(m.offset, offset))
        e.b.store(address, e.at_byte(buffers, e.mul(m.target, 8)))

    e.loop(0, s.moves, move)

    def step(number: ir.Value) -> None:
        t = _words(e, _record(e, _pointer(e, s.steps_at), number, STEP), STEP)
        begin = e.divmod(e.mul(t.items, w.thread), w.threads)[0]
        end = e.divmod(e.mul(t.items, e.add(w.thread, 1)), w.threads)[0]
        begin = e.b.select(private, I64(0), begin)
        end = e.b.select(private, t.items, end)
        work = [buffers, _pointer(e, t.fields), begin, end, w.thread]
        e.choose(e.less(begin, end), lambda: e.call_address(t.kernel, KERNEL_TYPE, work) and None)
        _barrier(e, w, head, e.b.not_(e.b.or_(private, e.less(0, t.alongside))))

    e.loop(0, s.steps, step)


def _barrier(e: Emitter, w: _Walker, head, wanted: ir.Value) -> None:
    if w.parallel:
        kind = ir.FunctionType(VOID, [])
        e.choose(wanted, lambda: e.call_address(head.barrier, kind) and None)


def launch(bases: object, program: int, threads: int) -> None:
    """Run the program table at address ``program`` on the buffers in ``bases`` (a ctypes array)."""
    _driver()[0](bases, program, threads)
