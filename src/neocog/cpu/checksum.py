"""A checksum of float32 memory, read at memory speed: has anybody written to these weights?

Each vector lane keeps sums h = h * P + word (mod 2**32) over its words; P is odd, hence invertible,
so a change of one word always changes its sum, and independent changes go unnoticed with a
probability of about 2**-32 a lane (a polynomial hash, Carter and Wegman 1979). The sums are joined
with odd multipliers of their own. Words are compared as integers: 0.0 and -0.0 differ, NaNs do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from ..target import Target
from .lanes import I32, I64, Emitter, Int
from .runtime import Kernel, compile_kernel

CHUNK = 1 << 14
"""Elements per item."""

SUMS = 8
"""Independent vectors of sums: multiplications overlap."""

MULTIPLIER = 0x01000193
"""The prime of the FNV hash (odd)."""

FIELDS = ("x*", "elements", "out*")


@dataclass(frozen=True)
class ChecksumPlan:
    """A checksum kernel has no variants but its target."""

    target: Target


def emit(plan: ChecksumPlan) -> Kernel:
    """Items: chunks of CHUNK elements; item i writes its 64-bit sum to ``out[i]``."""
    e = Emitter(plan.target, "checksum")
    block = SUMS * e.lanes
    zero = ir.Constant(e.ints, [0] * e.lanes)
    odd = [(2 * i + 1) * MULTIPLIER % 2**31 for i in range(block)]
    weights = [ir.Constant(e.ints, odd[i : i + e.lanes]) for i in range(0, block, e.lanes)]

    def absorb(total, words):
        return e.b.add(e.b.mul(total, e.integers(MULTIPLIER)), words)

    with e.kernel(FIELDS) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            start = e.mul(number, CHUNK)
            x, size = e.at(f.x, start), e.min(e.sub(f.elements, start), CHUNK)
            whole = e.mul(e.divmod(size, block)[0], block)

            def step(i: Int, *sums: ir.Value) -> list[ir.Value]:
                loads = [e.vload(x, e.add(i, s * e.lanes)) for s in range(SUMS)]
                return [absorb(t, e.b.bitcast(v, e.ints)) for t, v in zip(sums, loads, strict=True)]

            sums = e.loop(0, whole, step, [zero] * SUMS, step=block)

            def tail(i: Int, first: ir.Value) -> list[ir.Value]:
                words = e.vload(x, i, e.lane_mask(e.sub(size, i)))
                return [absorb(first, e.b.bitcast(words, e.ints))]

            (sums[0],) = e.loop(whole, size, tail, [sums[0]], step=e.lanes)
            total = I64(0)
            for sum_, weight in zip(sums, weights, strict=True):
                mixed = e.b.mul(e.b.xor(sum_, e.b.lshr(sum_, e.integers(15))), weight)
                for lane in range(e.lanes):
                    word = e.b.zext(e.b.extract_element(mixed, I32(lane)), I64)
                    total = e.b.add(e.b.mul(total, I64(0x100000001B3)), word)
            e.b.store(total, e.at_byte(f.out, e.mul(number, 8)))

        e.loop(begin, end, item)
    return compile_kernel(e, FIELDS)
