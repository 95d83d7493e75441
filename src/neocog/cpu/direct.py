"""Direct convolution: the literal sum, with as much of it as possible in registers.

A convolution is a list of taps. Tap t adds, to every output pixel, the products of one kernel
element with the input ``taps[t]`` elements away; so kernel size, dilation and the phases of a
strided gradient are data, and one compiled kernel serves them all. It is made for: channels per
group, pixel step (stride x channels), register tile, epilogue. Batch, height, width and every row
stride arrive at run time.

The register tile holds MR output pixels x NB vectors of output channels:

    for t in taps:  for c in channels:
        for p in MR:  x = broadcast(input[p*pixel_step + taps[t] + c])
            for j in NB:  acc[p][j] += x * w[t][c][j]

Depthwise layers (one channel per group in and out) keep channels in the lanes: x is a vector.

Input: NHWC with its halo. Weights: see ``copy.pack_weights``. Work items: blocks of NB vectors x
images x output rows (pooled rows if the epilogue pools), block slowest, so that a thread keeps one
block's weights in its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from llvmlite import ir

from ..steps import Bias, Step
from . import epilogue as ep
from . import pool as pooling
from .lanes import I64, PTR, Emitter, Int
from .runtime import Kernel, compile_kernel
from .tiling import TiledPlan

UNROLL = 8
"""Input channels per trip of the inner loop."""


@dataclass(frozen=True)
class DirectPlan(TiledPlan):
    """Everything a direct kernel is specialised on."""

    epilogue: tuple[Step, ...] = ()
    depthwise: bool = False
    winners: bool = False
    """Whether a fused max pool also stores which tap won, for the backward pass."""

    @property
    def pixels(self) -> tuple[int, ...]:
        """Tile widths in pixels: MR, then its binary fractions for what a row leaves over."""
        sizes = [self.target.pixels(self.blocks)]
        while sizes[-1] > 1:
            sizes.append(sizes[-1] // 2 if sizes[-1] % 2 == 0 else _power_below(sizes[-1]))
        return tuple(sizes)

    @property
    def name(self) -> str:
        """A name for the listing."""
        kind = "depthwise" if self.depthwise else "direct"
        tile = f"{self.pixels[0]}x{self.blocks}v{self.target.lanes}"
        steps = "".join("+" + str(s).split()[0].split("(")[0] for s in self.epilogue)
        return f"{kind}_c{self.channels}k{self.out_channels}_{tile}{steps}"


def _power_below(n: int) -> int:
    return 1 << ((n - 1).bit_length() - 1)


def fields(plan: DirectPlan) -> tuple[str, ...]:
    """What a step of this plan passes. Offsets and strides count in elements."""
    names = [
        "x*", "x_image", "x_row", "x_group", "w*", "taps*", "n_taps", "w_block",
        "out*", "out_image", "out_row", "out_pixel",
        "batch", "rows", "cols",
    ]  # fmt: skip
    names += [f"{p}*" for p in ep.parameters(plan.epilogue)]
    if ep.adds_residual(plan.epilogue):
        names += ["residual*", "residual_image", "residual_row", "residual_pixel"]
    if ep.pooling_of(plan.epilogue):
        names += ["scratch*", "scratch_stride", "pool_rows", "pool_cols"]
        if plan.winners:
            names += ["winners*", "winners_image", "winners_row", "winners_pixel"]
    return tuple(names)


def emit(plan: DirectPlan) -> Kernel:
    """Compile the kernel of a plan."""
    e = Emitter(plan.target, plan.name)
    tiles = {n: _tile_function(e, plan, n) for n in plan.pixels}
    names = fields(plan)
    with e.kernel(names) as (f, begin, end, thread):
        pool = ep.pooling_of(plan.epilogue)
        if pool is None:
            e.loop(begin, end, lambda item: _plain_item(e, plan, tiles, f, item))
        else:
            scratch = e.at(f.scratch, e.mul(thread, f.scratch_stride))
            _pooled_items(e, plan, tiles, f, begin, end, pool, scratch)
    return compile_kernel(e, names)


def _place(e: Emitter, plan: DirectPlan, f: SimpleNamespace, item, rows) -> SimpleNamespace:
    """Where work item ``item`` of ``rows`` rows per image stands."""
    block_number, row_number = e.divmod(item, e.mul(f.batch, rows))
    image, row = e.divmod(row_number, rows)
    group, block = e.divmod(block_number, plan.blocks_per_group)
    first = e.mul(block, plan.width)
    channel = e.add(e.mul(group, plan.out_channels), first)
    place = SimpleNamespace(
        image=image,
        row=row,
        channel=channel,
        row_number=row_number,
        valid=e.sub(plan.out_channels, first),
        w=e.at(f.w, e.mul(block_number, f.w_block)),
        x=e.at(f.x, e.add(e.mul(image, f.x_image), e.mul(group, f.x_group))),
    )
    if plan.depthwise:
        place.x = e.at(place.x, first)
    for name in ep.parameters(plan.epilogue):
        setattr(place, name, e.at(getattr(f, name), channel))
    return place


def _plain_item(e: Emitter, plan: DirectPlan, tiles, f: SimpleNamespace, item) -> None:
    at = _place(e, plan, f, item, f.rows)
    out = e.add(e.mul(at.image, f.out_image), e.mul(at.row, f.out_row))
    _row(e, plan, tiles, f, at, at.row, e.at(f.out, e.add(out, at.channel)), f.out_pixel)


def _row(e: Emitter, plan: DirectPlan, tiles, f, at, y: Int, out, out_pixel: Int) -> None:
    """One row of convolution outputs, tile after tile, into ``out``."""
    x = e.at(at.x, e.mul(y, f.x_row))
    extra: list[ir.Value] = [getattr(at, name) for name in ep.parameters(plan.epilogue)]
    residual = None
    if ep.adds_residual(plan.epilogue):
        offset = e.add(e.mul(at.image, f.residual_image), e.mul(y, f.residual_row))
        residual = e.at(f.residual, e.add(offset, at.channel))
    first: Int = 0
    for size, tile in tiles.items():

        def body(start: ir.Value, tile=tile) -> None:
            args = [
                e.at(x, e.mul(start, plan.pixel_step)), at.w, f.taps, f.n_taps,
                e.at(out, e.mul(start, out_pixel)), e.i(out_pixel), at.valid, *extra,
            ]  # fmt: skip
            if residual is not None:
                args += [e.at(residual, e.mul(start, f.residual_pixel)), f.residual_pixel]
            e.b.call(tile, args)

        whole = e.divmod(e.sub(f.cols, first), size)[0]
        stop = e.add(first, e.mul(whole, size))
        e.loop(first, stop, body, step=size)
        first = stop


def _tile_function(e: Emitter, plan: DirectPlan, pixels: int) -> ir.Function:
    """tile(x, w, taps, n_taps, out, out_pixel, valid, parameters..., residual, its pixel)."""
    names = ["x", "w", "taps", "n_taps", "out", "out_pixel", "valid"]
    names += ep.parameters(plan.epilogue)
    kinds = [PTR, PTR, PTR, I64, PTR, I64, I64] + [PTR] * (len(names) - 7)
    if ep.adds_residual(plan.epilogue):
        names, kinds = names + ["residual", "residual_pixel"], kinds + [PTR, I64]
    with e.function(f"tile_{pixels}", kinds) as (fn, args):
        a = SimpleNamespace(**dict(zip(names, args, strict=True)))
        masks = _masks(e, plan, a.valid)
        steps, start = plan.epilogue, [e.zero] * plan.blocks
        if steps and isinstance(steps[0], Bias):  # a bias that comes first is where the sum starts
            start = [e.vload(a.bias, j * e.lanes, masks[j]) for j in range(plan.blocks)]
            steps = steps[1:]
        sums = _sum_taps(e, plan, a, start * pixels, pixels, masks)
        _store_tile(e, plan, a, steps, sums, pixels, masks)
    return fn


def _masks(e: Emitter, plan: DirectPlan, valid: ir.Value) -> list[ir.Value | None]:
    """Per vector of channels, its lanes that exist; None where all do."""
    if plan.out_channels % plan.width == 0:
        return [None] * plan.blocks
    return [e.lane_mask(e.sub(valid, j * e.lanes)) for j in range(plan.blocks)]


def _sum_taps(e: Emitter, plan: DirectPlan, a, start: Sequence[ir.Value], pixels: int, masks):
    """The register tile's sums over all taps and channels, ``sums[p * blocks + j]``."""
    width, blocks = plan.width, plan.blocks

    def products(x, w, channels: int, sums: Sequence[ir.Value]) -> list[ir.Value]:
        sums = list(sums)
        for c in range(channels):
            weights = [e.vload(w, c * width + j * e.lanes) for j in range(blocks)]
            for p in range(pixels):
                where = p * plan.pixel_step + c
                value = None if plan.depthwise else e.broadcast(x, where)
                for j in range(blocks):
                    v = e.vload(x, where + j * e.lanes, masks[j]) if value is None else value
                    sums[p * blocks + j] = e.fma(v, weights[j], sums[p * blocks + j])
        return sums

    def tap(t: Int, *sums: ir.Value) -> list[ir.Value]:
        x = e.at(a.x, e.load(I64, a.taps, t))
        w = e.at(a.w, e.mul(t, plan.channels * width))
        whole = plan.channels - plan.channels % UNROLL

        def chunk(c: Int, *sums: ir.Value) -> list[ir.Value]:
            return products(e.at(x, c), e.at(w, e.mul(c, width)), UNROLL, sums)

        sums = tuple(e.loop(0, whole, chunk, sums, step=UNROLL))
        rest = plan.channels - whole
        return products(e.at(x, whole), e.at(w, whole * width), rest, sums)

    return e.loop(0, a.n_taps, tap, start)


