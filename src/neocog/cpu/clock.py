"""A step that reads the processor's clock: where the time of a program goes.

    now = cycles();  clocks[slot] += now - clocks[LAST];  clocks[LAST] = now

``clocks`` is a table of int64 for each thread. The cycles are those of a constant rate, in which
time passes whatever the processor's frequency is.
"""

from __future__ import annotations

from llvmlite import ir

from ..target import Target
from .lanes import I64, PTR, Emitter
from .runtime import Kernel, compile_kernel

LAST = 0
"""The slot that keeps the latest reading."""

FIELDS = ("clocks", "stride", "slot")
"""The address of the tables, how many int64 each of them has, and the slot to add to."""


def emit(target: Target) -> Kernel:
    """Compile the kernel; every thread has a table of its own, the items do not matter."""
    e = Emitter(target, "clock")
    with e.kernel(FIELDS) as (f, _, _, thread):
        table = e.at_byte(e.b.inttoptr(f.clocks, PTR), e.mul(e.mul(thread, f.stride), 8))
        read = e.module.declare_intrinsic("llvm.readcyclecounter", (), ir.FunctionType(I64, []))
        now, total = e.b.call(read, []), e.load(I64, table, f.slot)
        since = e.sub(now, e.load(I64, table, LAST))
        e.b.store(e.add(total, since), e.at_byte(table, e.mul(f.slot, 8)))
        e.b.store(now, e.at_byte(table, 8 * LAST))
    return compile_kernel(e, FIELDS)
