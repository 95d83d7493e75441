"""Batch norm while training: the statistics of a batch, and the gradient through them.

Of a map y with N pixels per channel (Ioffe and Szegedy 2015, arXiv:1502.03167):

    mean = sum(y) / N,  var = sum((y - mean)^2) / N,  s = 1 / sqrt(var + eps)
    z = weight * s * (y - mean) + bias
    dbias = sum(g),  dweight = s * sum(g * (y - mean))
    dy = weight * s * (g - dbias / N - (y - mean) * s * dweight / N)

where g is the gradient of z, an activation behind it undone on the way. All sums are taken in
float64, like PyTorch's: one value may be larger than all others by many orders, and gradients may
cancel. The squares are those of the distance from each channel's first value (from 0, if that is
not finite). It may be the odd one out, but being one of the N, it lies no farther from the mean
than sqrt(N) standard deviations: the difference that leaves the variance costs at most a factor of
N, of float64's 2^-53. The work items depend on the problem alone: the same bits come out on any
number of threads.

Vectors per channel stand in rows of whole registers (``row_of``): nothing is masked in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from llvmlite import ir

from ..steps import Act
from ..target import Target
from . import epilogue as ep
from .lanes import Emitter, Int
from .pool import channel_blocks
from .runtime import Kernel, compile_kernel

F64 = ir.DoubleType()

MEAN, RECIPROCAL, SCALE, SHIFT, VARIANCE = range(5)
"""Rows of the statistics of a layer: mean, s, weight * s, bias - mean * weight * s, and the
variance with N - 1 in place of N, which running statistics take."""
STATISTICS = 5

MEAN_GRADIENT, SLOPE = range(2)
"""Rows of what the gradient's second pass needs: dbias / N, and s * dweight / N."""
COEFFICIENTS = 2

SUMS = 2
"""Rows of a work item's sums, in float64."""

WIDE = 2
"""float32 elements that a float64 takes."""