def _store_tile(e: Emitter, plan: DirectPlan, a, steps, sums, pixels: int, masks) -> None:
    for j in range(plan.blocks):
        offset = j * e.lanes
        per_channel = ep.load_parameters(e, steps, a, offset, masks[j])

        def residual(p: int, offset: int = offset, mask=masks[j]) -> ir.Value:
            return e.vload(e.at(a.residual, e.mul(a.residual_pixel, p)), offset, mask)

        values = ep.finish(e, steps, list(sums[j :: plan.blocks]), per_channel, residual)
        for p, value in enumerate(values):
            e.vstore(value, e.at(a.out, e.mul(a.out_pixel, p)), offset, masks[j])


def scratch_rows(plan: DirectPlan) -> int:
    """Convolution rows a thread keeps for its pool: as many as one window spans."""
    pool = ep.pooling_of(plan.epilogue)
    return pool.rows.span if pool else 0


def _pooled_items(e: Emitter, plan: DirectPlan, tiles, f, begin, end, pool, scratch) -> None:
    """Pooled rows: compute the convolution rows that are new to each window, then pool them.

    Row y of the convolution lives in slot ``y % span`` of a ring, so that overlapping windows
    compute no row twice. ``done`` is the first row not yet computed for this block and image.
    """
    ring = pool.rows.span
    row_size = e.mul(f.cols, plan.width)

    def slot(y: Int) -> ir.Value:
        return e.at(scratch, e.mul(e.divmod(y, ring)[1], row_size))

    def body(item: ir.Value, done: ir.Value) -> list[ir.Value]:
        at = _place(e, plan, f, item, f.pool_rows)
        top = e.sub(e.mul(at.row, pool.rows.stride), pool.rows.low)
        needed = e.max(top, 0)
        # A new image (row 0) or this thread's first item starts with an empty ring.
        fresh = e.b.or_(e.equal(at.row, 0), e.equal(item, begin))
        first = e.b.select(fresh, needed, e.max(done, needed))
        last = e.min(e.add(top, ring), f.rows)
        e.loop(first, last, lambda y: _row(e, plan, tiles, f, at, y, slot(y), plan.width))
        out = e.add(e.mul(at.image, f.out_image), e.mul(at.row, f.out_row))
        sink = pooling.Sink(e.at(f.out, e.add(out, at.channel)), f.out_pixel)
        if plan.winners:
            where = e.add(e.mul(at.image, f.winners_image), e.mul(at.row, f.winners_row))
            size = pooling.winner_type(pool).width // 8
            sink.winners = e.at_byte(f.winners, e.mul(e.add(where, at.channel), size))
            sink.winners_pixel = f.winners_pixel
        source = pooling.Source(slot, plan.width, f.rows, f.cols)
        pooling.pool_row(e, pool, source, sink, top, f.pool_cols, plan.blocks,
                         _masks(e, plan, at.valid))  # fmt: skip
        return [e.max(first, last)]

    e.loop(begin, end, body, [I64(0)])
