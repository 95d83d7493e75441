"""Direct convolution: the literal sum, with as much of it as possible in registers.

A convolution is a list of taps. Tap t adds, to every output pixel, the products of one kernel
element with the input ``taps[t]`` elements away; so kernel size, dilation and the phases of a
strided gradient are data, and one compiled kernel serves them all. It is made for: channels per
group, pixel step (stride x channels), register tiles, epilogue. Batch, height, width and every row
stride arrive at run time.

The register tile holds up to MR output pixels x NB vectors of output channels:

    for t in taps:  for c in channels:
        for p in MR:  x = broadcast(input[p*pixel_step + taps[t] + c])
            for j in NB:  acc[p][j] += x * w[t][c][j]

Depthwise layers (one channel per group in and out) keep channels in the lanes: x is a vector.
(:mod:`neocog.cpu.depthwise` is faster where it applies.)

Weights that a cache does not hold are used in *chunks*: a chunk of input channels of one tap serves
all pixels of the work item, whose sums wait in scratch, while the next chunk is prefetched:

    for t in taps:  for chunk of channels:  for tiles:  sums[tile] += the chunk's products
    for tiles:  out[tile] = epilogue(sums[tile])

Input: NHWC with its halo. Weights: see ``copy.pack_weights``. The tiles of all rows of all images
are one list. A work item is a run of them for one block of NB vectors, runs fastest, so that a
thread keeps one block's weights in its cache; or, where the cache holds the weights of all
``blocks``, a run for all of them, block after block for each tile, so that a thread reads its input
and writes its output once and in order. The list may fall into parts of ``part_tiles`` tiles, done
one after the other in ``part`` items each. If the epilogue pools, it is a pooled row for one block.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from llvmlite import ir

from . import epilogue as ep
from . import pool as pooling
from .direct_tile import UNROLL, DirectPlan, chunk_function, masks, tile_function, vectors
from .lanes import I64, Emitter, Int
from .runtime import Kernel, compile_kernel

__all__ = ["UNROLL", "DirectPlan", "emit", "fields", "scratch_rows"]


def fields(plan: DirectPlan) -> tuple[str, ...]:
    """What a step of this plan passes. Offsets and strides count in elements.

    ``tiles`` cover a row, the first ``wide`` of them of the largest size; ``tail`` holds (first
    pixel, index of its size) of the others.
    """
    names = [
        "x*", "x_image", "x_row", "x_group", "w*", "taps*", "n_taps", "w_block",
        "out*", "out_image", "out_row", "out_pixel",
        "batch", "rows", "tiles", "wide", "tail*",
    ]  # fmt: skip
    names += [f"{p}*" for p in ep.parameters(plan.epilogue)]
    if ep.adds_residual(plan.epilogue):
        names += ["residual*", "residual_image", "residual_row", "residual_pixel"]
    if plan.chunk:
        names += ["sums*", "sums_stride"]
    if not ep.pooling_of(plan.epilogue):
        return (*names, "run", "runs", "part", "part_tiles", *(() if plan.chunk else ("blocks",)))
    names += ["scratch*", "scratch_stride", "cols", "pool_rows", "pool_cols"]
    if plan.winners:
        names += ["winners*", "winners_image", "winners_row", "winners_pixel"]
    return tuple(names)


def emit(plan: DirectPlan) -> Kernel:
    """Compile the kernel of a plan."""
    e = Emitter(plan.target, plan.name)
    pool = ep.pooling_of(plan.epilogue)
    # By the index of their size, as a row's tail lists them.
    whole = {i: tile_function(e, plan, n) for i, n in enumerate(plan.tiles)}
    chunks = None
    if plan.chunk:
        chunks = {i: chunk_function(e, plan, n) for i, n in enumerate(plan.tiles)}
    names = fields(plan)
    with e.kernel(names) as (f, begin, end, thread):
        if pool is not None:
            scratch = e.at(f.scratch, e.mul(thread, f.scratch_stride))
            _pooled_items(e, plan, whole, f, begin, end, pool, scratch)
        elif chunks is not None:
            sums = e.at(f.sums, e.mul(thread, f.sums_stride))
            e.loop(begin, end, lambda item: _chunked_item(e, plan, chunks, whole, f, item, sums))
        else:
            e.loop(begin, end, lambda item: _plain_item(e, plan, whole, f, item))
    return compile_kernel(e, names)


# ------------------------------------------------------------------------------------ places


def _block(e: Emitter, plan: DirectPlan, f: SimpleNamespace, number: Int) -> SimpleNamespace:
    """Where block ``number`` of output channels stands, in image 0."""
    group, block = e.divmod(number, plan.blocks_per_group)
    first = e.mul(block, plan.width)
    channel = e.add(e.mul(group, plan.out_channels), first)
    at = SimpleNamespace(
        channel=channel,
        valid=e.sub(plan.out_channels, first),
        w=e.at(f.w, e.mul(number, f.w_block)),
        x=e.at(f.x, e.mul(group, f.x_group)),
        out=e.at(f.out, channel),
        residual=e.at(f.residual, channel) if ep.adds_residual(plan.epilogue) else None,
    )
    if plan.depthwise:
        at.x = e.at(at.x, first)
    at.parameters = [e.at(getattr(f, name), channel) for name in ep.parameters(plan.epilogue)]
    return at


def _row_of(e: Emitter, f: SimpleNamespace, name: str, pointer, image: Int, row: Int) -> ir.Value:
    """The first element of a row of the map called ``name``."""
    strides = getattr(f, f"{name}_image"), getattr(f, f"{name}_row")
    return e.at(pointer, e.add(e.mul(image, strides[0]), e.mul(row, strides[1])))


def _tile(e: Emitter, plan: DirectPlan, f: SimpleNamespace, number: Int) -> tuple[Int, Int]:
    """(first pixel, index of its size) of a tile of a row."""
    if len(plan.tiles) == 1:
        return e.mul(number, plan.tiles[0]), 0

    def other() -> list[ir.Value]:
        entry = e.mul(e.sub(number, f.wide), 2)
        return [e.load(I64, f.tail, e.add(entry, i)) for i in range(2)]

    wide = e.less(number, f.wide)
    pixel, size = e.choose(wide, lambda: [e.mul(number, plan.tiles[0]), I64(0)], other)
    return pixel, size


def _each_tile(
    e: Emitter, f: SimpleNamespace, first: Int, count: Int, visit: Callable[..., None]
) -> None:
    """``visit(i, image, row, tile)`` for tiles ``first + i`` of the list of all rows' tiles."""
    number, tile = e.divmod(first, f.tiles)
    image, row = e.divmod(number, f.rows)

    def body(i: Int, image: Int, row: Int, tile: Int) -> list[ir.Value]:
        visit(i, image, row, tile)
        following = e.add(tile, 1)
        ends = e.equal(following, f.tiles)
        row = e.b.select(ends, e.add(row, 1), row)
        last = e.equal(row, f.rows)
        return [
            e.b.select(last, e.add(image, 1), image),
            e.b.select(last, I64(0), row),
            e.b.select(ends, I64(0), following),
        ]

    e.loop(0, e.i(count), body, [image, row, tile])


