"""The weight gradient of a convolution by Winograd's products, turned round.

The forward algorithm is out = A^T [(G w G^T) * (B^T x B)] A for each tile of m x m outputs (see
``winograd``). It is linear in w, so the gradient of w takes its matrices in the other order:

    V[xi][tile][c]  = (B^T x B)[xi]             the inputs of the tile, as in the forward pass
    Y[xi][tile][k]  = (A g A^T)[xi]             the m x m gradients of the tile's outputs
    D[xi][c][k]     = sum over tiles  V[xi][tile][c] * Y[xi][tile][k]
    dw[c][k]        = G^T D G

36 products instead of 144 for each tile and pair of channels, with m = 4 and 3x3 kernels. Tiles
that end a map take part only in the products their outputs need, and with stride 2 the inputs fall
apart into four phases, as in the forward pass.

A work item sums one chunk of tiles for one block of input channels and one of output channels. Its
D stays in the second-level cache together with V and Y of a few tiles; what leaves it is a finished
dw, in the order of packed weights: [chunk][block][tap][channel][NB x lanes]. Each block of input
channels transforms the gradients anew, and each of output channels the inputs: that costs less than
it would to bring V and Y, or D, from behind that cache. Chunks and blocks depend on the problem
alone: the result has the same bits on any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from llvmlite import ir

from ..target import Target
from .lanes import I1, I64, PTR, Emitter, Int
from .runtime import Kernel, compile_kernel
from .tiling import blocks_for, even_sizes
from .winograd import GRID, INPUT, bounds_of, depths_of, offset, users, visit
from .winograd_plan import LINE, WinogradPlan
from .winograd_tiles import input_function
from .winograd_transforms import Matrix, apply, output_matrix, weight_matrix

CHANNELS = 64
"""Input channels of a work item at most."""

CACHE = 262_144
"""float32 elements of D, V and Y together: most of a second-level cache of 1 MiB."""

TILES = (8, 64)
"""Fewest and most tiles of which V and Y are kept at once."""


@dataclass(frozen=True)
class WinogradGradientPlan:
    """Everything the kernel is specialised on. Sizes count in float32 elements."""

    target: Target
    channels: int
    out_channels: int
    m: int
    """Outputs along one side of a tile."""
    tails: tuple[int, int]
    """Outputs down and across of the tiles that end a map; 0 where whole tiles fill it."""
    bias: bool
    """Whether the gradient of the bias is summed too."""
    kernel: int = 3
    """Taps along one side of the convolution's kernel."""
    stride: int = 1

    def tiles(self, channels: int) -> WinogradPlan:
        """The tiles, for a work item of so many input channels."""
        return WinogradPlan(
            self.target,
            channels,
            1,
            self.m,
            kernel=self.kernel,
            stride=self.stride,
            tails=self.tails,
        )

    @property
    def blocks(self) -> int:
        """NB, vectors of output channels of a register tile, and of a work item."""
        return blocks_for(self.target, self.out_channels)

    @property
    def width(self) -> int:
        """Output channels of a work item."""
        return self.blocks * self.target.lanes

    @property
    def blocks_per_group(self) -> int:
        """Work items across the output channels."""
        return -(-self.out_channels // self.width)

    @property
    def depths(self) -> tuple[int, ...]:
        """Input channels of the work items: all but the last have as many, in whole vectors."""
        lanes = self.target.lanes
        vectors = -(-self.channels // lanes)
        count = -(-vectors * lanes * self.stride**2 // CHANNELS)
        depth = min(-(-vectors // count) * lanes, self.channels)
        whole, rest = divmod(self.channels, depth)
        return (depth,) * whole + (rest,) * (rest > 0)

    @property
    def block(self) -> int:
        """Tiles of which V and Y are kept at once."""
        tiles = self.tiles(self.depths[0])
        room = CACHE // tiles.planes - tiles.depth * self.width
        return max(TILES[0], min(TILES[1], room // (tiles.v_row + self.width)))

    @property
    def planes(self) -> tuple[int, int, int]:
        """From one matrix of V, of Y and of D to the next."""
        tiles = self.tiles(self.depths[0])
        return (
            self.block * tiles.v_row + LINE,
            self.block * self.width + LINE,
            tiles.depth * self.width + LINE,
        )

    @property
    def scratch(self) -> int:
        """For V, Y, D and the sums of the bias."""
        return self.tiles(1).planes * sum(self.planes) + self.width

    @property
    def name(self) -> str:
        """A name for the listing."""
        tails = "_t{}x{}".format(*self.tails) if any(self.tails) else ""
        shape = f"c{self.channels}k{self.out_channels}_{self.kernel}x{self.kernel}s{self.stride}"
        return f"winograd{self.m}_gradient_{shape}{tails}"


def fields(plan: WinogradGradientPlan) -> tuple[str, ...]:
    """What a step of this plan passes; offsets and strides in elements.

    ``x``: the first tap of the first output; ``grad``: the gradient of the first output.
    ``chunk_tiles``: tiles of a chunk. ``partial``, ``bias``: the results, a chunk ``chunk_step``
    (``bias_step``) behind the other.
    """
    return (
        *GRID, *INPUT, "grad*", "grad_image", "grad_row", "grad_pixel",
        "partial*", "chunk_step", "chunk_tiles", "scratch*", "scratch_stride",
        *(("bias*", "bias_step") if plan.bias else ()),
    )  # fmt: skip


def items(plan: WinogradGradientPlan, chunks: int) -> int:
    """Work items: chunks x blocks of output channels x blocks of input channels."""
    return chunks * plan.blocks_per_group * len(plan.depths)


def emit(plan: WinogradGradientPlan) -> Kernel:
    """Compile the kernel of a plan."""
    e = Emitter(plan.target, plan.name)
    grads = {kind: _gradient_function(e, plan, kind) for kind in plan.tiles(1).kinds}
    made = {}
    for depth in set(plan.depths):
        tiles = plan.tiles(depth)
        made[depth] = SimpleNamespace(
            tiles=tiles,
            into={kind: input_function(e, tiles, kind, ahead=True) for kind in tiles.kinds},
            grads=grads,
            products=_products_function(e, plan, depth),
            result=_result_function(e, plan, depth),
        )
    names = fields(plan)
    with e.kernel(names) as (f, begin, end, thread):
        f.bounds = bounds_of(e, plan.tiles(1), f)
        matrices = plan.tiles(1).planes
        f.v = e.at(f.scratch, e.mul(thread, f.scratch_stride))
        f.y = e.at(f.v, matrices * plan.planes[0])
        f.d = e.at(f.y, matrices * plan.planes[1])
        f.sums = e.at(f.d, matrices * plan.planes[2])
        e.loop(begin, end, lambda item: _item(e, plan, made, f, item))
    return compile_kernel(e, names)


def _item(e: Emitter, plan: WinogradGradientPlan, made, f, item: Int) -> None:
    rest, part = e.divmod(item, len(plan.depths))
    chunk, block = e.divmod(rest, plan.blocks_per_group)
    c, k = e.mul(part, plan.depths[0]), e.mul(block, plan.width)
    x, grad = e.at(f.x, c), e.at(f.grad, k)
    tap_size = plan.channels * plan.width
    to = e.add(e.mul(chunk, f.chunk_step), e.mul(block, plan.kernel**2 * tap_size))
    to = e.at(f.partial, e.add(to, e.mul(c, plan.width)))
    first = e.mul(chunk, f.chunk_tiles)
    stop = e.min(e.add(first, f.chunk_tiles), f.bounds[-1])
    if plan.bias:
        e.zero_fill(f.sums, plan.width)

    def work(depth: int) -> None:
        parts = made[depth]

        def one(start: Int) -> None:
            count = e.min(e.sub(stop, start), plan.block)
            e.loop(0, count, lambda t: _tile(e, plan, parts, f, x, grad, e.add(start, t), t))
            more = e.b.icmp_signed("!=", start, first)
            e.loop(0, parts.tiles.planes, lambda xi: _plane(e, plan, parts, f, xi, start, count,
                                                            more))  # fmt: skip

        e.loop(first, stop, one, step=plan.block)
        e.b.call(parts.result, [f.d, to])

    e.choose(
        e.equal(part, len(plan.depths) - 1), lambda: work(plan.depths[-1]),
        lambda: work(plan.depths[0]),
    )  # fmt: skip
    if plan.bias:
        sums = e.at(f.bias, e.add(e.mul(chunk, f.bias_step), k))
        e.choose(e.equal(part, 0), lambda: e.copy(sums, f.sums, plan.width))


def _tile(e: Emitter, plan, parts, f, x, grad, tile: Int, slot: Int) -> None:
    """V and Y of one tile."""
    v, y = e.at(f.v, e.mul(slot, parts.tiles.v_row)), e.at(f.y, e.mul(slot, plan.width))

    def transform(kind: tuple[int, int], image: Int, row: Int, col: Int) -> None:
        source = offset(e, f, "x", image, e.mul(row, plan.stride), e.mul(col, plan.stride))
        source = e.at(x, source)
        e.b.call(parts.into[kind], [source, f.x_row, f.x_pixel, v, I64(plan.planes[0])])
        source = e.at(grad, offset(e, f, "grad", image, row, col))
        e.b.call(parts.grads[kind], [source, f.grad_row, f.grad_pixel, y, f.sums])

    visit(e, parts.tiles, f, tile, transform)


def _plane(e: Emitter, plan, parts, f, xi: Int, start: Int, count: Int, more) -> None:
    """The products of the tiles ``start`` to ``start`` + ``count`` that use one xi."""
    low, high = users(e, parts.tiles, f, xi)
    low, high = e.max(e.sub(low, start), 0), e.min(e.sub(high, start), count)
    v, y, d = (e.at(p, e.mul(xi, n)) for p, n in zip((f.v, f.y, f.d), plan.planes, strict=True))
    v, y = e.at(v, e.mul(low, parts.tiles.v_row)), e.at(y, e.mul(low, plan.width))
    channels, number = parts.tiles.channels, e.sub(high, low)
    first, depth = depths_of(e, parts.tiles, xi)

    def phase(c: Int) -> None:
        to = e.at(d, e.mul(c, plan.width))
        e.b.call(parts.products, [e.at(v, c), y, to, number, more])

    e.loop(first, e.add(first, depth), phase, step=channels)


def _gradient_function(e: Emitter, plan, outputs: tuple[int, int]) -> ir.Function:
    """gradient(g, row, pixel, y, sums): Y of one tile with so many outputs down and across."""
    tiles = plan.tiles(1)
    down, across = (_transposed(output_matrix(plan.m, tiles.taps, n)) for n in outputs)
    rows, cols = (tiles.uses(n) for n in outputs)
    name = "gradient_tile_{}x{}".format(*outputs)
    with e.function(name, [PTR, I64, I64, PTR, PTR]) as (fn, args):
        g, g_row, g_pixel, y, sums = args

        def vector(k: Int) -> None:
            columns, total = [], None
            for col in range(outputs[1]):
                source = e.at(e.at(g, k), e.mul(g_pixel, col))
                values = [e.vload(source, e.mul(g_row, row)) for row in range(outputs[0])]
                following = e.at(source, e.mul(g_pixel, plan.m))  # of the tile to the right
                for row in range(outputs[0]):
                    e.prefetch(e.at(following, e.mul(g_row, row)), near=False)
                columns.append(apply(e, down, values))
                if plan.bias:
                    for value in values:
                        total = value if total is None else e.b.fadd(total, value)
            for row, line in zip(rows, zip(*columns, strict=True), strict=True):
                for col, value in zip(cols, apply(e, across, line), strict=True):
                    e.vstore(value, e.at(y, k), (row * tiles.size + col) * plan.planes[1])
            if total is not None:
                e.vstore(e.b.fadd(e.vload(e.at(sums, k)), total), e.at(sums, k))

        e.loop(0, plan.width, vector, step=e.lanes)
    return fn


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _products_function(e: Emitter, plan, depth: int) -> ir.Function:
    """products(v, y, d, tiles, more): d becomes the products, or has them added if ``more``."""
    row = plan.tiles(depth).v_row
    sizes = even_sizes(depth, plan.target.pixels(plan.blocks))
    parts = {n: _register_tile(e, plan, row, depth, n) for n in sizes}
    count = -(-depth // sizes[0])
    larger = depth - count * (sizes[0] - 1)
    with e.function(f"products_{depth}", [PTR, PTR, PTR, I64, I1]) as (fn, args):
        v, y, d, tiles, more = args

        def tile(c: Int, size: int) -> None:
            to = e.at(d, e.mul(c, plan.width))
            e.b.call(parts[size], [e.at(v, c), y, to, tiles, more])

        end = larger * sizes[0]
        e.loop(0, end, lambda c: tile(c, sizes[0]), step=sizes[0])
        if end < depth:
            e.loop(end, depth, lambda c: tile(c, sizes[1]), step=sizes[1])
    return fn


def _register_tile(e: Emitter, plan, row: int, depth: int, size: int) -> ir.Function:
    """The products of ``size`` input channels with NB vectors of output channels."""
    blocks = plan.blocks
    places = [c * plan.width + j * e.lanes for c in range(size) for j in range(blocks)]
    with e.function(f"tile_{depth}_{size}", [PTR, PTR, PTR, I64, I1]) as (fn, args):
        v, y, d, tiles, more = args

        def one(_: Int, *state: ir.Value) -> list[ir.Value]:
            v, y, *sums = state
            grads = [e.vload(y, j * e.lanes) for j in range(blocks)]
            for c in range(size):
                value = e.broadcast(v, c)
                for j in range(blocks):
                    sums[c * blocks + j] = e.fma(value, grads[j], sums[c * blocks + j])
            return [e.at(v, row), e.at(y, plan.width), *sums]

        _, _, *sums = e.loop(0, tiles, one, [v, y, *[e.zero] * len(places)])

        def store(add: bool) -> None:
            for value, place in zip(sums, places, strict=True):
                e.vstore(e.b.fadd(e.vload(d, place), value) if add else value, d, place)

        e.choose(more, lambda: store(True), lambda: store(False))
    return fn


def _result_function(e: Emitter, plan, depth: int) -> ir.Function:
    """result(d, to): G^T D G of all pairs of channels, tap by tap of the convolution's kernel."""
    tiles, tap_size = plan.tiles(depth), plan.channels * plan.width
    with e.function(f"result_{depth}", [PTR, PTR]) as (fn, (d, to)):

        def phase(first: int, odd: tuple[int, int]) -> None:
            (down, rows), (across, cols) = (_taps(plan, o) for o in odd)

            def vector(place: Int) -> None:
                source, columns = e.at(d, e.add(place, first)), []
                for col in range(len(across[0])):
                    planes = [row * tiles.size + col for row in range(len(down[0]))]
                    values = [e.vload(source, plane * plan.planes[2]) for plane in planes]
                    columns.append(apply(e, down, values))
                for row, line in zip(rows, zip(*columns, strict=True), strict=True):
                    for col, value in zip(cols, apply(e, across, line), strict=True):
                        e.vstore(value, e.at(to, place), (row * plan.kernel + col) * tap_size)

            e.loop(0, depth * plan.width, vector, step=e.lanes)

        for number, odd in enumerate(tiles.phases):
            phase(number * depth * plan.width, odd)
    return fn


def _taps(plan, odd: int) -> tuple[Matrix, range]:
    """(rows of G^T, the taps of the kernel they give) along one side, for even or odd inputs.

    A phase that lacks its last tap has no products at infinity, and its other taps need none.
    """
    taps = range(odd, plan.kernel, plan.stride)
    matrix = _transposed(weight_matrix(plan.m, plan.tiles(1).taps))[: len(taps)]
    if len(taps) < plan.tiles(1).taps:
        matrix = tuple(row[:-1] for row in matrix)
    return matrix, taps
