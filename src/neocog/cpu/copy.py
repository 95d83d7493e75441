"""Copies between layouts: what stands before and behind the arithmetic.

- ``pack``: an activation in either of PyTorch's layouts into the internal one, NHWC with a halo of
  zeros, row by row.
- ``transpose``: rows of NHWC into NCHW planes.
- ``border``: the halo of a buffer whose interior another kernel writes.
- ``pack_weights`` / ``unpack_weights``: a weight tensor of any strides into the order the direct
  kernel reads, [block][tap][input channel][NB x lanes], and the gradient back out of it.
"""

from __future__ import annotations

from llvmlite import ir

from ..target import Target
from .lanes import F32, I64, PTR, Emitter, Int
from .runtime import Kernel, compile_kernel

PACK = (
    "x*", "x_image", "x_row", "x_channel",
    "out*", "out_image", "out_row",
    "height", "width", "channels", "top", "left", "padded_height", "right",
)  # fmt: skip


def pack(target: Target, transpose: bool, few: int = 0) -> Kernel:
    """Items: N x padded rows. ``transpose``: the source is NCHW, else NHWC.

    ``few``: the number of channels, if they are too few for transposing squares of vectors.
    """
    e = Emitter(target, f"pack_{'nchw' if transpose else 'nhwc'}{f'_c{few}' if few else ''}")
    tile = _transpose_function(e) if transpose and not few else None
    with e.kernel(PACK) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            n, row = e.divmod(number, f.padded_height)
            to = e.at(f.out, e.add(e.mul(n, f.out_image), e.mul(row, f.out_row)))
            y = e.sub(row, f.top)
            source = e.at(f.x, e.add(e.mul(n, f.x_image), e.mul(y, f.x_row)))
            inside = e.b.and_(e.less(-1, y), e.less(y, f.height))
            left, middle = e.mul(f.left, f.channels), e.mul(f.width, f.channels)

            def interior() -> None:
                e.zero_fill(to, left)
                start = e.at(to, left)
                if few:

                    def pixel(x: Int) -> None:
                        _pixel(e, f, e.at(source, x), e.at(start, e.mul(x, few)), few)

                    e.loop(0, f.width, pixel)
                elif tile is None:
                    e.copy(start, source, middle)
                else:
                    args = [source, f.x_channel, start, f.channels, f.channels, f.width]
                    e.b.call(tile, args)
                e.zero_fill(e.at(start, middle), e.mul(f.right, f.channels))

            margins = e.mul(e.add(e.add(f.left, f.width), f.right), f.channels)
            e.choose(inside, interior, lambda: e.zero_fill(to, margins))

        e.loop(begin, end, item)
    return compile_kernel(e, PACK)


FOLD = (
    "x*", "x_image", "x_row", "x_pixel", "x_channel", "out*", "rows", "cols",
    "height", "width", "top", "left",
)  # fmt: skip


def fold(target: Target, channels: int, phases: tuple[tuple[int, int], ...]) -> Kernel:
    """An activation of any strides as one of half its size, dense NHWC with 4 times the channels.

    out[n][y][x][phase * channels + c] = x[n][c][2y + odd row - top][2x + odd column - left] where
    ``phases`` lists (odd row, odd column), and zero beyond the borders. Items: N x rows.
    """
    e = Emitter(target, f"fold_c{channels}")
    depth = channels * len(phases)
    with e.kernel(FOLD) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            n, y = e.divmod(number, f.rows)
            to = e.at(f.out, e.mul(number, e.mul(f.cols, depth)))
            e.zero_fill(to, e.mul(f.cols, depth))
            for odd in (0, 1):
                row = e.sub(e.add(e.mul(y, 2), odd), f.top)
                source = e.at(f.x, e.add(e.mul(n, f.x_image), e.mul(row, f.x_row)))
                mine = [(p[1], i) for i, p in enumerate(phases) if p[0] == odd]

                def copy_row(source: ir.Value = source, mine: list = mine) -> None:
                    for odd_col, place in mine:
                        _fold_row(
                            e, f, source, e.at(to, place * channels), odd_col, channels, depth
                        )

                inside = e.b.and_(e.less(-1, row), e.less(row, f.height))
                e.choose(inside, copy_row)

        e.loop(begin, end, item)
    return compile_kernel(e, FOLD)


