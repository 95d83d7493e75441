"""Adding pieces of rows where they belong: what stands behind the products of a strided gradient.

A window of a strided convolution spreads the gradient of its output over the inputs it read. The
products are there already, a line of them for every window; each row of the result is cleared, or
left as it stands, and takes its pieces, which may overlap:

    for l in lines of the row:  for (to, from, length) in runs:
        out[row][to : to + length] += x[l][from : from + length]

Depthwise layers have nothing to sum beforehand. ``x`` is the gradient itself, a run is one pixel's
channels, ``length`` the offset of its tap in the packed weights ([vector][tap][lanes]), and the
product is made here: ``out[to + c] += x[from + c] * w[c]``.

Lines and runs are tables: one kernel serves every size, stride, dilation and kernel size. Work
items: images x rows; no two write the same memory, and each adds in the order of its tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from ..target import Target
from .lanes import I64, Emitter, Int
from .runtime import Kernel, compile_kernel

RUN = 3
"""Numbers in the table for each run."""

FIELDS = (
    "x*", "x_image", "out*", "out_image", "out_row", "rows", "size", "clear",
    "starts*", "lines*", "runs*", "n_runs",
)  # fmt: skip
"""``starts``: for each row where its ``lines`` begin, and the end of the last one's. A line is the
element of an image of ``x`` that its runs count from. ``size``: elements of a row of the result.
``clear``: 1 if what stands there is not to be added to."""

DEPTHWISE = ("w*", "w_line*", "taps", "channels")
"""``w_line``: for each line, its offset in the weights of one vector."""


@dataclass(frozen=True)
class ScatterPlan:
    """Everything the kernel is specialised on."""

    target: Target
    depthwise: bool = False

    @property
    def name(self) -> str:
        """A name for the listing."""
        return "scatter_depthwise" if self.depthwise else "scatter"


def emit(plan: ScatterPlan) -> Kernel:
    """Compile the kernel of a plan."""
    e = Emitter(plan.target, plan.name)
    names = FIELDS + (DEPTHWISE if plan.depthwise else ())
    with e.kernel(names) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            image, row = e.divmod(number, f.rows)
            out = e.at(f.out, e.add(e.mul(image, f.out_image), e.mul(row, f.out_row)))
            x = e.at(f.x, e.mul(image, f.x_image))
            e.choose(e.equal(f.clear, 1), lambda: e.zero_fill(out, f.size))
            first, last = (e.load(I64, f.starts, e.add(row, i)) for i in (0, 1))

            def line(number: Int) -> None:
                source = e.at(x, e.load(I64, f.lines, number))
                w = None
                if plan.depthwise:
                    w = e.at(f.w, e.load(I64, f.w_line, number))

                def run(r: Int) -> None:
                    entry = e.mul(r, RUN)
                    to, at, last = (e.load(I64, f.runs, e.add(entry, i)) for i in range(RUN))
                    if w is None:
                        _add(e, e.at(out, to), e.at(source, at), last)
                    else:
                        _add_products(e, f, e.at(out, to), e.at(source, at), e.at(w, last))

                e.loop(0, f.n_runs, run)

            e.loop(first, last, line)

        e.loop(begin, end, item)
    return compile_kernel(e, names)


def _add(e: Emitter, to: ir.Value, source: ir.Value, length: Int) -> None:
    def vector(i: Int, mask: ir.Value | None) -> None:
        e.vstore(e.b.fadd(e.vload(to, i, mask), e.vload(source, i, mask)), to, i, mask)

    _vectors(e, length, vector)


def _add_products(e: Emitter, f, to: ir.Value, source: ir.Value, w: ir.Value) -> None:
    def vector(c: Int, mask: ir.Value | None) -> None:
        weights = e.vload(w, e.mul(c, f.taps))  # of whole vectors, each behind all taps of the last
        e.vstore(e.fma(e.vload(source, c, mask), weights, e.vload(to, c, mask)), to, c, mask)

    _vectors(e, f.channels, vector)


def _vectors(e: Emitter, count: Int, visit) -> None:
    """``visit(first element, mask)`` for each vector; the last may be masked."""
    rest = e.divmod(count, e.lanes)[1]
    whole = e.sub(count, rest)
    e.loop(0, whole, lambda i: visit(i, None), step=e.lanes)
    e.choose(e.less(0, rest), lambda: visit(whole, e.lane_mask(rest)))