def row_of(target: Target, channels: int) -> int:
    """float32 elements of a vector per channel."""
    return -(-channels // target.lanes) * target.lanes


def sums_elements(row: int) -> int:
    """float32 elements of a work item's sums, of rows of so many channels."""
    return SUMS * WIDE * row


@dataclass(frozen=True)
class MomentsPlan:
    """Sums of y less each channel's first value, and of the squares of that."""

    target: Target
    channels: int

    @property
    def name(self) -> str:
        """A name for the listing."""
        return f"moments_c{self.channels}"

    @property
    def maps(self) -> tuple[str, ...]:
        """The maps it reads."""
        return ("y",)


@dataclass(frozen=True)
class StatisticsPlan:
    """From sums, or from given means and variances, to the statistics.

    ``batch``: they are the batch's own, from its sums.
    """

    target: Target
    channels: int
    eps: float
    batch: bool
    weight: bool
    bias: bool

    @property
    def name(self) -> str:
        """A name for the listing."""
        return f"statistics_c{self.channels}"


@dataclass(frozen=True)
class NormGradientPlan:
    """A pass over the gradient of z and over y: sums, or the gradient of y.

    ``reads_z``: the activation is undone by z's own map; else by z computed anew from y.
    """

    target: Target
    channels: int
    act: Act
    sums: bool
    reads_z: bool = False
    residual: str = ""
    """What becomes of the residual's gradient: "write", "add" or nothing."""

    @property
    def name(self) -> str:
        """A name for the listing."""
        kind = "sums" if self.sums else "apply"
        return f"norm_gradient_{kind}_c{self.channels}+{self.act.name}"

    @property
    def maps(self) -> tuple[str, ...]:
        """The maps it reads and writes."""
        read = ("g", "y", *(("z",) if self.reads_z else ()))
        written = () if self.sums else ("out", *(("residual",) if self.residual else ()))
        return read + written


@dataclass(frozen=True)
class CoefficientsPlan:
    """From the sums of the gradient to those of weight and bias, and what the second pass needs.

    ``batch``: the statistics were the batch's own, and have a gradient.
    """

    target: Target
    channels: int
    batch: bool
    weight: bool
    bias: bool

    @property
    def name(self) -> str:
        """A name for the listing."""
        return f"norm_coefficients_c{self.channels}"


LINES = ("lines", "item_lines", "rows", "cols", "last_cols")
"""How pixels are shared out: ``item_lines`` of the ``lines`` to a work item, ``rows`` lines to an
image, ``cols`` pixels to a line, ``last_cols`` to the last of all."""


def line_fields(plan: MomentsPlan | NormGradientPlan) -> tuple[str, ...]:
    """What a step of a pass over lines passes."""
    places = ("*", "_image", "_row", "_pixel")
    names = LINES + tuple(f"{m}{place}" for m in plan.maps for place in places)
    if isinstance(plan, MomentsPlan):
        return (*names, "sums*")
    return (*names, "statistics*", "sums*" if plan.sums else "coefficients*")


def statistics_fields(plan: StatisticsPlan) -> tuple[str, ...]:
    """What a step passes; ``first``: the map's first pixel. Items: vectors of channels."""
    batch = ("first*", "sums*", "parts", "count")
    names = (*(batch if plan.batch else ("mean*", "variance*")), "statistics*")
    return names + ("weight*",) * plan.weight + ("bias*",) * plan.bias


def coefficients_fields(plan: CoefficientsPlan) -> tuple[str, ...]:
    """What a step passes. Items: vectors of channels."""
    names = ("sums*", "parts", "count", "statistics*", "coefficients*")
    return names + ("gweight*",) * plan.weight + ("gbias*",) * plan.bias


def emit_lines(plan: MomentsPlan | NormGradientPlan) -> Kernel:
    """Compile a pass over lines."""
    e = Emitter(plan.target, plan.name)
    names = line_fields(plan)
    row = row_of(plan.target, plan.channels)
    with e.kernel(names) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            sums = None
            if "sums*" in names:
                sums = e.at(f.sums, e.mul(number, sums_elements(row)))
                e.zero_fill(sums, sums_elements(row))
            first = e.mul(number, f.item_lines)
            last = e.min(e.add(first, f.item_lines), f.lines)
            e.loop(first, last, lambda line: _line(e, plan, f, line, sums))

        e.loop(begin, end, item)
    return compile_kernel(e, names)


def _line(e: Emitter, plan, f: SimpleNamespace, line: ir.Value, sums: ir.Value | None) -> None:
    image, y = e.divmod(line, f.rows)
    cols = e.b.select(e.equal(line, e.sub(f.lines, 1)), f.last_cols, f.cols)
    places = {}
    for name in plan.maps:
        offset = e.add(
            e.mul(image, getattr(f, f"{name}_image")), e.mul(y, getattr(f, f"{name}_row"))
        )
        places[name] = e.at(getattr(f, name), offset)
    row = row_of(plan.target, plan.channels)

    def block(first: Int, vectors: int, masks) -> None:
        offsets = [e.add(first, j * e.lanes) for j in range(vectors)]
        if isinstance(plan, MomentsPlan):
            starts = [_wide(e, _start(e, f.y, o, m)) for o, m in zip(offsets, masks, strict=True)]
        else:
            starts = [_channel_vectors(e, plan, f, o, row) for o in offsets]

        def pixel(p: Int, *totals: ir.Value) -> list[ir.Value]:
            made = list(totals)
            here = {
                n: e.at(place, e.mul(p, getattr(f, f"{n}_pixel"))) for n, place in places.items()
            }
            for j, (o, mask, start) in enumerate(zip(offsets, masks, starts, strict=True)):
                if isinstance(plan, MomentsPlan):
                    first = distance = e.b.fsub(_wide(e, e.vload(here["y"], o, mask)), start)
                else:
                    first, distance = _gradient(e, plan, here, o, mask, start)
                    if sums is None:
                        _apply(e, plan, here, o, mask, start, first, distance)
                        continue
                    first, distance = _wide(e, first), _wide(e, distance)
                made[2 * j] = e.b.fadd(made[2 * j], first)
                made[2 * j + 1] = _wide_fma(e, first, distance, made[2 * j + 1])
            return made

        totals = e.loop(0, cols, pixel, [_zeros(e)] * (2 * vectors if sums is not None else 0))
        for j, total in enumerate(totals):
            where = e.add(offsets[j // 2], j % 2 * row)
            _wide_store(e, e.b.fadd(_wide_load(e, sums, where), total), sums, where)

    channel_blocks(e, plan.channels, block)


def _start(e: Emitter, y: ir.Value, offset: Int, mask) -> ir.Value:
    """The first values of channels, from where distances are taken; 0 for one that has none."""
    first = e.vload(y, offset, mask)
    finite = e.b.fcmp_ordered("==", e.b.fsub(first, first), e.zero)
    return e.b.select(finite, first, e.zero)


def _channel_vectors(e: Emitter, plan: NormGradientPlan, f, offset: Int, row: int):
    def load(base: ir.Value, number: int) -> ir.Value:
        return e.vload(base, e.add(offset, number * row))

    found = SimpleNamespace(mean=load(f.statistics, MEAN), scale=load(f.statistics, SCALE))
    if plan.act.name != "identity" and not plan.reads_z:
        found.shift = load(f.statistics, SHIFT)
    if not plan.sums:
        found.mean_gradient = load(f.coefficients, MEAN_GRADIENT)
        found.slope = load(f.coefficients, SLOPE)
    return found


def _gradient(e: Emitter, plan: NormGradientPlan, here, offset: Int, mask, v):
    """(gradient before the activation, y - mean) of one vector."""
    g, y = e.vload(here["g"], offset, mask), e.vload(here["y"], offset, mask)
    if plan.act.name != "identity":
        if plan.reads_z:
            z = e.vload(here["z"], offset, mask)
        else:
            z = ep.activate(e, plan.act, e.fma(y, v.scale, v.shift))
        g = ep.activation_gradient(e, plan.act, z, g)
    return g, e.b.fsub(y, v.mean)


def _apply(e: Emitter, plan: NormGradientPlan, here, offset: Int, mask, v, g, distance) -> None:
    centred = e.b.fsub(g, v.mean_gradient)
    value = e.b.fmul(v.scale, e.fma(e.b.fneg(distance), v.slope, centred))
    if plan.residual:
        total = (
            g if plan.residual == "write" else e.b.fadd(e.vload(here["residual"], offset, mask), g)
        )
        e.vstore(total, here["residual"], offset, mask)
    e.vstore(value, here["out"], offset, mask)


# ------------------------------------------------------------------------------------ in float64


def _doubles(e: Emitter) -> ir.VectorType:
    return ir.VectorType(F64, e.lanes)


def _wide(e: Emitter, v: ir.Value) -> ir.Value:
    return e.b.fpext(v, _doubles(e))


def _narrow(e: Emitter, v: ir.Value) -> ir.Value:
    return e.b.fptrunc(v, e.vector)


def _wide_splat(e: Emitter, scalar: ir.Value) -> ir.Value:
    return e.splat(e.b.sitofp(scalar, F64))


def _zeros(e: Emitter) -> ir.Value:
    return ir.Constant(_doubles(e), [0.0] * e.lanes)


def _wide_fma(e: Emitter, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    name, kind = f"llvm.fmuladd.v{e.lanes}f64", _doubles(e)
    return e.b.call(e.intrinsic(name, kind, [kind] * 3), [a, b, c])


def _wide_load(e: Emitter, base: ir.Value, offset: Int) -> ir.Value:
    """A vector of float64, ``offset`` of these behind ``base``."""
    return e.b.load(e.at(base, e.mul(offset, WIDE)), align=4, typ=_doubles(e))


def _wide_store(e: Emitter, value: ir.Value, base: ir.Value, offset: Int) -> None:
    e.b.store(value, e.at(base, e.mul(offset, WIDE)), align=4)


# ----------------------------------------------------------------------------------- per channel


def _added(e: Emitter, f, offset: Int, row: int) -> list[ir.Value]:
    """Both sums over all work items."""

    def part(number: Int, *totals: ir.Value) -> list[ir.Value]:
        base = e.at(f.sums, e.mul(number, sums_elements(row)))
        return [
            e.b.fadd(total, _wide_load(e, base, e.add(offset, k * row)))
            for k, total in enumerate(totals)
        ]

    return e.loop(0, f.parts, part, [_zeros(e)] * SUMS)


def _moments(e: Emitter, f, offset: Int, mask, row: int) -> SimpleNamespace:
    first, squares = _added(e, f, offset, row)
    count = _wide_splat(e, f.count)
    moved = e.b.fdiv(first, count)
    # Rounding may leave less than nothing of a channel whose values are all alike.
    rest = e.b.fsub(squares, e.b.fmul(moved, first))
    rest = e.b.select(e.b.fcmp_ordered("<", rest, _zeros(e)), _zeros(e), rest)
    return SimpleNamespace(
        mean=e.b.fadd(_wide(e, _start(e, f.first, offset, mask)), moved),
        variance=e.b.fdiv(rest, count),
        unbiased=e.b.fdiv(rest, _wide_splat(e, e.sub(f.count, 1))),
    )


def _given(e: Emitter, f, offset: Int, mask, row: int) -> SimpleNamespace:
    mean, variance = (_wide(e, e.vload(p, offset, mask)) for p in (f.mean, f.variance))
    return SimpleNamespace(mean=mean, variance=variance, unbiased=variance)


def emit_statistics(plan: StatisticsPlan) -> Kernel:
    """Compile the step from sums to statistics."""
    e = Emitter(plan.target, plan.name)
    names, row = statistics_fields(plan), row_of(plan.target, plan.channels)
    with e.kernel(names) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            offset = e.mul(number, e.lanes)
            mask = e.lane_mask(e.sub(plan.channels, offset))
            found = (_moments if plan.batch else _given)(e, f, offset, mask, row)
            eps = ir.Constant(_doubles(e), [plan.eps] * e.lanes)
            root = e.intrinsic(f"llvm.sqrt.v{e.lanes}f64", _doubles(e), [_doubles(e)])
            one = ir.Constant(_doubles(e), [1.0] * e.lanes)
            s = e.b.fdiv(one, e.b.call(root, [e.b.fadd(found.variance, eps)]))
            scale = s
            if plan.weight:
                scale = e.b.fmul(_wide(e, e.vload(f.weight, offset, mask)), s)
            shift = e.b.fneg(e.b.fmul(found.mean, scale))
            if plan.bias:
                shift = e.b.fadd(shift, _wide(e, e.vload(f.bias, offset, mask)))
            for k, value in enumerate((found.mean, s, scale, shift, found.unbiased)):
                e.vstore(_narrow(e, value), f.statistics, e.add(offset, k * row))

        e.loop(begin, end, item)
    return compile_kernel(e, names)


def emit_coefficients(plan: CoefficientsPlan) -> Kernel:
    """Compile the step from the gradient's sums to what they are for."""
    e = Emitter(plan.target, plan.name)
    names, row = coefficients_fields(plan), row_of(plan.target, plan.channels)
    with e.kernel(names) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            offset = e.mul(number, e.lanes)
            mask = e.lane_mask(e.sub(plan.channels, offset))
            total, moment = _added(e, f, offset, row)
            s = _wide(e, e.vload(f.statistics, e.add(offset, RECIPROCAL * row)))
            weight = e.b.fmul(moment, s)
            count = _wide_splat(e, f.count)
            mean, slope = e.b.fdiv(total, count), e.b.fdiv(e.b.fmul(weight, s), count)
            rows = [_narrow(e, mean), _narrow(e, slope)] if plan.batch else [e.zero, e.zero]
            for k, value in enumerate(rows):
                e.vstore(value, f.coefficients, e.add(offset, k * row))
            if plan.weight:
                e.vstore(_narrow(e, weight), f.gweight, offset, mask)
            if plan.bias:
                e.vstore(_narrow(e, total), f.gbias, offset, mask)

        e.loop(begin, end, item)
    return compile_kernel(e, names)
