"""From the gradient of a block's result to that of its convolution's output, in one pass.

Undoes pool and activation together: every window gives its gradient to the taps it looked at (a
maximum to its winner alone, an average to all), times the activation's derivative. A block
without a pool is a window of one tap. With the identity as activation this is the backward pass
of a pooling layer.

What the derivative is told from, the activation's result: with a max pool the pooled output (only
winners get a gradient, and their value is the output); else the map before the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from ..geometry import Window
from ..reductions import REDUCTIONS
from ..steps import Act, Pooling
from ..target import Target
from . import epilogue as ep
from . import pool as pooling
from .lanes import F32, I32, I64, Emitter, Int
from .runtime import Kernel, compile_kernel

SCATTERED_TAPS = 64
"""Up to so many taps windows that do not overlap write all of them, zeros too: a pass less."""

ONE_TAP = Pooling("max", Window(1), Window(1))


@dataclass(frozen=True)
class PoolBackwardPlan:
    """Everything the kernel is specialised on; ``pool`` None: only the activation is undone."""

    target: Target
    channels: int
    act: Act
    pool: Pooling | None
    whole: bool = False
    """Whether the window is the whole map, of any size; ``pool`` is ``pool.of_one_tap``."""

    @property
    def windows(self) -> Pooling:
        """The pool, or windows of one tap."""
        return self.pool or ONE_TAP

    @property
    def selects(self) -> bool:
        """Whether one tap wins and gets all."""
        return REDUCTIONS[self.windows.kind].selects

    @property
    def disjoint(self) -> bool:
        """Whether no input belongs to two windows: rows of windows are then independent."""
        return all(w.stride >= w.span for w in (self.windows.rows, self.windows.cols))

    @property
    def covers(self) -> bool:
        """Whether the windows leave no gap between them."""
        return self.disjoint and all(
            w.dilation == 1 and w.stride == w.size for w in (self.windows.rows, self.windows.cols)
        )

    @property
    def scatters(self) -> bool:
        """Whether each channel's gradient is brought to its winner, tap by tap being too many."""
        taps = self.windows.rows.size * self.windows.cols.size
        few = SCATTERED_TAPS if self.disjoint else pooling.UNROLLED_TAPS
        return self.pool is not None and self.selects and taps > few

    @property
    def reads_result(self) -> bool:
        """Whether the activation's result is needed."""
        return self.act.name != "identity"

    @property
    def result_per_window(self) -> bool:
        """Whether that result is the pooled output rather than the map before the pool."""
        return self.selects

    @property
    def name(self) -> str:
        """A name for the listing."""
        p = self.windows
        if self.whole:
            return f"unpool_{p.kind}_whole_{self.act.name}_c{self.channels}"
        return f"unpool_{p.kind}{p.rows.size}x{p.cols.size}_{self.act.name}_c{self.channels}"


FIELDS = (
    "grad*", "grad_image", "grad_row", "grad_pixel", "rows", "cols",
    "out*", "out_image", "out_row", "out_pixel", "height", "width",
)  # fmt: skip


def fields(plan: PoolBackwardPlan) -> tuple[str, ...]:
    """What a step of this plan passes."""
    names: tuple[str, ...] = FIELDS
    if plan.reads_result:
        names += ("result*", "result_image", "result_row", "result_pixel")
    if plan.pool and plan.selects:
        names += ("winners*", "winners_row", "winners_pixel")
    return names


def items(plan: PoolBackwardPlan, batch: int, rows: int) -> int:
    """Work items: rows of windows where they are independent, else whole images."""
    return batch * rows if plan.disjoint else batch


def emit(plan: PoolBackwardPlan) -> Kernel:
    """Compile the kernel of a plan."""
    e = Emitter(plan.target, plan.name)
    names = fields(plan)
    with e.kernel(names) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            if plan.disjoint:
                image, row = e.divmod(number, f.rows)
                _clear(e, plan, f, image, row)
                _window_row(e, plan, f, image, row)
            else:
                _clear(e, plan, f, number, None)
                e.loop(0, f.rows, lambda row: _window_row(e, plan, f, number, row))

        e.loop(begin, end, item)
    return compile_kernel(e, names)


def _clear(e: Emitter, plan: PoolBackwardPlan, f, image: ir.Value, row: ir.Value | None) -> None:
    """Zero the map rows that belong to a row of windows (None: the image), gaps included."""
    start, stop, own = 0, f.height, 0
    if row is not None:
        window = plan.windows.rows
        own = e.sub(e.mul(row, window.stride), window.low)
        start = e.max(own, 0)
        is_last = e.equal(row, e.sub(f.rows, 1))
        stop = e.b.select(is_last, f.height, e.min(e.add(own, window.stride), f.height))
    size = e.mul(f.width, f.out_pixel)

    def clear(y: Int) -> None:
        e.zero_fill(e.at(f.out, e.add(e.mul(image, f.out_image), e.mul(y, f.out_row))), size)

    if plan.whole:
        return
    if not plan.covers or plan.scatters:
        e.loop(start, stop, clear)
        return
    # Windows without gaps write every input but those behind the last column and row of windows.
    # (The first column reaches input 0, for its padding is smaller than the window.)
    cols = plan.windows.cols
    reached = e.min(e.sub(e.mul(f.cols, cols.stride), cols.low), f.width)
    left_over = e.mul(e.sub(f.width, reached), f.out_pixel)

    def clear_right(y: Int) -> None:
        where = e.add(e.mul(image, f.out_image), e.mul(y, f.out_row))
        e.zero_fill(e.at(f.out, e.add(where, e.mul(reached, f.out_pixel))), left_over)

    e.loop(start, stop, clear_right)
    e.loop(e.max(start, e.min(e.add(own, plan.windows.rows.size), stop)), stop, clear)


