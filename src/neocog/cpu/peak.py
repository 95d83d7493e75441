"""The yardstick: the most multiply-adds per second that a processor does on vectors.

One loop of multiply-adds that wait for nothing but each other, in as many accumulators as the
target's largest register tile holds:

    repeat ``trips`` times, UNROLL times each:  acc[i] += x * y  for all i

Nothing is read or written on the way, so what this reaches is the limit for every kernel whose
work is multiply-adds. Too few accumulators, and each would wait for its own last sum: on two FMA
units of latency 4 to 5 it takes 10, measured here 24 and more reach the limit.
"""

from __future__ import annotations

from llvmlite import ir

from ..target import Target
from .lanes import Emitter, Int
from .runtime import Kernel, compile_kernel

UNROLL = 4
"""Multiply-adds of each accumulator per trip, so that counting trips costs nothing."""

FIELDS = ("values*", "out*", "trips")


def accumulators(target: Target) -> int:
    """The largest NB * MR of the target's register tiles."""
    return max(blocks * pixels for blocks, pixels in target.tiles)


def values(target: Target) -> int:
    """float32 elements of ``values``: x, y and where each accumulator starts."""
    return (accumulators(target) + 2) * target.lanes


def multiply_adds(target: Target, trips: int) -> int:
    """Of one work item."""
    return trips * UNROLL * accumulators(target) * target.lanes


def emit(target: Target) -> Kernel:
    """Compile the kernel. Each work item does all trips and stores its sums as one vector."""
    e = Emitter(target, "peak")
    with e.kernel(FIELDS) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            x, y, *starts = [e.vload(f.values, at) for at in range(0, values(target), e.lanes)]

            def trip(_: Int, *sums: ir.Value) -> list[ir.Value]:
                for _ in range(UNROLL):
                    sums = tuple(e.fma(x, y, total) for total in sums)
                return list(sums)

            # Starts that differ, or a compiler might see that all sums are one.
            total, *others = e.loop(0, f.trips, trip, starts)
            for other in others:  # or it might leave out sums that nobody reads
                total = e.b.fadd(total, other)
            e.vstore(total, f.out, e.mul(number, target.lanes))

        e.loop(begin, end, item)
    return compile_kernel(e, FIELDS)
