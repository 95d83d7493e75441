"""Winograd convolution F(m x m, 3x3): a 3x3 convolution as (m+2)^2 matrix products.

The output is cut into tiles of m x m; the matrices are those of ``winograd_transforms``:

    V[xi][tile][c]  = (B^T d B)[xi]         for each tile of (m+2) x (m+2) inputs d
    M[xi][tile][k]  = sum_c V[xi][tile][c] * U[xi][k][c]         U = G g G^T, packed beforehand
    out             = epilogue(A^T M A)     whole tiles: a 2x2 pool finds its windows in them

That is 36 products instead of 144 for m = 4, and 16 instead of 36 for m = 2. Four kernels can be
made of it, by ``stage``: ``whole`` does all three for one block of tiles after the other, with V
and M in thread scratch; ``input``, ``products`` and ``output`` do one of them for all tiles, and
divide a problem of few tiles among threads by xi and output channels.

Inputs behind the last row or column that an output needs are taken as zeros, never read: a tile
there is first copied into a patch. A NaN or infinity spreads over the outputs of every tile that
reads it, and no further. Sums have the same order in every block size, stage and number of
threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from llvmlite import ir

from ..steps import Step
from ..target import Target
from . import epilogue as ep
from . import pool as pooling
from .lanes import F32, I32, I64, PTR, VOID, Emitter, Int
from .runtime import Kernel, compile_kernel
from .tiling import blocks_for
from .winograd_transforms import TAPS, apply, input_matrix, output_matrix

UNROLL = 8
"""Input channels per trip of the products' inner loop."""

CHUNK = 64
"""Input channels summed in registers before they are added to M: short sums round less."""

LINE = 16
"""float32 in a cache line: what one prefetch brings, and what sets planes apart.

Planes a power of two apart would share the few lines of one cache set.
"""