def _fold_row(e: Emitter, f, source, to, odd: int, channels: int, depth: int) -> None:
    """Every other pixel of a row, those inside the borders."""
    before = e.sub(f.left, odd)  # pixel x of the result is pixel 2x - before of the source
    start = e.divmod(e.max(e.add(before, 1), 0), 2)[0]
    stop = e.min(e.divmod(e.max(e.add(e.add(f.width, before), 1), 0), 2)[0], f.cols)

    def pixel(x: Int) -> None:
        place = e.at(source, e.mul(e.sub(e.mul(x, 2), before), f.x_pixel))
        _pixel(e, f, place, e.at(to, e.mul(x, depth)), channels)

    e.loop(start, stop, pixel)


def _pixel(e: Emitter, f, source: ir.Value, to: ir.Value, channels: int) -> None:
    """Copy the channels of one pixel."""
    for c in range(channels):
        value = e.b.load(e.at(source, e.mul(f.x_channel, c)), align=4, typ=F32)
        e.b.store(value, e.at(to, c), align=4)


TRANSPOSE = (
    "x*", "x_image", "x_row", "x_pixel", "out*", "out_image", "out_row", "out_channel",
    "height", "width", "channels",
)  # fmt: skip


def transpose(target: Target) -> Kernel:
    """NHWC rows to NCHW planes; items: N x H."""
    e = Emitter(target, "transpose")
    tile = _transpose_function(e)
    with e.kernel(TRANSPOSE) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            n, y = e.divmod(number, f.height)
            source = e.at(f.x, e.add(e.mul(n, f.x_image), e.mul(y, f.x_row)))
            to = e.at(f.out, e.add(e.mul(n, f.out_image), e.mul(y, f.out_row)))
            e.b.call(tile, [source, f.x_pixel, to, f.out_channel, f.width, f.channels])

        e.loop(begin, end, item)
    return compile_kernel(e, TRANSPOSE)


def _transpose_function(e: Emitter) -> ir.Function:
    """(source, source stride, to, to stride, rows, columns): to[c][r] = source[r][c]."""
    with e.function("transpose_matrix", [PTR, I64, PTR, I64, I64, I64]) as (fn, args):
        source, source_stride, to, to_stride, rows, columns = args

        def row_tile(r: Int) -> None:
            def column_tile(c: Int) -> None:
                _transpose_tile(
                    e,
                    e.at(source, e.add(e.mul(r, source_stride), c)),
                    source_stride,
                    e.at(to, e.add(e.mul(c, to_stride), r)),
                    to_stride,
                    e.sub(rows, r),
                    e.sub(columns, c),
                )

            e.loop(0, columns, column_tile, step=e.lanes)

        e.loop(0, rows, row_tile, step=e.lanes)
    return fn


def _transpose_tile(e: Emitter, source, source_stride, to, to_stride, rows, columns) -> None:
    """One square of lanes x lanes, its rows and columns beyond the given counts masked off."""
    vectors = _load_square(e, source, source_stride, rows, columns)
    for c, vector in enumerate(transposed(e, vectors)):
        valid = e.b.select(e.less(c, columns), rows, I64(0))
        e.vstore(vector, to, e.mul(to_stride, c), e.lane_mask(valid))


def _load_square(e: Emitter, source, stride, rows: Int, columns: Int) -> list[ir.Value]:
    """lanes x lanes elements as rows of vectors, 0 beyond the given counts."""
    vectors = []
    for r in range(e.lanes):
        # No columns where the row is outside: an all-false mask touches no memory.
        valid = e.b.select(e.less(r, rows), e.i(columns), I64(0))
        vectors.append(e.vload(source, e.mul(stride, r), e.lane_mask(valid)))
    return vectors


def transposed(e: Emitter, vectors: list[ir.Value]) -> list[ir.Value]:
    """The transpose of a square of registers: log2(lanes) rounds of exchanging halves.

    Round h exchanges, between rows r and r + h (bit h of r clear), the elements whose column has
    bit h set in r with those that have it clear in r + h.
    """
    lanes, h = e.lanes, 1
    vectors = list(vectors)
    index = ir.VectorType(ir.IntType(32), lanes)
    while h < lanes:
        low = ir.Constant(index, [c if not c & h else lanes + c - h for c in range(lanes)])
        high = ir.Constant(index, [c + h if not c & h else lanes + c for c in range(lanes)])
        for r in range(lanes):
            if not r & h:
                a, b = vectors[r], vectors[r + h]
                vectors[r] = e.b.shuffle_vector(a, b, low)
                vectors[r + h] = e.b.shuffle_vector(a, b, high)
        h *= 2
    return vectors