# ------------------------------------------------------------------------------------- items


def _item(e: Emitter, f: SimpleNamespace, item) -> tuple[Int, Int, Int]:
    """(first block, first tile, number of tiles) of a work item."""
    part, rest = e.divmod(item, f.part)
    block, number = e.divmod(rest, f.runs)
    start, total = e.mul(part, f.part_tiles), e.mul(e.mul(f.batch, f.rows), f.tiles)
    first = e.add(start, e.mul(number, f.run))
    left = e.sub(e.min(e.add(start, f.part_tiles), total), first)
    return block, first, e.max(e.min(f.run, left), 0)


def _plain_item(e: Emitter, plan: DirectPlan, whole, f: SimpleNamespace, item) -> None:
    block, first, count = _item(e, f, item)

    def visit(_: Int, image: Int, row: Int, tile: Int) -> None:
        pixel, kind = _tile(e, plan, f, tile)

        def one(number: Int) -> None:
            at = _block(e, plan, f, e.add(block, number))
            x = e.at(_row_of(e, f, "x", at.x, image, row), e.mul(pixel, plan.pixel_step))
            out = e.at(_row_of(e, f, "out", at.out, image, row), e.mul(pixel, f.out_pixel))
            args = [x, at.w, f.taps, f.n_taps, out, f.out_pixel, at.valid, *at.parameters]
            args += _residual(e, plan, f, at, image, row, pixel)
            e.call_for(kind, whole, args)

        e.loop(0, f.blocks, one)

    _each_tile(e, f, first, count, visit)