@dataclass(frozen=True)
class WinogradPlan:
    """Everything a Winograd kernel is specialised on. Sizes below count in float32 elements."""

    target: Target
    channels: int
    out_channels: int
    m: int
    """Outputs along one side of a tile: 2 or 4."""
    epilogue: tuple[Step, ...] = ()
    stage: str = "whole"

    @property
    def size(self) -> int:
        """Inputs along one side of a tile."""
        return self.m + TAPS - 1

    @property
    def planes(self) -> int:
        """How many matrices there are: the number of xi."""
        return self.size**2

    @property
    def blocks(self) -> int:
        """NB, vectors of output channels of a register tile."""
        return blocks_for(self.target, self.out_channels)

    @property
    def width(self) -> int:
        """Output channels of a register tile."""
        return self.blocks * self.target.lanes

    @property
    def groups(self) -> int:
        """Register tiles across the output channels."""
        return -(-self.out_channels // self.width)

    @property
    def v_row(self) -> int:
        """The channels of one tile in V: whole vectors."""
        return -(-self.channels // self.target.lanes) * self.target.lanes

    @property
    def m_row(self) -> int:
        """The output channels of one tile in M: whole register tiles."""
        return self.groups * self.width

    @property
    def panel(self) -> int:
        """U of one xi and one register tile across."""
        return self.channels * self.width

    @property
    def patch(self) -> int:
        """A tile of inputs."""
        return self.planes * self.v_row

    @property
    def pixels(self) -> tuple[int, ...]:
        """Heights of register tiles in winograd tiles: MR, then smaller ones for the rest."""
        sizes = [self.target.pixels(self.blocks)]
        while sizes[-1] > 1:
            sizes.append(sizes[-1] * 2 // 3)
        return tuple(sizes)

    @property
    def name(self) -> str:
        """A name for the listing."""
        shape = f"c{self.channels}k{self.out_channels}"
        return f"winograd{self.m}_{self.stage}_{shape}{ep.spelled(self.epilogue)}"


GRID = ("tiles", "tiles_y", "tiles_x", "rows", "cols")
INPUT = ("x*", "x_image", "x_row", "x_pixel")
PRODUCTS = ("u*", "prefetch")
OUTPUT = ("out*", "out_image", "out_row", "out_pixel")
BETWEEN = ("v*", "v_plane", "m*", "m_plane")
SCRATCH = ("scratch*", "scratch_stride")


def fields(plan: WinogradPlan) -> tuple[str, ...]:
    """What a step of this plan passes; offsets and strides in elements.

    ``x``: the first tap of the first output. ``rows``, ``cols``: outputs of the convolution;
    ``tiles``: batch x tiles_y x tiles_x. ``prefetch``: cache lines of the next panel of U to fetch
    per trip of the inner loop. ``scratch``: the patch; for ``whole`` then V, then M of ``block``
    tiles. ``v_plane``, ``m_plane``: between the matrices of V and M.
    """
    epilogue = tuple(f"{name}*" for name in ep.parameters(plan.epilogue))
    if ep.adds_residual(plan.epilogue):
        epilogue += ("residual*", "residual_image", "residual_row", "residual_pixel")
    return {
        "whole": GRID + INPUT + PRODUCTS + OUTPUT + epilogue + SCRATCH
        + ("v_plane", "m_plane", "block"),
        "input": GRID + INPUT + SCRATCH + BETWEEN[:2],
        "products": ("tiles",) + PRODUCTS + BETWEEN,
        "output": GRID + OUTPUT + epilogue + BETWEEN[2:],
    }[plan.stage]  # fmt: skip


def emit(plan: WinogradPlan) -> Kernel:
    """Compile the kernel of a plan.

    Work items: blocks of tiles (``whole``), tiles (``input``, ``output``), or xi x register tiles
    across the output channels, xi slowest (``products``).
    """
    e = Emitter(plan.target, plan.name)
    made = SimpleNamespace()
    if plan.stage in ("whole", "input"):
        made.into = _input_function(e, plan)
    if plan.stage in ("whole", "products"):
        made.products = {n: _products_function(e, plan, n) for n in plan.pixels}
    if plan.stage in ("whole", "output"):
        made.out = _output_function(e, plan)
    names = fields(plan)
    with e.kernel(names) as (f, begin, end, thread):
        if plan.stage in ("whole", "input"):
            f.scratch = e.at(f.scratch, e.mul(thread, f.scratch_stride))
        if plan.stage == "whole":
            f.v = e.at(f.scratch, plan.patch + LINE)
            f.m = e.at(f.v, e.mul(f.v_plane, plan.planes))
        work = {
            "whole": lambda item: _block(e, plan, made, f, item),
            "input": lambda tile: _input_tile(e, plan, made, f, tile, tile),
            "products": lambda panel: _panel(e, plan, made, f, panel, f.tiles),
            "output": lambda tile: _output_tile(e, plan, made, f, tile, tile),
        }[plan.stage]
        e.loop(begin, end, work)
    return compile_kernel(e, names)


def _block(e: Emitter, plan: WinogradPlan, made, f, number: Int) -> None:
    """All three stages for one block of tiles."""
    first, panels = e.mul(number, f.block), plan.planes * plan.groups
    count = e.min(f.block, e.sub(f.tiles, first))
    e.loop(0, count, lambda t: _input_tile(e, plan, made, f, e.add(first, t), t))
    e.loop(0, panels, lambda panel: _panel(e, plan, made, f, panel, count))
    e.loop(0, count, lambda t: _output_tile(e, plan, made, f, e.add(first, t), t))


def _place(e: Emitter, plan: WinogradPlan, f, tile: Int) -> SimpleNamespace:
    """Image and first output of a tile, and how many rows and columns of outputs follow."""
    row, tx = e.divmod(tile, f.tiles_x)
    image, ty = e.divmod(row, f.tiles_y)
    y, x = e.mul(ty, plan.m), e.mul(tx, plan.m)
    return SimpleNamespace(image=image, y=y, x=x, rows=e.sub(f.rows, y), cols=e.sub(f.cols, x))


def _offset(e: Emitter, f, name: str, image: Int, y: Int, x: Int) -> Int:
    """Of pixel (y, x) of an image of the map whose strides are the fields ``name``_..."""
    rows = e.mul(y, getattr(f, f"{name}_row"))
    pixels = e.mul(x, getattr(f, f"{name}_pixel"))
    return e.add(e.mul(image, getattr(f, f"{name}_image")), e.add(rows, pixels))


# ------------------------------------------------------------------------------ input transform


def _input_tile(e: Emitter, plan: WinogradPlan, made, f, tile: Int, slot: Int) -> None:
    at = _place(e, plan, f, tile)
    x = e.at(f.x, _offset(e, f, "x", at.image, at.y, at.x))
    v = e.at(f.v, e.mul(slot, plan.v_row))
    rows, cols = e.add(at.rows, TAPS - 1), e.add(at.cols, TAPS - 1)

    def whole() -> None:
        e.b.call(made.into, [x, f.x_row, f.x_pixel, v, f.v_plane])

    def clipped() -> None:
        _copy_patch(e, plan, f, x, rows, cols)
        strides = [I64(plan.size * plan.v_row), I64(plan.v_row)]
        e.b.call(made.into, [f.scratch, *strides, v, f.v_plane])

    e.choose(e.less(plan.size - 1, e.min(rows, cols)), whole, clipped)


def _copy_patch(e: Emitter, plan: WinogradPlan, f, x: ir.Value, rows: Int, cols: Int) -> None:
    """The first ``rows`` x ``cols`` inputs into the patch, zeros for the others."""

    def row(y: Int) -> None:
        def pixel(px: Int) -> None:
            to = e.at(f.scratch, e.mul(e.add(e.mul(y, plan.size), px), plan.v_row))
            source = e.at(x, e.add(e.mul(y, f.x_row), e.mul(px, f.x_pixel)))

            def copy() -> None:
                _each_vector(
                    e, plan.channels, lambda c, mask: e.vstore(e.vload(source, c, mask), to, c)
                )

            def clear() -> None:
                _each_vector(e, plan.channels, lambda c, mask: e.vstore(e.zero, to, c))

            e.choose(e.b.and_(e.less(y, rows), e.less(px, cols)), copy, clear)

        e.loop(0, plan.size, pixel)

    e.loop(0, plan.size, row)


def _each_vector(e: Emitter, channels: int, visit) -> None:
    """``visit(first channel, mask)`` for each vector of channels; the last may be masked."""
    whole = channels - channels % e.lanes
    e.loop(0, whole, lambda c: visit(c, None), step=e.lanes)
    if channels > whole:
        visit(whole, e.lane_mask(channels - whole))


def _input_function(e: Emitter, plan: WinogradPlan) -> ir.Function:
    """into(x, row, pixel, v, plane): V of one tile."""
    size, matrix = plan.size, input_matrix(plan.m)
    with e.function("input_tile", [PTR, I64, I64, PTR, I64]) as (fn, args):
        x, x_row, x_pixel, v, plane = args

        def vector(c: Int, mask: ir.Value | None) -> None:
            columns = []
            for col in range(size):
                source = e.at(e.at(x, c), e.mul(x_pixel, col))
                column = [e.vload(source, e.mul(x_row, row), mask) for row in range(size)]
                columns.append(apply(e, matrix, column))
            for y, row in enumerate(zip(*columns, strict=True)):
                for xi, value in enumerate(apply(e, matrix, row), start=y * size):
                    e.vstore(value, e.at(v, c), e.mul(plane, xi))

        _each_vector(e, plan.channels, vector)
    return fn


# ------------------------------------------------------------------------------ matrix products


def _panel(e: Emitter, plan: WinogradPlan, made, f, panel: Int, count: Int) -> None:
    """M of ``count`` tiles for one xi and one register tile across the output channels."""
    xi, group = e.divmod(panel, plan.groups)
    v = e.at(f.v, e.mul(xi, f.v_plane))
    m = e.at(f.m, e.add(e.mul(xi, f.m_plane), e.mul(group, plan.width)))
    u = e.at(f.u, e.mul(panel, plan.panel))
    share = e.mul(f.prefetch, plan.channels // UNROLL * LINE)
    first: Int = 0
    for size, function in made.products.items():

        def tiles(start: Int, size: int = size, function=function) -> None:
            # Each register tile fetches its share of the panel that follows.
            ahead = e.add(e.mul(e.divmod(start, plan.pixels[0])[0], share), plan.panel)
            e.b.call(
                function,
                [
                    e.at(v, e.mul(start, plan.v_row)), u, e.at(m, e.mul(start, plan.m_row)),
                    e.at(u, ahead), f.prefetch,
                ],
            )  # fmt: skip

        stop = e.add(first, e.mul(e.divmod(e.sub(count, first), size)[0], size))
        e.loop(first, stop, tiles, step=size)
        first = stop


def _products_function(e: Emitter, plan: WinogradPlan, tiles: int) -> ir.Function:
    """products(v, u, m, ahead, prefetch): one register tile of M, ``tiles`` high."""
    width, blocks = plan.width, plan.blocks
    fetch = e.intrinsic("llvm.prefetch.p0", VOID, [PTR, I32, I32, I32])
    with e.function(f"products_{tiles}", [PTR, PTR, PTR, PTR, I64]) as (fn, args):
        v, u, m, ahead, prefetch = args

        def channels(c: Int, count: int, sums: Sequence[ir.Value]) -> list[ir.Value]:
            at_v, at_u, sums = e.at(v, c), e.at(u, e.mul(c, width)), list(sums)
            for i in range(count):
                weights = [e.vload(at_u, i * width + j * e.lanes) for j in range(blocks)]
                for t in range(tiles):
                    value = e.broadcast(at_v, t * plan.v_row + i)
                    for j in range(blocks):
                        at = t * blocks + j
                        sums[at] = e.fma(value, weights[j], sums[at])
            return sums

        def trip(c: Int, *sums: ir.Value) -> list[ir.Value]:
            line = e.mul(e.mul(e.divmod(c, UNROLL)[0], prefetch), LINE)

            def one(i: Int) -> None:
                where = e.at(ahead, e.add(line, e.mul(i, LINE)))
                e.b.call(fetch, [where, I32(0), I32(2), I32(1)])

            e.loop(0, prefetch, one)
            return channels(c, UNROLL, sums)

        def store(sums: Sequence[ir.Value], more: bool) -> None:
            for at, value in enumerate(sums):
                where = at // blocks * plan.m_row + at % blocks * e.lanes
                e.vstore(e.b.fadd(e.vload(m, where), value) if more else value, m, where)

        def chunk(start: Int) -> None:
            stop = e.min(e.add(start, CHUNK), whole)
            sums = e.loop(start, stop, trip, zeros, step=UNROLL)
            e.choose(e.equal(start, 0), lambda: store(sums, False), lambda: store(sums, True))

        whole, zeros = plan.channels - plan.channels % UNROLL, [e.zero] * (tiles * blocks)
        e.loop(0, whole, chunk, step=CHUNK)
        if plan.channels > whole:
            store(channels(whole, plan.channels - whole, zeros), whole > 0)
    return fn


# ----------------------------------------------------------------------------- output transform


def _output_tile(e: Emitter, plan: WinogradPlan, made, f, tile: Int, slot: Int) -> None:
    at = _place(e, plan, f, tile)
    m = e.at(f.m, e.mul(slot, plan.m_row))
    halves = 2 if ep.pooling_of(plan.epilogue) else 1
    y, x = (v if halves == 1 else e.divmod(v, halves)[0] for v in (at.y, at.x))
    out = e.at(f.out, _offset(e, f, "out", at.image, y, x))
    rows, cols = e.min(at.rows, plan.m), e.min(at.cols, plan.m)
    args = [m, f.m_plane, out, f.out_row, f.out_pixel, rows, cols]
    args += [getattr(f, name) for name in ep.parameters(plan.epilogue)]
    if ep.adds_residual(plan.epilogue):
        residual = e.at(f.residual, _offset(e, f, "residual", at.image, at.y, at.x))
        args += [residual, f.residual_row, f.residual_pixel]
    e.b.call(made.out, args)


def _output_function(e: Emitter, plan: WinogradPlan) -> ir.Function:
    """out(m, plane, out, row, pixel, rows, cols, parameters..., residual and its strides)."""
    names = ["m", "plane", "out", "out_row", "out_pixel", "rows", "cols"]
    kinds = [PTR, I64, PTR, I64, I64, I64, I64]
    names += ep.parameters(plan.epilogue)
    kinds += [PTR] * (len(names) - len(kinds))
    if ep.adds_residual(plan.epilogue):
        names += ["residual", "residual_row", "residual_pixel"]
        kinds += [PTR, I64, I64]
    with e.function("output_tile", kinds) as (fn, args):
        a = SimpleNamespace(**dict(zip(names, args, strict=True)))
        a.half = _stack_vectors(e, plan.m * plan.size)
        _each_vector(e, plan.out_channels, lambda c, mask: _output_vector(e, plan, a, c, mask))
    return fn


def _stack_vectors(e: Emitter, count: int) -> ir.Value:
    place = e.b.alloca(e.vector, count)
    place.align = 4 * e.lanes
    where = e.b.gep(place, [I64(0)], source_etype=e.vector)
    where.type = PTR  # llvmlite types an alloca's pointer; everything here is opaque
    return where


def _output_vector(e: Emitter, plan: WinogradPlan, a, c: Int, mask: ir.Value | None) -> None:
    """All pixels of a tile for one vector of channels."""
    size, matrix = plan.size, output_matrix(plan.m)
    for x in range(size):
        source = e.at(a.m, c)
        column = [e.vload(source, e.mul(a.plane, y * size + x)) for y in range(size)]
        for y, value in enumerate(apply(e, matrix, column)):
            e.vstore(value, a.half, (y * size + x) * e.lanes)
    moved = {name: e.at(getattr(a, name), c) for name in ep.parameters(plan.epilogue)}
    per_channel = ep.load_parameters(e, plan.epilogue, SimpleNamespace(**moved), 0, mask)
    out = e.at(a.out, c)

    def results(y: Int) -> list[ir.Value]:
        start = e.mul(y, size * e.lanes)
        row = [e.vload(e.at(a.half, start), x * e.lanes) for x in range(size)]

        def residual(x: int) -> ir.Value:
            inside = e.min(x, e.sub(a.cols, 1))  # beyond the map: any value, it is dropped
            where = e.add(e.mul(y, a.residual_row), e.mul(inside, a.residual_pixel))
            return e.vload(e.at(e.at(a.residual, c), where), 0, mask)

        return ep.finish(e, plan.epilogue, apply(e, matrix, row), per_channel, residual)

    def store(y: Int, values: Sequence[ir.Value], cols: Int) -> None:
        where = e.at(out, e.mul(y, a.out_row))
        for x, value in enumerate(values):

            def put(x: int = x, value: ir.Value = value) -> None:
                e.vstore(value, where, e.mul(a.out_pixel, x), mask)

            e.choose(e.less(x, cols), put)

    pool = ep.pooling_of(plan.epilogue)
    if pool is None:
        e.loop(0, a.rows, lambda y: store(y, results(y), a.cols))
        return

    def pooled_row(y: Int) -> None:
        top, bottom = results(e.mul(y, 2)), results(e.add(e.mul(y, 2), 1))
        windows = [top[x : x + 2] + bottom[x : x + 2] for x in range(0, plan.m, 2)]
        store(y, [_reduce(e, pool, taps) for taps in windows], e.divmod(a.cols, 2)[0])

    e.loop(0, e.divmod(a.rows, 2)[0], pooled_row)


def _reduce(e: Emitter, pool, taps: Sequence[ir.Value]) -> ir.Value:
    reduction = pooling.REDUCTIONS[pool.kind](pool, False)
    state = reduction.init(e, 0)
    for number, value in enumerate(taps):
        state = reduction.combine(e, state, value, number)
    return reduction.finish(e, state, F32(float(len(taps))))