def _window_row(e: Emitter, plan: PoolBackwardPlan, f, image: ir.Value, row: ir.Value) -> None:
    pool = pooling.of_size(plan.windows, f.height, f.width) if plan.whole else plan.windows
    top = e.sub(e.mul(row, pool.rows.stride), pool.rows.low)

    def window(o: Int, rows: pooling.Bounds, cols: pooling.Bounds) -> None:
        def channels(first: Int, vectors: int, masks) -> None:
            for j in range(vectors):
                channel = e.add(first, j * e.lanes)
                _window(e, plan, pool, f, image, row, o, (rows, cols), channel, masks[j])

        pooling.channel_blocks(e, plan.channels, channels)

    pooling.each_window(e, pool, top, f.cols, (f.height, f.width), window)


def _within(e: Emitter, tap: ir.Value, axis: pooling.Bounds) -> ir.Value:
    """Whether a tap of a window is one on the map."""
    return e.b.and_(e.b.icmp_signed(">=", tap, e.i(axis.low)), e.less(tap, axis.high))


def _window(e: Emitter, plan, pool, f, image, row, o, box, channel: Int, mask) -> None:
    """One window's gradient on one vector of channels."""
    rows, cols = box

    def place(pointer, image_stride, row_stride, pixel_stride, y, x) -> ir.Value:
        offset = e.add(e.mul(image, image_stride), e.mul(y, row_stride))
        return e.at(pointer, e.add(e.add(offset, e.mul(x, pixel_stride)), channel))

    grad = e.vload(place(f.grad, f.grad_image, f.grad_row, f.grad_pixel, row, o), 0, mask)
    winner = None
    if plan.reads_result and plan.result_per_window:
        where = place(f.result, f.result_image, f.result_row, f.result_pixel, row, o)
        grad = ep.activation_gradient(e, plan.act, e.vload(where, 0, mask), grad)
    if plan.pool and plan.selects:
        line = e.add(e.mul(image, f.rows), row)
        offset = e.add(e.mul(line, f.winners_row), e.mul(o, f.winners_pixel))
        size = pooling.winner_type(pool).width // 8
        where = e.at_byte(f.winners, e.mul(e.add(offset, channel), size))
        winner = pooling.load_winners(e, pool, where, mask)
    elif not plan.selects:
        grad = e.b.fdiv(grad, e.splat(pooling.divisor(e, pool, rows, cols)))

    if plan.scatters:
        assert winner is not None

        def lane(i: Int) -> None:
            number = I32(i) if isinstance(i, int) else e.b.trunc(i, I32)
            tap = e.b.zext(e.b.extract_element(winner, number), I64)
            kh, kw = e.divmod(tap, pool.cols.size)
            # Whoever calls the operator by hand may bring any numbers: these go nowhere.
            known = e.b.and_(_within(e, kh, rows), _within(e, kw, cols))
            kh, kw = e.b.select(known, kh, e.i(rows.low)), e.b.select(known, kw, e.i(cols.low))
            y = e.add(rows.start, e.mul(kh, pool.rows.dilation))
            x = e.add(cols.start, e.mul(kw, pool.cols.dilation))
            where = place(f.out, f.out_image, f.out_row, f.out_pixel, y, x)
            where = e.at(where, i)
            part = e.b.select(known, e.b.extract_element(grad, number), ir.Constant(F32, 0.0))
            total = e.b.fadd(e.load(F32, where), part)
            e.b.store(total, where, align=4)

        if mask is not None:
            e.loop(0, e.min(e.sub(plan.channels, channel), e.lanes), lane)
            return
        for i in range(e.lanes):
            lane(i)
        return

    def visit(kh: Int, kw: Int) -> None:
        y = e.add(rows.start, e.mul(kh, pool.rows.dilation))
        x = e.add(cols.start, e.mul(kw, pool.cols.dilation))
        value = grad
        if winner is not None:
            code = e.splat(e.b.trunc(e.i(pooling.tap_code(e, pool, kh, kw)), e.ints.element))
            value = e.b.select(e.b.icmp_signed("==", winner, code), grad, e.zero)
        if plan.reads_result and not plan.result_per_window:
            where = place(f.result, f.result_image, f.result_row, f.result_pixel, y, x)
            value = ep.activation_gradient(e, plan.act, e.vload(where, 0, mask), value)
        where = place(f.out, f.out_image, f.out_row, f.out_pixel, y, x)
        if not plan.disjoint:
            value = e.b.fadd(e.vload(where, 0, mask), value)
        e.vstore(value, where, 0, mask)

    pooling.each_tap(e, rows, cols, (), visit)