BORDER = (
    "out*", "out_image", "out_row", "height", "top", "bottom", "left", "right", "width_elements"
)  # fmt: skip


def border(target: Target) -> Kernel:
    """Zero the halo around ``height`` rows of ``width_elements``; margins in elements.

    ``out`` is the buffer's first element, the halo's corner. Items: N.
    """
    e = Emitter(target, "border")
    with e.kernel(BORDER) as (f, begin, end, _):

        def item(n: ir.Value) -> None:
            image = e.at(f.out, e.mul(n, f.out_image))
            e.zero_fill(image, e.mul(f.top, f.out_row))

            def row(y: ir.Value) -> None:
                start = e.at(image, e.mul(e.add(y, f.top), f.out_row))
                e.zero_fill(start, f.left)
                e.zero_fill(e.at(start, e.add(f.left, f.width_elements)), f.right)

            e.loop(0, f.height, row)
            below = e.mul(e.add(f.top, f.height), f.out_row)
            e.zero_fill(e.at(image, below), e.mul(f.bottom, f.out_row))

        e.loop(begin, end, item)
    return compile_kernel(e, BORDER)


WEIGHTS = (
    "w*", "w_out", "w_in", "group_step", "packed*", "chunks", "chunk_step",
    "taps*", "n_taps", "channels", "out_channels", "blocks_per_group",
)  # fmt: skip


def pack_weights(target: Target, blocks: int, contiguous: bool) -> Kernel:
    """Weights into [block][tap][channel][NB x lanes], zeros beyond the last output channel.

    ``w_out``, ``w_in``, ``group_step``: strides of ``w``; ``taps``: the offset of each tap in it.
    ``contiguous``: tap t of input channel c stands at ``c * n_taps + t``; squares are then
    transposed in registers, which is several times faster than gathering.
    Items: groups x blocks per group. (``chunks`` and ``chunk_step`` are for the way back.)
    """
    e = Emitter(target, f"pack_weights_{blocks}")
    with e.kernel(WEIGHTS) as (f, begin, end, _):

        def vector(where: ir.Value, packed: ir.Value, mask: ir.Value) -> None:
            (value,) = e.choose(
                e.equal(f.w_out, 1),
                lambda: [e.vload(where, 0, mask)],
                lambda: [e.gather(where, f.w_out, mask)],
            )
            e.vstore(value, packed)

        if contiguous:
            e.loop(begin, end, lambda item: _pack_contiguous(e, f, item, blocks))
        else:
            _each_weight_vector(e, f, begin, end, blocks, vector)
    return compile_kernel(e, WEIGHTS)


def _pack_contiguous(e: Emitter, f, number: ir.Value, blocks: int) -> None:
    width, size = blocks * e.lanes, e.mul(f.n_taps, f.channels)
    group, block = e.divmod(number, f.blocks_per_group)
    first = e.mul(block, width)
    start = e.at(f.w, e.add(e.mul(group, f.group_step), e.mul(first, f.w_out)))
    to = e.at(f.packed, e.mul(number, e.mul(size, width)))
    for j in range(blocks):
        rows = e.sub(f.out_channels, e.add(first, j * e.lanes))

        def square(i: Int, j: int = j, rows: Int = rows) -> None:
            source = e.at(start, e.add(e.mul(f.w_out, j * e.lanes), i))
            vectors = _load_square(e, source, f.w_out, rows, e.sub(size, i))
            for c, vector in enumerate(transposed(e, vectors)):
                column = e.add(i, c)
                channel, tap = e.divmod(column, f.n_taps)
                place = e.mul(e.add(e.mul(tap, f.channels), channel), width)
                mask = e.lane_mask(e.b.select(e.less(column, size), I64(e.lanes), I64(0)))
                e.vstore(vector, to, e.add(place, j * e.lanes), mask)

        e.loop(0, size, square, step=e.lanes)


