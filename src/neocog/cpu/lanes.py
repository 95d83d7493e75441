"""Vector IR: the few operations every emitter is written in, over llvmlite's IR builder.

An :class:`Emitter` builds one LLVM module that holds one kernel. Integers may be given as Python
ints (folded at once) or as IR values; pointers count in elements of float32 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from copy import copy as shallow_copy
from types import SimpleNamespace
from typing import Any

from llvmlite import ir

from ..target import Target

I1, I8, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
F32, PTR, VOID = ir.FloatType(), ir.PointerType(), ir.VoidType()

Int = Any
"""A Python int or an i64 IR value."""

KERNEL_TYPE = ir.FunctionType(VOID, [PTR, PTR, I64, I64, I64])
"""kernel(bases, fields, begin, end, thread): does work items begin <= i < end of one step."""


class Emitter:
    """Builds the module of one kernel for one target."""

    def __init__(self, target: Target, name: str):
        self.target, self.name = target, name
        self.module = ir.Module(name)
        self.b: ir.IRBuilder = ir.IRBuilder()
        self._set_lanes(target.lanes)

    def _set_lanes(self, lanes: int) -> None:
        self.lanes = lanes
        self.vector = ir.VectorType(F32, lanes)
        self.ints = ir.VectorType(I32, lanes)
        self.mask_type = ir.VectorType(I1, lanes)

    def halved(self) -> Emitter:
        """The same place in the same function, for vectors of half as many lanes."""
        half = shallow_copy(self)
        half._set_lanes(self.lanes // 2)
        return half

    # ---------------------------------------------------------------- functions and fields

    @contextmanager
    def function(self, name: str, types: Sequence[ir.Type], internal: bool = True):
        """Build the body of a function inside the ``with``; yields (function, arguments)."""
        fn = ir.Function(self.module, ir.FunctionType(VOID, types), name)
        fn.attributes.add("nounwind")
        for text in self.target.attributes:
            set.add(fn.attributes, text)  # llvmlite knows no string attributes by name
        if internal:
            fn.linkage = "internal"
            fn.attributes.add("noinline")
        outer, self.b = self.b, ir.IRBuilder(fn.append_basic_block("entry"))
        yield fn, fn.args
        self.b.ret_void()
        self.b = outer

    def routine(
        self, name: str, body: Callable[[Emitter, ir.Value], ir.Value], v: ir.Value
    ) -> ir.Value:
        """``body(self, v)`` of a vector by a call of one function, not anew in every place.

        For what is long and stands in many places: a register tile applies its activation to every
        accumulator, and compiling that many copies takes longer than the calls ever will.
        """
        if self.lanes != self.target.lanes:
            name = f"{name}_{self.lanes}"
        fn = self.module.globals.get(name)
        if fn is None:
            fn = ir.Function(self.module, ir.FunctionType(self.vector, [self.vector]), name)
            fn.linkage = "internal"
            for attribute in ("nounwind", "noinline", *self.target.attributes):
                set.add(fn.attributes, attribute)
            outer, self.b = self.b, ir.IRBuilder(fn.append_basic_block("entry"))
            self.b.ret(body(self, fn.args[0]))
            self.b = outer
        return self.b.call(fn, [v])

    @contextmanager
    def kernel(self, fields: Sequence[str]):
        """Build the kernel's entry; yields (fields, begin, end, thread).

        ``fields`` names what the step passes: ``"name*"`` a pointer, stored as (buffer number,
        byte offset) so that programs hold no addresses, ``"name"`` an integer.
        """
        with self.function(self.name, KERNEL_TYPE.args, internal=False) as (_, args):
            bases, table, begin, end, thread = args
            values, slot = {}, 0
            for field in fields:
                first = self.load(I64, table, slot)
                slot += 1
                if field.endswith("*"):
                    base = self.load(PTR, bases, first)
                    first = self.b.gep(base, [self.load(I64, table, slot)], source_etype=I8)
                    slot += 1
                values[field.rstrip("*")] = first
            yield SimpleNamespace(**values), begin, end, thread

    def call_address(
        self, address: ir.Value, kind: ir.FunctionType, args: Sequence[ir.Value] = ()
    ) -> ir.Value:
        """Call the function of type ``kind`` at ``address`` (an i64)."""
        return self.b.call(self.b.inttoptr(address, kind.as_pointer()), args)

    def call_for(
        self, number: Int, functions: Mapping[int, ir.Function], args: Sequence[ir.Value]
    ) -> None:
        """Call ``functions[number]``, which has to exist; tried in order, the last untested."""
        (first, function), *others = functions.items()
        if not others:
            self.b.call(function, args)
            return
        self.choose(
            self.equal(number, first),
            lambda: self.b.call(function, args) and None,
            lambda: self.call_for(number, dict(others), args),
        )

    # ---------------------------------------------------------------- integers

    def i(self, value: Int) -> ir.Value:
        """``value`` as an i64."""
        return I64(value) if isinstance(value, int) else value

    def add(self, a: Int, b: Int) -> Int:
        """a + b."""
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if isinstance(a, int):
            a, b = b, a
        return a if isinstance(b, int) and b == 0 else self.b.add(a, self.i(b))

    def sub(self, a: Int, b: Int) -> Int:
        """a - b."""
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return self.b.sub(self.i(a), self.i(b))

    def mul(self, a: Int, b: Int) -> Int:
        """a * b."""
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if isinstance(a, int):
            a, b = b, a
        return a if isinstance(b, int) and b == 1 else self.b.mul(a, self.i(b))

    def divmod(self, a: Int, b: Int) -> tuple[Int, Int]:
        """(a // b, a % b) for a >= 0, b > 0."""
        return self.b.udiv(self.i(a), self.i(b)), self.b.urem(self.i(a), self.i(b))

    def min(self, a: Int, b: Int) -> Int:
        """The smaller of two signed integers."""
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        a, b = self.i(a), self.i(b)
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def max(self, a: Int, b: Int) -> Int:
        """The larger of two signed integers."""
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        a, b = self.i(a), self.i(b)
        return self.b.select(self.b.icmp_signed(">", a, b), a, b)

    def less(self, a: Int, b: Int) -> ir.Value:
        """Signed a < b."""
        return self.b.icmp_signed("<", self.i(a), self.i(b))

    def equal(self, a: Int, b: Int) -> ir.Value:
        """a == b."""
        return self.b.icmp_signed("==", self.i(a), self.i(b))

    # ---------------------------------------------------------------- control flow

    def loop(
        self,
        start: Int,
        stop: Int,
        body: Callable[..., Sequence[ir.Value] | None],
        carry: Sequence[ir.Value] = (),
        step: int = 1,
    ) -> list[ir.Value]:
        """``for i in range(start, stop, step): carry = body(i, *carry)``; returns the last carry.

        A loop that is known to run once is emitted straight; one known to be empty not at all.
        """
        if isinstance(start, int) and isinstance(stop, int):
            if stop <= start:
                return list(carry)
            if stop - start <= step:
                return list(body(start, *carry) or ())
        before = self.b.block
        head = self.b.append_basic_block("loop")
        after = self.b.append_basic_block("done")
        start, stop = self.i(start), self.i(stop)
        self.b.cbranch(self.less(start, stop), head, after)
        self.b.position_at_end(head)
        index = self.b.phi(I64)
        index.add_incoming(start, before)
        phis = [self.b.phi(v.type) for v in carry]
        for phi, value in zip(phis, carry, strict=True):
            phi.add_incoming(value, before)
        results = list(body(index, *phis) or ())
        following = self.b.add(index, I64(step), flags=["nsw"])
        tail = self.b.block
        self.b.cbranch(self.less(following, stop), head, after)
        index.add_incoming(following, tail)
        for phi, value in zip(phis, results, strict=True):
            phi.add_incoming(value, tail)
        self.b.position_at_end(after)
        finals = [self.b.phi(v.type) for v in carry]
        for final, first, last in zip(finals, carry, results, strict=True):
            final.add_incoming(first, before)
            final.add_incoming(last, tail)
        return finals

    def choose(
        self, condition: ir.Value, yes: Callable[[], Any], no: Callable[[], Any] = lambda: ()
    ) -> list[ir.Value]:
        """``yes() if condition else no()``; both return equally many values."""
        blocks = [self.b.append_basic_block(n) for n in ("yes", "no", "joined")]
        self.b.cbranch(condition, blocks[0], blocks[1])
        ends = []
        for block, branch in zip(blocks[:2], (yes, no), strict=True):
            self.b.position_at_end(block)
            values = list(branch() or ())
            ends.append((values, self.b.block))
            self.b.branch(blocks[2])
        self.b.position_at_end(blocks[2])
        joined = []
        for a, b in zip(ends[0][0], ends[1][0], strict=True):
            phi = self.b.phi(a.type)
            phi.add_incoming(a, ends[0][1])
            phi.add_incoming(b, ends[1][1])
            joined.append(phi)
        return joined

    # ---------------------------------------------------------------- memory

    def at(self, pointer: ir.Value, offset: Int) -> ir.Value:
        """The address ``offset`` float32 elements behind ``pointer``."""
        if isinstance(offset, int) and offset == 0:
            return pointer
        return self.b.gep(pointer, [self.i(offset)], source_etype=F32)

    def at_byte(self, pointer: ir.Value, offset: Int) -> ir.Value:
        """The address ``offset`` bytes behind ``pointer``."""
        return self.b.gep(pointer, [self.i(offset)], source_etype=I8)

    def load(self, kind: ir.Type, pointer: ir.Value, index: Int = 0) -> ir.Value:
        """``((kind *) pointer)[index]``."""
        where = self.b.gep(pointer, [self.i(index)], source_etype=kind)
        return self.b.load(where, typ=kind)

    def vload(self, pointer: ir.Value, offset: Int = 0, mask: ir.Value | None = None) -> ir.Value:
        """One vector from an address of any alignment; lanes outside ``mask`` read 0."""
        where = self.at(pointer, offset)
        if mask is None:
            return self.b.load(where, align=4, typ=self.vector)
        return self.load_masked(self.vector, where, mask, 4, "f32")

    def load_masked(
        self, kind: ir.VectorType, where: ir.Value, mask: ir.Value, align: int, suffix: str
    ) -> ir.Value:
        """A vector of any element type; lanes outside ``mask`` are not touched and read 0."""
        name = f"llvm.masked.load.v{self.lanes}{suffix}.p0"
        fn = self.intrinsic(name, kind, [PTR, I32, self.mask_type, kind])
        zeros = ir.Constant(kind, [kind.element(0)] * self.lanes)
        return self.b.call(fn, [where, I32(align), mask, zeros])

    def vstore(
        self, value: ir.Value, pointer: ir.Value, offset: Int = 0, mask: ir.Value | None = None
    ) -> None:
        """Store one vector at an address of any alignment; lanes outside ``mask`` stay."""
        where = self.at(pointer, offset)
        self.store_masked(value, where, mask, 4, "f32")

    def store_masked(
        self, value: ir.Value, where: ir.Value, mask: ir.Value | None, align: int, suffix: str
    ) -> None:
        """Store the lanes of ``mask`` (None: all) of a vector of any element type."""
        if mask is None:
            self.b.store(value, where, align=align)
            return
        if isinstance(mask, ir.Constant) and mask.constant == self.lane_mask(1).constant:
            # LLVM 22 turns a truncated vector stored through such a mask into a store of the
            # element before truncation: four bytes where one is meant.
            self.b.store(self.b.extract_element(value, I32(0)), where, align=align)
            return
        kinds = [value.type, PTR, I32, self.mask_type]
        fn = self.intrinsic(f"llvm.masked.store.v{self.lanes}{suffix}.p0", VOID, kinds)
        self.b.call(fn, [value, where, I32(align), mask])

    def prefetch(
        self, pointer: ir.Value, offset: Int = 0, near: bool = True, write: bool = False
    ) -> None:
        """Ask for the cache line of an address that will be read; any address will do.

        ``near``: into the first cache, else into the second. ``write``: to write to it.
        """
        fn = self.intrinsic("llvm.prefetch.p0", VOID, [PTR, I32, I32, I32])
        kind, keep, data = I32(int(write)), I32(3 if near else 2), I32(1)
        self.b.call(fn, [self.at(pointer, offset), kind, keep, data])

    def stack(self, words: int) -> ir.Value:
        """``words`` i64 on the stack."""
        place = self.b.alloca(I64, words)
        where = self.b.gep(place, [I64(0)], source_etype=I64)
        where.type = PTR  # llvmlite types an alloca's pointer; everything here is opaque
        return where

    def zero_fill(self, pointer: ir.Value, count: Int) -> None:
        """Zero ``count`` float32 elements."""
        fn = self.intrinsic("llvm.memset.p0.i64", VOID, [PTR, I8, I64, I1])
        self.b.call(fn, [pointer, I8(0), self.i(self.mul(count, 4)), I1(0)])

    def copy(self, to: ir.Value, source: ir.Value, count: Int) -> None:
        """Copy ``count`` float32 elements between places that do not overlap."""
        fn = self.intrinsic("llvm.memcpy.p0.p0.i64", VOID, [PTR, PTR, I64, I1])
        self.b.call(fn, [to, source, self.i(self.mul(count, 4)), I1(0)])

    # ---------------------------------------------------------------- vectors

    def intrinsic(self, name: str, result: ir.Type, kinds: Sequence[ir.Type]) -> ir.Function:
        """Declare an LLVM intrinsic once (llvmlite's own declaration fails on vector types)."""
        found = self.module.globals.get(name)
        return found or ir.Function(self.module, ir.FunctionType(result, kinds), name)

    @property
    def zero(self) -> ir.Value:
        """A vector of zeros."""
        return ir.Constant(self.vector, [0.0] * self.lanes)

    def constant(self, value: float) -> ir.Value:
        """A vector whose lanes all hold ``value``."""
        return ir.Constant(self.vector, [value] * self.lanes)

    def integers(self, value: int) -> ir.Value:
        """A vector of i32 whose lanes all hold ``value``."""
        return ir.Constant(self.ints, [value] * self.lanes)

    def splat(self, scalar: ir.Value) -> ir.Value:
        """A vector whose lanes all hold ``scalar`` (float32, i32 or i64)."""
        kind = ir.VectorType(scalar.type, self.lanes)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        index = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), index)

    def broadcast(self, pointer: ir.Value, offset: Int = 0) -> ir.Value:
        """Load one float32 into every lane."""
        return self.splat(self.b.load(self.at(pointer, offset), align=4, typ=F32))

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, fused where the target can (``llvm.fma`` would call libm elsewhere)."""
        fn = self.intrinsic(f"llvm.fmuladd.v{self.lanes}f32", self.vector, [self.vector] * 3)
        return self.b.call(fn, [a, b, c])

    def lane_mask(self, valid: Int) -> ir.Value:
        """Lanes 0 <= i < ``valid`` (``valid`` may be negative or beyond the lanes)."""
        if isinstance(valid, int):
            return ir.Constant(self.mask_type, [int(i < valid) for i in range(self.lanes)])
        iota = ir.Constant(self.ints, list(range(self.lanes)))
        clipped = self.min(self.max(valid, 0), self.lanes)
        return self.b.icmp_signed("<", iota, self.splat(self.b.trunc(clipped, I32)))

    def gather(self, pointer: ir.Value, stride: Int, mask: ir.Value) -> ir.Value:
        """Lanes ``pointer[i * stride]``; lanes outside ``mask`` read 0."""
        where = self._strided(pointer, stride)
        kinds = [where.type, I32, self.mask_type, self.vector]
        name = f"llvm.masked.gather.v{self.lanes}f32.v{self.lanes}p0"
        fn = self.intrinsic(name, self.vector, kinds)
        return self.b.call(fn, [where, I32(4), mask, self.zero])

    def scatter(self, value: ir.Value, pointer: ir.Value, stride: Int, mask: ir.Value) -> None:
        """Store lanes to ``pointer[i * stride]``; lanes outside ``mask`` are dropped."""
        where = self._strided(pointer, stride)
        kinds = [self.vector, where.type, I32, self.mask_type]
        fn = self.intrinsic(f"llvm.masked.scatter.v{self.lanes}f32.v{self.lanes}p0", VOID, kinds)
        self.b.call(fn, [value, where, I32(4), mask])

    def _strided(self, pointer: ir.Value, stride: Int) -> ir.Value:
        iota = ir.Constant(ir.VectorType(I64, self.lanes), list(range(self.lanes)))
        offsets = self.b.mul(iota, self.splat(self.i(stride)))
        result = self.b.gep(pointer, [offsets], source_etype=F32)
        result.type = ir.VectorType(PTR, self.lanes)
        return result
