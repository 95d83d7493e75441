"""The transforms of single tiles into V and out of M, for the Winograd kernels."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from llvmlite import ir

from . import epilogue as ep
from . import pool as pooling
from .lanes import F32, I64, PTR, Emitter, Int
from .winograd_plan import WinogradPlan
from .winograd_transforms import apply, input_matrix, output_matrix


def each_vector(e: Emitter, channels: int, visit) -> None:
    """``visit(first channel, mask)`` for each vector of channels; the last may be masked."""
    whole = channels - channels % e.lanes
    e.loop(0, whole, lambda c: visit(c, None), step=e.lanes)
    if channels > whole:
        visit(whole, e.lane_mask(channels - whole))


def both(e: Emitter, mask: ir.Value | None, condition: ir.Value) -> ir.Value:
    """The lanes of ``mask`` (None: all) if ``condition``, else none."""
    all_or_none = e.splat(condition)
    return all_or_none if mask is None else e.b.and_(mask, all_or_none)


def input_function(
    e: Emitter,
    plan: WinogradPlan,
    outputs: tuple[int, int],
    ahead: bool = False,
    clipped: bool = False,
) -> ir.Function:
    """into(x, row, pixel, v, plane): V of one tile with so many outputs down and across.

    ``ahead``: what the tile to the right will read is asked for on the way (stride 1).
    ``clipped``: two more arguments say how many of the outputs down and across are on the map; what
    the others alone would read counts as zero.
    """
    rows, cols = outputs
    name = f"input_tile_{rows}x{cols}_c{plan.depth}{'_clipped' if clipped else ''}"
    with e.function(name, [PTR, I64, I64, PTR, I64, *([I64, I64] if clipped else [])]) as (
        fn,
        args,
    ):
        x, x_row, x_pixel, v, plane, *inside = args
        if plan.folded or plan.stride == 1:
            a = SimpleNamespace(
                x=x, row=x_row, pixel=x_pixel, v=v, plane=plane, ahead=ahead, inside=inside
            )
            _phase(e, plan, a, outputs, (0, 0), plan.depth)
            return fn
        for number, (odd_row, odd_col) in enumerate(plan.phases):
            start = e.add(e.mul(x_row, odd_row), e.mul(x_pixel, odd_col))
            a = SimpleNamespace(
                x=e.at(x, start), row=e.mul(x_row, plan.stride), pixel=e.mul(x_pixel, plan.stride),
                v=e.at(v, number * plan.channels), plane=plane, ahead=False, inside=inside,
            )  # fmt: skip
            short = (odd_row, odd_col) if plan.shortened else (0, 0)
            _phase(e, plan, a, outputs, short, plan.channels)
    return fn


def _phase(
    e: Emitter, plan: WinogradPlan, a, outputs: tuple[int, int], short: tuple[int, int], count: int
) -> None:
    """V of one phase: ``count`` channels. ``short``: 1 where it has a tap less, down and across."""
    (down, rows), (across, cols) = (
        _axis(plan, n, lacking) for n, lacking in zip(outputs, short, strict=True)
    )
    partly = count != plan.depth  # behind these channels stand those of another phase
    # Inputs that outputs on the map read, down and across.
    ends = [
        e.add(number, plan.taps - 1 - lacking)
        for number, lacking in zip(a.inside, short, strict=False)
    ]

    def read(mask: ir.Value | None, row: int, col: int) -> ir.Value | None:
        if not ends:
            return mask
        return both(e, mask, e.b.and_(e.less(row, ends[0]), e.less(col, ends[1])))

    def vector(c: Int, mask: ir.Value | None) -> None:
        columns = []
        for col in range(len(across[0])):
            source = e.at(e.at(a.x, c), e.mul(a.pixel, col))
            inputs = [
                e.vload(source, e.mul(a.row, row), read(mask, row, col))
                for row in range(len(down[0]))
            ]
            columns.append(apply(e, down, inputs))
            if a.ahead and col >= plan.taps - 1:
                following = e.at(source, e.mul(a.pixel, plan.m))
                for line in range(len(down[0])):
                    e.prefetch(e.at(following, e.mul(a.row, line)), near=False)
        for y, row in zip(rows, zip(*columns, strict=True), strict=True):
            for x, value in zip(cols, apply(e, across, row), strict=True):
                to = e.mul(a.plane, y * plan.size + x)
                e.vstore(value, e.at(a.v, c), to, mask if partly else None)

    each_vector(e, count, vector)


def _axis(plan: WinogradPlan, outputs: int, lacking: int):
    """(B^T, which rows of planes it gives); without infinity and the last input where a tap lacks.

    The last input stands in the row of infinity alone.
    """
    matrix, used = input_matrix(plan.m, plan.taps, outputs), plan.uses(outputs)
    if not lacking:
        return matrix, used
    return tuple(row[:-1] for row in matrix[:-1]), used[:-1]


def output_function(
    e: Emitter, plan: WinogradPlan, outputs: tuple[int, int], clipped: bool = False
) -> ir.Function:
    """out(m, plane, out, row, pixel, parameters..., residual and its strides).

    ``clipped``: two more arguments say how many of the outputs down and across are on the map.
    """
    names = ["m", "plane", "out", "out_row", "out_pixel"]
    kinds = [PTR, I64, PTR, I64, I64]
    names += ep.parameters(plan.epilogue)
    kinds += [PTR] * (len(names) - len(kinds))
    if ep.adds_residual(plan.epilogue):
        names += ["residual", "residual_row", "residual_pixel"]
        kinds += [PTR, I64, I64]
    name = "output_tile_{}x{}".format(*outputs)
    if clipped:
        name, names, kinds = f"{name}_clipped", [*names, "down", "across"], [*kinds, I64, I64]
    with e.function(name, kinds) as (fn, args):
        a = SimpleNamespace(**dict(zip(names, args, strict=True)))
        a.half = _stack_vectors(e, plan.m * plan.size)
        each_vector(
            e, plan.out_channels, lambda c, mask: _output_vector(e, plan, a, outputs, c, mask)
        )
    return fn


def _stack_vectors(e: Emitter, count: int) -> ir.Value:
    place = e.b.alloca(e.vector, count)
    place.align = 4 * e.lanes
    where = e.b.gep(place, [I64(0)], source_etype=e.vector)
    where.type = PTR  # llvmlite types an alloca's pointer; everything here is opaque
    return where


def _output_vector(
    e: Emitter, plan: WinogradPlan, a, outputs: tuple[int, int], c: Int, mask: ir.Value | None
) -> None:
    """All pixels of a tile for one vector of channels."""
    down, across = (output_matrix(plan.m, plan.taps, n) for n in outputs)
    rows, cols = (plan.uses(n) for n in outputs)
    size = len(cols)
    for x, col in enumerate(cols):
        source = e.at(a.m, c)
        column = [e.vload(source, e.mul(a.plane, row * plan.size + col)) for row in rows]
        for y, value in enumerate(apply(e, down, column)):
            e.vstore(value, a.half, (y * size + x) * e.lanes)
    moved = {name: e.at(getattr(a, name), c) for name in ep.parameters(plan.epilogue)}
    per_channel = ep.load_parameters(e, plan.epilogue, SimpleNamespace(**moved), 0, mask)
    out = e.at(a.out, c)
    clipped = hasattr(a, "across")

    def written(x: int) -> ir.Value | None:
        """The lanes of the output in column x."""
        return both(e, mask, e.less(x, a.across)) if clipped else mask

    def results(y: Int) -> list[ir.Value]:
        start = e.mul(y, size * e.lanes)
        row = [e.vload(e.at(a.half, start), x * e.lanes) for x in range(size)]

        def residual(x: int) -> ir.Value:
            where = e.add(e.mul(y, a.residual_row), e.mul(a.residual_pixel, x))
            return e.vload(e.at(e.at(a.residual, c), where), 0, written(x))

        return ep.finish(e, plan.epilogue, apply(e, across, row), per_channel, residual)

    pool = ep.pooling_of(plan.epilogue)
    side = 1 if pool is None else 2

    def store(y: Int, values: Sequence[ir.Value]) -> None:
        where = e.at(out, e.mul(y, a.out_row))
        for x, value in enumerate(values):
            e.vstore(value, where, e.mul(a.out_pixel, x), written(x * side))

    height: Int = a.down if clipped else outputs[0]
    if pool is None:
        e.loop(0, height, lambda y: store(y, results(y)))
        return

    def pooled_row(y: Int) -> None:
        top, bottom = results(e.mul(y, 2)), results(e.add(e.mul(y, 2), 1))
        windows = [top[x : x + 2] + bottom[x : x + 2] for x in range(0, outputs[1] - 1, 2)]
        store(y, [_reduce(e, pool, taps) for taps in windows])

    e.loop(0, e.divmod(height, 2)[0] if clipped else outputs[0] // 2, pooled_row)


def _reduce(e: Emitter, pool, taps: Sequence[ir.Value]) -> ir.Value:
    reduction = pooling.REDUCTIONS[pool.kind](pool, False)
    state = reduction.init(e, 0)
    for number, value in enumerate(taps):
        state = reduction.combine(e, state, value, number)
    return reduction.finish(e, state, F32(float(len(taps))))