def unpack_weights(target: Target, blocks: int, contiguous: bool) -> Kernel:
    """The way back: ``w`` = the sum over ``chunks`` partial results, in order.

    Items: as above; if ``contiguous``, as many for each of the ``blocks`` vectors of a block.
    """
    e = Emitter(target, f"unpack_weights_{blocks}{'_contiguous' if contiguous else ''}")
    with e.kernel(WEIGHTS) as (f, begin, end, _):

        def vector(where: ir.Value, packed: ir.Value, mask: ir.Value) -> None:
            (total,) = _sums(e, f, packed, [0])
            e.scatter(total, where, f.w_out, mask)

        if contiguous:
            e.loop(begin, end, lambda item: _unpack_contiguous(e, f, item, blocks))
        else:
            _each_weight_vector(e, f, begin, end, blocks, vector)
    return compile_kernel(e, WEIGHTS)


def _sums(e: Emitter, f, packed: ir.Value, places: list[Int]) -> list[ir.Value]:
    """The vectors at some places of the partial results, summed over the chunks."""

    def add(chunk: Int, *totals: ir.Value) -> list[ir.Value]:
        here = e.at(packed, e.mul(chunk, f.chunk_step))
        return [e.b.fadd(t, e.vload(here, p)) for t, p in zip(totals, places, strict=True)]

    return e.loop(1, f.chunks, add, [e.vload(packed, place) for place in places])


def _unpack_contiguous(e: Emitter, f, number: ir.Value, blocks: int) -> None:
    """Squares of output channels x neighbouring weights, transposed in registers."""
    width, size = blocks * e.lanes, e.mul(f.n_taps, f.channels)
    whole, j = e.divmod(number, blocks)
    group, block = e.divmod(whole, f.blocks_per_group)
    first = e.add(e.mul(block, width), e.mul(j, e.lanes))
    start = e.at(f.w, e.add(e.mul(group, f.group_step), e.mul(first, f.w_out)))
    packed = e.at(f.packed, e.add(e.mul(whole, e.mul(size, width)), e.mul(j, e.lanes)))
    rows = e.sub(f.out_channels, first)

    def square(i: Int) -> None:
        (channel, tap), places = e.divmod(i, f.n_taps), []
        for column in range(e.lanes):
            place = e.mul(e.add(e.mul(tap, f.channels), channel), width)
            inside = e.less(e.add(i, column), size)
            places.append(e.b.select(inside, place, I64(0)))
            tap = e.add(tap, 1)
            last = e.equal(tap, f.n_taps)
            channel = e.b.select(last, e.add(channel, 1), channel)
            tap = e.b.select(last, I64(0), tap)
        columns = e.sub(size, i)
        for r, vector in enumerate(transposed(e, _sums(e, f, packed, places))):
            # No columns where the row is outside: an all-false mask touches no memory.
            valid = e.b.select(e.less(r, rows), columns, I64(0))
            e.vstore(vector, e.at(start, e.mul(f.w_out, r)), i, e.lane_mask(valid))

    e.loop(0, size, square, step=e.lanes)


def _each_weight_vector(e: Emitter, f, begin, end, blocks: int, visit) -> None:
    width = blocks * e.lanes

    def item(number: ir.Value) -> None:
        group, block = e.divmod(number, f.blocks_per_group)
        first = e.mul(block, width)
        start = e.at(f.w, e.add(e.mul(group, f.group_step), e.mul(first, f.w_out)))
        rows = e.mul(f.n_taps, f.channels)
        to = e.at(f.packed, e.mul(number, e.mul(rows, width)))

        def tap(t: Int) -> None:
            place = e.load(I64, f.taps, t)
            at_tap = e.at(start, place)
            count = e.b.select(e.less(place, 0), I64(0), f.out_channels)  # none of what is no tap

            def channel(c: Int) -> None:
                where = e.at(at_tap, e.mul(c, f.w_in))
                packed = e.at(to, e.mul(e.add(e.mul(t, f.channels), c), width))
                for j in range(blocks):
                    offset = j * e.lanes
                    mask = e.lane_mask(e.sub(count, e.add(first, offset)))
                    visit(e.at(where, e.mul(f.w_out, offset)), e.at(packed, offset), mask)

            e.loop(0, f.channels, channel)

        e.loop(0, f.n_taps, tap)

    e.loop(begin, end, item)