def _residual(e: Emitter, plan: DirectPlan, f, at, image: Int, row: Int, pixel: Int) -> list:
    """The tile functions' last arguments."""
    if at.residual is None:
        return []
    start = _row_of(e, f, "residual", at.residual, image, row)
    return [e.at(start, e.mul(pixel, f.residual_pixel)), f.residual_pixel]


def _chunked_item(e: Emitter, plan: DirectPlan, chunks, whole, f, item, sums) -> None:
    block, first, count = _item(e, f, item)
    at = _block(e, plan, f, block)
    tile_size, size = plan.tiles[0] * plan.width, plan.chunk * plan.width
    e.zero_fill(sums, e.mul(count, tile_size))

    def tap(t: Int) -> None:
        offset = e.load(I64, f.taps, t)

        def chunk(c: Int) -> None:
            w = e.at(at.w, e.mul(e.add(e.mul(t, plan.channels), c), plan.width))
            channels = e.min(plan.chunk, e.sub(plan.channels, c))

            def visit(i: Int, image: Int, row: Int, tile: Int) -> None:
                pixel, kind = _tile(e, plan, f, tile)
                x = e.at(_row_of(e, f, "x", at.x, image, row), e.mul(pixel, plan.pixel_step))
                # The first NB tiles prefetch a part of the next chunk each, the others nothing new.
                part = e.add(size, e.mul(i, size // plan.blocks))
                ahead = e.at(w, e.b.select(e.less(i, plan.blocks), e.i(part), I64(0)))
                x, place = e.at(x, e.add(offset, c)), e.at(sums, e.mul(i, tile_size))
                e.call_for(kind, chunks, [e.i(channels), x, w, place, ahead])

            _each_tile(e, f, first, count, visit)

        e.loop(0, plan.channels, chunk, step=plan.chunk)

    def finish(i: Int, image: Int, row: Int, tile: Int) -> None:
        pixel, kind = _tile(e, plan, f, tile)
        out = e.at(_row_of(e, f, "out", at.out, image, row), e.mul(pixel, f.out_pixel))
        args = [e.at(sums, e.mul(i, tile_size)), out, f.out_pixel, at.valid, *at.parameters]
        e.call_for(kind, whole, args + _residual(e, plan, f, at, image, row, pixel))

    e.loop(0, f.n_taps, tap)
    _each_tile(e, f, first, count, finish)


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
        block, number = e.divmod(item, e.mul(f.batch, f.pool_rows))
        image, row = e.divmod(number, f.pool_rows)
        at = _block(e, plan, f, block)
        top = e.sub(e.mul(row, pool.rows.stride), pool.rows.low)
        needed = e.max(top, 0)
        # A new image (row 0) or this thread's first item starts with an empty ring.
        fresh = e.b.or_(e.equal(row, 0), e.equal(item, begin))
        first = e.b.select(fresh, needed, e.max(done, needed))
        last = e.min(e.add(top, ring), f.rows)
        e.loop(first, last, lambda y: _ring_row(e, plan, tiles, f, at, image, y, slot(y)))
        sink = pooling.Sink(_row_of(e, f, "out", at.out, image, row), f.out_pixel)
        if plan.winners:
            where = e.add(e.mul(image, f.winners_image), e.mul(row, f.winners_row))
            size = pooling.winner_type(pool).width // 8
            sink.winners = e.at_byte(f.winners, e.mul(e.add(where, at.channel), size))
            sink.winners_pixel = f.winners_pixel
        source = pooling.Source(slot, plan.width, f.rows, f.cols)
        pooling.pool_row(e, pool, source, sink, top, f.pool_cols, plan.blocks,
                         masks(vectors(e, plan), plan, at.valid))  # fmt: skip
        return [e.max(first, last)]

    e.loop(begin, end, body, [I64(0)])


def _ring_row(e: Emitter, plan: DirectPlan, whole, f, at, image: Int, row: Int, slot) -> None:
    """One row of convolution outputs into its slot of the ring."""
    x = _row_of(e, f, "x", at.x, image, row)

    def visit(tile: Int) -> None:
        pixel, kind = _tile(e, plan, f, tile)
        args = [
            e.at(x, e.mul(pixel, plan.pixel_step)), at.w, f.taps, f.n_taps,
            e.at(slot, e.mul(pixel, plan.width)), I64(plan.width), at.valid, *at.parameters,
        ]  # fmt: skip
        e.call_for(kind, whole, args + _residual(e, plan, f, at, image, row, pixel))

    e.loop(0, f.tiles, visit)
