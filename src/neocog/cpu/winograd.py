"""Winograd convolution F(m x m, r x r): a convolution as (m+r-1)^2 matrix products.

The output is cut into tiles of m x m; the matrices are those of ``winograd_transforms``:

    V[xi][tile][c]  = (B^T d B)[xi]         for each tile of (m+r-1)^2 inputs d
    M[xi][tile][k]  = sum_c V[xi][tile][c] * U[xi][k][c]         U = G g G^T, packed beforehand
    out             = epilogue(A^T M A)     whole tiles: a 2x2 pool finds its windows in them

That is 36 products instead of 144 for m = 4 and 3x3 kernels, 16 instead of 36 for m = 2. Tiles at
the right and the bottom of a map have as many outputs as are left, and take part only in the
products that these need (``WinogradPlan.kinds``): in a map of 14 x 14, 484 instead of 576 products
for each pair of channels.

With stride 2 the inputs fall apart into four phases, by odd and even rows and columns. Each is
convolved with its own taps at stride 1, so they are four times as many channels of one convolution
with r = ceil(kernel / 2). Where kernels have an odd size, odd phases have a tap less, and nothing
to multiply at infinity: 81 products instead of 144 per channel for m = 4 and 3x3 kernels.

Four kernels can be made of it, by ``stage``: ``whole`` does all three for one block of tiles after
the other, with V and M in thread scratch; ``input``, ``products`` and ``output`` do one of them for
all tiles, and divide a problem of few tiles among threads by xi and output channels.

A NaN or infinity spreads over the outputs of every tile that reads it, and no further. Sums have
the same order in every block size, stage and number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

from llvmlite import ir

from . import epilogue as ep
from .lanes import I1, I32, I64, PTR, VOID, Emitter, Int
from .runtime import Kernel, compile_kernel
from .winograd_plan import LINE, UNROLL, WinogradPlan
from .winograd_tiles import input_function, output_function

CHUNK = 64
"""Input channels summed in registers before they are added to M: short sums round less."""

GRID = ("batch", "whole_y", "whole_x")
SIZE = ("rows", "cols")
INPUT = ("x*", "x_image", "x_row", "x_pixel")
PRODUCTS = ("u*", "prefetch")
OUTPUT = ("out*", "out_image", "out_row", "out_pixel")
BETWEEN = ("v*", "v_plane", "m*", "m_plane")
SCRATCH = ("scratch*", "scratch_stride")


def fields(plan: WinogradPlan) -> tuple[str, ...]:
    """What a step of this plan passes; offsets and strides in elements.

    ``x``: the first tap of the first output. ``whole_y``, ``whole_x``: whole tiles down and across
    each of ``batch`` images; for any size those that end the map count, which has ``rows`` and
    ``cols`` outputs. ``prefetch``: cache lines of the next panel of U to fetch per trip of
    the inner loop. ``scratch``: V, then M of ``block`` tiles. ``v_plane``, ``m_plane``: between the
    matrices of V and M.
    """
    epilogue = tuple(f"{name}*" for name in ep.parameters(plan.epilogue))
    grid = GRID + (SIZE if plan.any_size else ())
    if ep.adds_residual(plan.epilogue):
        epilogue += ("residual*", "residual_image", "residual_row", "residual_pixel")
    return {
        "whole": grid + INPUT + PRODUCTS + OUTPUT + epilogue + SCRATCH
        + ("v_plane", "m_plane", "block"),
        "input": grid + INPUT + BETWEEN[:2],
        "products": GRID + PRODUCTS + BETWEEN,
        "output": grid + OUTPUT + epilogue + BETWEEN[2:],
    }[plan.stage]  # fmt: skip


def emit(plan: WinogradPlan) -> Kernel:
    """Compile the kernel of a plan.

    Work items: blocks of tiles (``whole``), tiles (``input``, ``output``), or xi x register tiles
    across the output channels, xi slowest (``products``).
    """
    e = Emitter(plan.target, plan.name)
    made = SimpleNamespace()
    if plan.stage in ("whole", "input"):
        made.into = {kind: input_function(e, plan, kind) for kind in plan.kinds}
        if plan.any_size:
            made.into_edge = input_function(e, plan, plan.kinds[0], clipped=True)
    if plan.stage in ("whole", "products"):
        made.products = {n: _products_function(e, plan, n) for n in range(plan.pixels, 0, -1)}
    if plan.stage in ("whole", "output"):
        made.out = {kind: output_function(e, plan, kind) for kind in plan.kinds}
        if plan.any_size:
            made.out_edge = output_function(e, plan, plan.kinds[0], clipped=True)
    names = fields(plan)
    with e.kernel(names) as (f, begin, end, thread):
        f.bounds = bounds_of(e, plan, f)
        if plan.stage == "whole":
            f.v = e.at(f.scratch, e.mul(thread, f.scratch_stride))
            f.m = e.at(f.v, e.mul(f.v_plane, plan.planes))
        work = {
            "whole": lambda item: _block(e, plan, made, f, item),
            "input": lambda tile: _input_tile(e, plan, made, f, tile, tile),
            "products": lambda panel: _panel(e, plan, made, f, panel, 0, f.bounds[-1]),
            "output": lambda tile: _output_tile(e, plan, made, f, tile, tile),
        }[plan.stage]
        e.loop(begin, end, work)
    return compile_kernel(e, names)


def _block(e: Emitter, plan: WinogradPlan, made, f, number: Int) -> None:
    """All three stages for one block of tiles."""
    first, panels = e.mul(number, f.block), plan.planes * plan.groups
    stop = e.min(e.add(first, f.block), f.bounds[-1])
    count = e.sub(stop, first)
    e.loop(0, count, lambda t: _input_tile(e, plan, made, f, e.add(first, t), t))
    e.loop(0, panels, lambda panel: _panel(e, plan, made, f, panel, first, stop))
    e.loop(0, count, lambda t: _output_tile(e, plan, made, f, e.add(first, t), t))


# ---------------------------------------------------------------------------------------- tiles


def bounds_of(e: Emitter, plan: WinogradPlan, f) -> list[Int]:
    """Where each of the four kinds of tiles ends: bottom edge, whole, right edge, corner."""
    bottom, right = (int(tail > 0) for tail in plan.tails)
    sizes = (
        e.mul(f.whole_x, bottom), e.mul(f.whole_y, f.whole_x), e.mul(f.whole_y, right),
        bottom * right,
    )  # fmt: skip
    bounds: list[Int] = []
    for size in sizes:
        bounds.append(e.add(bounds[-1] if bounds else 0, e.mul(f.batch, size)))
    return bounds


def visit(
    e: Emitter,
    plan: WinogradPlan,
    f,
    tile: Int,
    body: Callable[[tuple[int, int], Int, Int, Int], None],
) -> None:
    """``body(kind, image, y, x)`` for the kind of ``tile`` and its first output."""
    bottom, right = plan.tails
    m = plan.m

    def place(kind: tuple[int, int], start: Int) -> None:
        rest, at = e.sub(tile, start), []
        for outputs, whole in zip(kind[::-1], (f.whole_x, f.whole_y), strict=True):
            number: Int = whole  # the tile behind the whole ones
            if outputs == m:
                rest, number = e.divmod(rest, whole)
            at.append(e.mul(number, m))
        body(kind, rest, at[1], at[0])

    kinds = ((bottom, m), (m, m), (m, right), (bottom, right))
    starts = dict(zip(kinds, (0, *f.bounds[:-1]), strict=True))

    def choose(kinds: Sequence[tuple[int, int]]) -> None:
        kind, *others = kinds
        if not others:
            place(kind, starts[kind])
            return
        following = starts[others[0]]
        e.choose(e.less(tile, following), lambda: place(kind, starts[kind]), lambda: choose(others))

    choose(plan.kinds)


def offset(e: Emitter, f, name: str, image: Int, y: Int, x: Int) -> Int:
    """Of pixel (y, x) of an image of the map whose strides are the fields ``name``_..."""
    rows = e.mul(y, getattr(f, f"{name}_row"))
    pixels = e.mul(x, getattr(f, f"{name}_pixel"))
    return e.add(e.mul(image, getattr(f, f"{name}_image")), e.add(rows, pixels))


def _input_tile(e: Emitter, plan: WinogradPlan, made, f, tile: Int, slot: Int) -> None:
    v, stride = e.at(f.v, e.mul(slot, plan.v_row)), 1 if plan.folded else plan.stride

    def transform(kind: tuple[int, int], image: Int, y: Int, x: Int) -> None:
        start = offset(e, f, "x", image, e.mul(y, stride), e.mul(x, stride))
        args = [e.at(f.x, start), f.x_row, f.x_pixel, v, f.v_plane]
        if plan.any_size:
            _at_edge(e, plan, f, y, x, made.into[kind], made.into_edge, args)
        else:
            e.b.call(made.into[kind], args)

    visit(e, plan, f, tile, transform)


def _at_edge(
    e: Emitter, plan: WinogradPlan, f, y: Int, x: Int, whole: ir.Function, edge: ir.Function,
    args: list[ir.Value],
) -> None:  # fmt: skip
    """Call ``whole`` for a tile that lies on the map, ``edge`` for one that hangs over its end."""
    down, across = e.sub(f.rows, y), e.sub(f.cols, x)
    inside = e.less(plan.m - 1, e.min(down, across))
    clipped = [e.min(down, plan.m), e.min(across, plan.m)]
    e.choose(
        inside,
        lambda: e.b.call(whole, args) and None,
        lambda: e.b.call(edge, args + clipped) and None,
    )


def _output_tile(e: Emitter, plan: WinogradPlan, made, f, tile: Int, slot: Int) -> None:
    m = e.at(f.m, e.mul(slot, plan.m_row))
    half = 2 if ep.pooling_of(plan.epilogue) else 1

    def transform(kind: tuple[int, int], image: Int, y: Int, x: Int) -> None:
        pooled = (v if half == 1 else e.divmod(v, half)[0] for v in (y, x))
        out = e.at(f.out, offset(e, f, "out", image, *pooled))
        args = [m, f.m_plane, out, f.out_row, f.out_pixel]
        args += [getattr(f, name) for name in ep.parameters(plan.epilogue)]
        if ep.adds_residual(plan.epilogue):
            residual = e.at(f.residual, offset(e, f, "residual", image, y, x))
            args += [residual, f.residual_row, f.residual_pixel]
        if plan.any_size:
            _at_edge(e, plan, f, y, x, made.out[kind], made.out_edge, args)
        else:
            e.b.call(made.out[kind], args)

    visit(e, plan, f, tile, transform)


# ------------------------------------------------------------------------------ matrix products


def _panel(e: Emitter, plan: WinogradPlan, made, f, panel: Int, first: Int, stop: Int) -> None:
    """M of those of the tiles ``first`` to ``stop`` that use one xi, for one register tile across.

    The tiles are cut into register tiles as even as can be, ``larger`` of ``size`` + 1 tiles, the
    others of ``size``. All of them take one chunk of U, while the nearest cache holds it, before
    the next.
    """
    xi, group = e.divmod(panel, plan.groups)
    start, end = users(e, plan, f, xi)
    start, end = e.max(start, first), e.min(end, stop)
    count, slot = e.sub(end, start), e.sub(start, first)
    v = e.at(f.v, e.add(e.mul(xi, f.v_plane), e.mul(slot, plan.v_row)))
    m = e.add(e.mul(xi, f.m_plane), e.mul(slot, plan.m_row))
    m = e.at(f.m, e.add(m, e.mul(group, plan.width)))
    u = e.at(f.u, e.mul(panel, plan.panel))
    channel, depth = depths_of(e, plan, xi)

    def divide() -> None:
        number = e.divmod(e.add(count, plan.pixels - 1), plan.pixels)[0]
        size, larger = e.divmod(count, number)
        others = e.mul(larger, e.add(size, 1))

        def chunk(c: Int) -> None:
            at = e.add(channel, c)
            channels = e.min(e.sub(depth, c), CHUNK)
            # Each register tile fetches its share of the panel that follows.
            pace = e.mul(e.divmod(channels, UNROLL)[0], e.mul(f.prefetch, LINE))
            ahead = e.add(plan.panel, e.mul(e.mul(e.divmod(c, UNROLL)[0], number),
                                            e.mul(f.prefetch, LINE)))  # fmt: skip

            def tiles(first: Int, number: Int, size: Int, ahead: Int) -> None:
                args = [
                    e.at(v, e.add(e.mul(first, plan.v_row), at)), e.at(u, e.mul(at, plan.width)),
                    e.at(m, e.mul(first, plan.m_row)), channels, c, number,
                    e.at(u, ahead), f.prefetch,
                ]  # fmt: skip
                e.call_for(size, made.products, args)

            e.choose(e.less(0, larger), lambda: tiles(0, larger, e.add(size, 1), ahead))
            tiles(others, e.sub(number, larger), size, e.add(ahead, e.mul(larger, pace)))

        e.loop(0, depth, chunk, step=CHUNK)

    e.choose(e.less(0, count), divide)


def users(e: Emitter, plan: WinogradPlan, f, xi: Int) -> tuple[Int, Int]:
    """The tiles, first and end, that use a plane."""
    edge, whole, side, corner = f.bounds
    used = [
        _is_among(e, index, plan.uses(tail) if tail else ())
        for index, tail in zip(e.divmod(xi, plan.size), plan.tails, strict=True)
    ]
    first = e.b.select(used[0], I64(0), e.i(edge))
    both, right = e.b.select(used[0], e.i(corner), e.i(side)), used[1]
    return first, e.b.select(right, both, e.i(whole))


def _is_among(e: Emitter, index: Int, chosen: Sequence[int]) -> ir.Value:
    bits = I64(sum(1 << i for i in chosen))
    return e.b.trunc(e.b.lshr(bits, index), I1)


def depths_of(e: Emitter, plan: WinogradPlan, xi: Int) -> tuple[Int, Int]:
    """(first channel, number of channels) that are not all zero in a plane of U."""
    if not plan.shortened:
        return I64(0), I64(plan.depth)
    row, col = (e.equal(i, plan.size - 1) for i in e.divmod(xi, plan.size))
    c = plan.channels
    # At infinity of the rows only phases of even rows count, the first two; of the columns, the
    # two in the middle.
    first = e.b.select(col, I64(c), I64(0))
    end = e.b.select(row, I64(2 * c), e.b.select(col, I64(3 * c), I64(4 * c)))
    return first, e.b.sub(end, first)


def _products_function(e: Emitter, plan: WinogradPlan, tiles: int) -> ir.Function:
    """products(v, u, m, channels, start, count, ahead, prefetch): one chunk of U.

    ``count`` register tiles of M, one below the other and each ``tiles`` high, become the products
    of some channels, or have them added if ``start`` is not 0.
    """
    width, blocks, rest = plan.width, plan.blocks, plan.depth % UNROLL
    fetch = e.intrinsic("llvm.prefetch.p0", VOID, [PTR, I32, I32, I32])
    kinds = [PTR, PTR, PTR, I64, I64, I64, PTR, I64]
    with e.function(f"products_{tiles}", kinds) as (fn, args):
        v, u, m, count, start, number, ahead, prefetch = args
        whole = e.sub(count, e.b.and_(count, I64(UNROLL - 1))) if rest else count
        trips = e.mul(e.divmod(whole, UNROLL)[0], e.mul(prefetch, LINE))

        def register_tile(i: Int) -> None:
            at_v, to = (
                e.at(base, e.mul(i, tiles * row))
                for base, row in ((v, plan.v_row), (m, plan.m_row))
            )
            fetched = e.at(ahead, e.mul(i, trips))

            def channels(c: Int, count: int, sums: Sequence[ir.Value]) -> list[ir.Value]:
                here, at_u, sums = e.at(at_v, c), e.at(u, e.mul(c, width)), list(sums)
                for k in range(count):
                    weights = [e.vload(at_u, k * width + j * e.lanes) for j in range(blocks)]
                    for t in range(tiles):
                        value = e.broadcast(here, t * plan.v_row + k)
                        for j in range(blocks):
                            at = t * blocks + j
                            sums[at] = e.fma(value, weights[j], sums[at])
                return sums

            def trip(c: Int, *sums: ir.Value) -> list[ir.Value]:
                line = e.mul(e.mul(e.divmod(c, UNROLL)[0], prefetch), LINE)

                def one(j: Int) -> None:
                    where = e.at(fetched, e.add(line, e.mul(j, LINE)))
                    e.b.call(fetch, [where, I32(0), I32(2), I32(1)])

                e.loop(0, prefetch, one)
                return channels(c, UNROLL, sums)

            def store(more: bool) -> None:
                for at, value in enumerate(sums):
                    where = at // blocks * plan.m_row + at % blocks * e.lanes
                    e.vstore(e.b.fadd(e.vload(to, where), value) if more else value, to, where)

            sums = e.loop(0, whole, trip, [e.zero] * (tiles * blocks), step=UNROLL)
            if rest:
                last, done = e.less(whole, count), sums
                sums = e.choose(last, lambda: channels(whole, rest, done), lambda: done)
            e.choose(e.equal(start, 0), lambda: store(False), lambda: store(True))

        e.loop(0, number, register_tile)
    return fn
