"""Pooling: windows over one map, reduced without weights, channels in the lanes.

:func:`pool_row` reduces one row of windows. It serves the pooling layer, whose source is a map in
memory, and the direct convolution's epilogue, whose source is a ring of rows just computed.
Padding never exists in memory: windows are clipped to the map, as PyTorch defines both pools.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from llvmlite import ir

from ..errors import Unsupported
from ..geometry import Window
from ..steps import Pooling, Step
from ..target import Target
from . import epilogue as ep
from .lanes import F32, I8, I32, I64, Emitter, Int
from .runtime import Kernel, compile_kernel

UNROLLED_TAPS = 16
"""Windows of up to this many taps get straight code where no border clips them."""


class _Max:
    """The greatest value and which tap held it; the first of equals, a NaN before all (torch).

    ``init`` is the state before any tap, ``combine`` adds a tap, ``whole`` takes all at once.
    """

    def __init__(self, pool: Pooling, winners: bool):
        self.winners = winners

    def init(self, e: Emitter, first_tap: Int) -> list[ir.Value]:
        code = e.splat(e.b.trunc(e.i(first_tap), I32))
        return [e.constant(float("-inf"))] + ([code] if self.winners else [])

    def combine(self, e: Emitter, state, value: ir.Value, code: Int) -> list[ir.Value]:
        greater = e.b.fcmp_ordered(">", value, state[0])
        better = e.b.or_(greater, e.b.fcmp_unordered("uno", value, value))
        result = [e.b.select(better, value, state[0])]
        if self.winners:
            tap = e.splat(e.b.trunc(e.i(code), I32))
            result.append(e.b.select(better, tap, state[1]))
        return result

    def whole(self, e: Emitter, values: Sequence[ir.Value]) -> list[ir.Value]:
        if self.winners:
            state = [values[0], e.splat(I32(0))]
            for code, value in enumerate(values[1:], 1):
                state = self.combine(e, state, value, code)
            return state
        # A maximum is one instruction where NaN need not pass; one comparison tells it of two.
        best, nans = values[0], []
        for value in values[1:]:
            best = e.b.select(e.b.fcmp_ordered(">", value, best), value, best)
        for pair in zip(values[::2], [*values[1::2], *values[-1:]], strict=False):
            nans.append(e.b.fcmp_unordered("uno", *pair))
        nan = functools.reduce(e.b.or_, nans)
        return [e.b.select(nan, e.constant(float("nan")), best)]

    def finish(self, e: Emitter, state, divisor: ir.Value) -> ir.Value:
        return state[0]


class _Mean:
    """The sum over the taps inside the map, divided once."""

    winners = False

    def __init__(self, pool: Pooling, winners: bool):
        pass

    def init(self, e: Emitter, first_tap: Int) -> list[ir.Value]:
        return [e.zero]

    def combine(self, e: Emitter, state, value: ir.Value, code: Int) -> list[ir.Value]:
        return [e.b.fadd(state[0], value)]

    def whole(self, e: Emitter, values: Sequence[ir.Value]) -> list[ir.Value]:
        return [functools.reduce(e.b.fadd, values)]

    def finish(self, e: Emitter, state, divisor: ir.Value) -> ir.Value:
        return e.b.fdiv(state[0], e.splat(divisor))


REDUCTIONS: dict[str, type[_Max] | type[_Mean]] = {"max": _Max, "mean": _Mean}
"""As in neocog.reductions, in IR: the only other place to touch for a new pooling kind."""


@dataclass
class Source:
    """A map to pool: ``row(y)`` is the address of row y, pixels ``pixel`` elements apart."""

    row: Callable[[Int], ir.Value]
    pixel: Int
    height: Int
    width: Int
    of: Callable[[ir.Value, int], ir.Value] = lambda value, vector: value
    """What is pooled of a value that is read, and of the how-manieth vector of channels it is."""


@dataclass
class Sink:
    """Where a row of results goes; ``winners`` (bytes or i32) only if they are wanted."""

    out: ir.Value
    out_pixel: Int
    winners: ir.Value | None = None
    winners_pixel: Int = 0


@dataclass(frozen=True)
class Bounds:
    """One axis of one window clipped to the map: taps ``low <= k < high``.

    Where the window is known to lie inside, the numbers are Python ints.
    """

    start: Int
    low: Int
    high: Int
    padded: Int
    """Taps on the map or its padding: what an average with ``count_include_pad`` divides by."""


def bounds(e: Emitter, window: Window, start: Int, n: Int) -> Bounds:
    """The window that starts at position ``start`` of an axis of ``n`` inputs."""

    def taps_below(position: Int) -> ir.Value:
        # The number of k >= 0 with start + k*dilation < position, at most the kernel size.
        reach = e.max(e.sub(position, start), 0)
        return e.min(e.divmod(e.add(reach, window.dilation - 1), window.dilation)[0], window.size)

    return Bounds(start, taps_below(0), taps_below(n), taps_below(e.add(n, window.high)))


def inside(window: Window, start: Int) -> Bounds:
    """The window that starts at ``start`` and lies whole on the map."""
    return Bounds(start, 0, window.size, window.size)


def each_window(
    e: Emitter,
    pool: Pooling,
    top: Int,
    count: Int,
    size: tuple[Int, Int],
    visit: Callable[[Int, Bounds, Bounds], None],
) -> None:
    """``visit(o, rows, cols)`` for the ``count`` windows whose first row is ``top``.

    Windows that lie inside the map of ``size`` (height, width) come first, with bounds known at
    compile time, then those that a border clips.
    """
    rows, window = bounds(e, pool.rows, top, size[0]), pool.cols

    def left(o: Int) -> Int:
        return e.sub(e.mul(o, window.stride), window.low)

    def clipped(o: Int) -> None:
        visit(o, rows, bounds(e, window, left(o), size[1]))

    if not isinstance(window.size, int):  # the whole map
        visit(0, inside(pool.rows, 0), inside(window, 0))
        return
    if pool.rows.size * window.size > UNROLLED_TAPS:
        e.loop(0, count, clipped)
        return
    first = -(-window.low // window.stride)
    room = e.sub(e.add(size[1], window.low), window.span)
    fitting = e.add(e.divmod(e.max(room, 0), window.stride)[0], 1)
    last = e.b.select(e.less(room, 0), I64(0), e.min(fitting, count))
    rows_inside = e.b.and_(e.equal(rows.low, 0), e.equal(rows.high, pool.rows.size))
    number = e.b.select(rows_inside, e.max(e.sub(last, first), 0), I64(0))

    def whole(o: Int) -> None:
        visit(o, inside(pool.rows, top), inside(window, left(o)))

    def rest(i: Int) -> None:
        clipped(e.add(i, e.b.select(e.less(i, first), I64(0), number)))

    e.loop(first, e.add(number, first), whole)
    e.loop(0, e.sub(count, number), rest)


def each_tap(
    e: Emitter,
    rows: Bounds,
    cols: Bounds,
    carry: Sequence[ir.Value],
    visit: Callable[..., Sequence[ir.Value] | None],
) -> list[ir.Value]:
    """``carry = visit(kh, kw, *carry)`` for every tap inside the map, in row-major order."""
    if isinstance(rows.high, int) and isinstance(cols.high, int):
        state = list(carry)
        for kh in range(rows.high):
            for kw in range(cols.high):
                state = list(visit(kh, kw, *state) or ())
        return state

    def row(kh: Int, *state: ir.Value) -> list[ir.Value]:
        return e.loop(cols.low, cols.high, lambda kw, *s: visit(kh, kw, *s), state)

    return e.loop(rows.low, rows.high, row, carry)


def divisor(e: Emitter, pool: Pooling, rows: Bounds, cols: Bounds) -> ir.Value:
    """What an average divides by, as float32."""
    if pool.divisor_override is not None:
        return ir.Constant(F32, float(pool.divisor_override))
    if pool.count_include_pad:
        # Padding below the map counts, also where ceil mode lets a window hang over its end.
        count = e.mul(rows.padded, cols.padded)
    else:
        count = e.mul(e.sub(rows.high, rows.low), e.sub(cols.high, cols.low))
    return e.b.sitofp(e.i(count), F32)


def tap_code(e: Emitter, pool: Pooling, kh: Int, kw: Int) -> Int:
    """The number of a tap within its window: kh * KW + kw."""
    return e.add(e.mul(kh, pool.cols.size), kw)


def winner_type(pool: Pooling) -> ir.IntType:
    """One byte per winner where every tap number fits, else 32 bits; Unsupported beyond these."""
    taps = pool.rows.size * pool.cols.size
    if taps > 1 << 31:
        raise Unsupported(f"which of the window's {taps} taps wins: kernels count to 2**31")
    return I8 if taps <= 256 else I32


def load_winners(e: Emitter, pool: Pooling, where: ir.Value, mask: ir.Value | None) -> ir.Value:
    """A vector of winners as i32; lanes outside ``mask`` read 0."""
    kind = winner_type(pool)
    values = ir.VectorType(kind, e.lanes)
    if mask is None:
        loaded = e.b.load(where, align=1, typ=values)
    else:
        loaded = e.load_masked(values, where, mask, 1, f"i{kind.width}")
    return loaded if kind is I32 else e.b.zext(loaded, e.ints)


def pool_row(
    e: Emitter,
    pool: Pooling,
    source: Source,
    sink: Sink,
    top: Int,
    count: Int,
    vectors: int,
    masks: Sequence[ir.Value | None],
) -> None:
    """``count`` windows whose first row stands at ``top``, on ``vectors`` vectors of channels."""
    reduction = REDUCTIONS[pool.kind](pool, sink.winners is not None)

    def tap(kh: Int, kw: Int, start: Int) -> ir.Value:
        y = e.add(top, e.mul(kh, pool.rows.dilation))
        x = e.add(start, e.mul(kw, pool.cols.dilation))
        return e.at(source.row(y), e.mul(x, source.pixel))

    def clipped(rows: Bounds, cols: Bounds) -> list[ir.Value]:
        def visit(kh: Int, kw: Int, *states: ir.Value) -> list[ir.Value]:
            where = tap(kh, kw, cols.start)
            code, size, result = tap_code(e, pool, kh, kw), len(states) // vectors, []
            for j in range(vectors):
                value = source.of(e.vload(where, j * e.lanes, masks[j]), j)
                result += reduction.combine(e, states[j * size : (j + 1) * size], value, code)
            return result

        first = tap_code(e, pool, rows.low, cols.low)
        return each_tap(e, rows, cols, reduction.init(e, first) * vectors, visit)

    def unclipped(cols: Bounds) -> list[ir.Value]:
        taps = itertools.product(range(pool.rows.size), range(pool.cols.size))
        places = [tap(kh, kw, cols.start) for kh, kw in taps]
        states = []
        for j in range(vectors):
            values = [source.of(e.vload(where, j * e.lanes, masks[j]), j) for where in places]
            states += reduction.whole(e, values)
        return states

    def window(o: Int, rows: Bounds, cols: Bounds) -> None:
        known = isinstance(rows.high, int) and isinstance(cols.high, int)
        states = unclipped(cols) if known else clipped(rows, cols)
        size, by = len(states) // vectors, divisor(e, pool, rows, cols)
        out = e.at(sink.out, e.mul(o, sink.out_pixel))
        for j in range(vectors):
            state = states[j * size : (j + 1) * size]
            e.vstore(reduction.finish(e, state, by), out, j * e.lanes, masks[j])
            if sink.winners is not None:
                kind = winner_type(pool)
                offset = e.mul(e.add(e.mul(o, sink.winners_pixel), j * e.lanes), kind.width // 8)
                code = state[1] if kind is I32 else e.b.trunc(state[1], ir.VectorType(I8, e.lanes))
                where = e.at_byte(sink.winners, offset)
                e.store_masked(code, where, masks[j], 1, f"i{kind.width}")

    each_window(e, pool, top, count, (source.height, source.width), window)


@dataclass(frozen=True)
class PoolPlan:
    """Everything a pooling kernel is specialised on."""

    target: Target
    pool: Pooling
    channels: int
    winners: bool = False
    before: tuple[Step, ...] = ()
    """Affine steps and activations of every value that is read."""
    whole: bool = False
    """Whether the window is the whole map, of any size; ``pool`` is :func:`of_one_tap`."""

    @property
    def name(self) -> str:
        """A name for the listing."""
        p, before = self.pool, ep.spelled(self.before)
        if self.whole:
            return f"pool_{p.kind}_whole_c{self.channels}{before}"
        return f"pool_{p.kind}{p.rows.size}x{p.cols.size}_c{self.channels}{before}"


def of_one_tap(pool: Pooling) -> Pooling:
    """The pool, whatever the size of its window."""
    return replace(pool, rows=Window(1), cols=Window(1))


def of_size(pool: Pooling, height: ir.Value, width: ir.Value) -> Any:
    """The pool with one window of a size that arrives at run time."""
    rows, cols = (
        SimpleNamespace(size=n, span=n, stride=1, dilation=1, low=0, high=0)
        for n in (height, width)
    )
    return SimpleNamespace(
        kind=pool.kind, rows=rows, cols=cols, count_include_pad=pool.count_include_pad,
        divisor_override=pool.divisor_override,
    )  # fmt: skip


POOL = (
    "x*", "x_image", "x_row", "x_pixel", "height", "width",
    "out*", "out_image", "out_row", "out_pixel", "rows", "cols",
)  # fmt: skip
VECTORS = 4
"""Vectors of channels a window is reduced on at once."""


def channel_blocks(e: Emitter, channels: int, visit: Callable) -> None:
    """``visit(first channel, vectors, masks)`` over all channels, whole blocks in a loop."""
    block = VECTORS * e.lanes
    whole = channels - channels % block

    def body(c: Int) -> None:
        visit(c, VECTORS, [None] * VECTORS)

    e.loop(0, whole, body, step=block)
    rest = channels - whole
    if rest:
        vectors = -(-rest // e.lanes)
        masks = [e.lane_mask(rest - j * e.lanes) for j in range(vectors)]
        visit(whole, vectors, [None if rest >= (j + 1) * e.lanes else masks[j]
                               for j in range(vectors)])  # fmt: skip


def emit(plan: PoolPlan) -> Kernel:
    """Compile a pooling layer. Items: images x pooled rows."""
    e = Emitter(plan.target, plan.name)
    names = POOL + (("winners*", "winners_row", "winners_pixel") if plan.winners else ())
    names += tuple(f"{name}*" for name in ep.parameters(plan.before))
    with e.kernel(names) as (f, begin, end, _):
        pool = of_size(plan.pool, f.height, f.width) if plan.whole else plan.pool

        def item(number: ir.Value) -> None:
            image, row = e.divmod(number, f.rows)
            x = e.at(f.x, e.mul(image, f.x_image))
            out = e.at(f.out, e.add(e.mul(image, f.out_image), e.mul(row, f.out_row)))
            top = e.sub(e.mul(row, pool.rows.stride), pool.rows.low)

            def channels(first: Int, vectors: int, masks) -> None:
                def source_row(y: Int) -> ir.Value:
                    return e.at(x, e.add(e.mul(y, f.x_row), first))

                sink = Sink(e.at(out, first), f.out_pixel)
                if plan.winners:
                    where = e.add(e.mul(number, f.winners_row), first)
                    size = winner_type(plan.pool).width // 8
                    sink.winners = e.at_byte(f.winners, e.mul(where, size))
                    sink.winners_pixel = f.winners_pixel
                loaded = [
                    ep.load_parameters(e, plan.before, f, e.add(first, j * e.lanes), masks[j])
                    for j in range(vectors)
                ]

                def of(value: ir.Value, j: int) -> ir.Value:
                    return ep.finish(e, plan.before, [value], loaded[j], lambda _: e.zero)[0]

                source = Source(source_row, f.x_pixel, f.height, f.width, of)
                pool_row(e, pool, source, sink, top, f.cols, vectors, masks)

            channel_blocks(e, plan.channels, channels)

        e.loop(begin, end, item)
    return compile_kernel(e, names)
