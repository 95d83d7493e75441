"""The gradient of a convolution with respect to its weights (and bias): sums over all pixels.

    dw[tap][c][k] = sum over images, rows, columns of  x[pixel at tap][c] * grad[pixel][k]

The register tile holds some (tap, input channel) pairs x NB vectors of output channels; each pixel
multiplies one broadcast input per pair with NB vectors of the gradient. Layers with few input
channels take several taps into one tile, so that it is full all the same.

Sums run over bands of rows that fit the cache, accumulating in memory between bands. Where one
layer has too few tiles to share out, the batch is cut into chunks with partial sums of their own,
added in order afterwards (``copy.unpack_weights``). How many depends on the problem alone: the
result has the same bits on any number of threads.

Partial results: [chunk][block][tap][channel][NB x lanes], the order of packed weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from llvmlite import ir

from .lanes import I64, PTR, Emitter, Int
from .runtime import Kernel, compile_kernel
from .tiling import TiledPlan

MAX_TAPS = 9
"""Taps per tile: each keeps a pointer in one of the 16 integer registers."""

BAND_PIXELS = 192
"""Pixels summed per visit of a tile: enough to make loading and storing it cheap."""


ITEM_SUMS = 40_000
"""Sums of one work item, float32 elements: a part of the second-level cache."""


@dataclass(frozen=True)
class WeightGradientPlan(TiledPlan):
    """Everything the kernel is specialised on."""

    bias: bool
    """Whether the gradient of the bias is summed too."""

    @property
    def taps(self) -> int:
        """Taps per register tile."""
        return max(1, min(MAX_TAPS, self.target.pixels(self.blocks) // self.channels))

    @property
    def name(self) -> str:
        """A name for the listing."""
        return f"weight_gradient_c{self.channels}k{self.out_channels}_{self.taps}t"


def fields(plan: WeightGradientPlan) -> tuple[str, ...]:
    """What a step of this plan passes."""
    names = (
        "x*", "x_image", "x_row", "x_group", "taps*", "n_taps",
        "grad*", "grad_image", "grad_row", "grad_pixel",
        "partial*", "chunk_step", "chunk_images", "batch", "rows", "cols", "band", "groups",
        "item_taps",
    )  # fmt: skip
    return names + (("bias*", "bias_step") if plan.bias else ())


def items(plan: WeightGradientPlan, n_taps: int, item_taps: int, groups: int, chunks: int) -> int:
    """Work items: chunks x blocks x runs of ``item_taps`` taps; without taps, bias alone."""
    return chunks * groups * plan.blocks_per_group * max(1, -(-n_taps // item_taps))


def most_taps(plan: WeightGradientPlan) -> int:
    """Taps of a work item at most: they share each band, and a cache holds their sums."""
    return max(1, ITEM_SUMS // (plan.taps * plan.channels * plan.width)) * plan.taps


def emit(plan: WeightGradientPlan) -> Kernel:
    """Compile the kernel of a plan."""
    e = Emitter(plan.target, plan.name)
    names = fields(plan)
    bands = {q: _tap_band_function(e, plan, q) for q in sorted({plan.taps, 1})}
    bias = _bias_function(e, plan) if plan.bias else None
    with e.kernel(names) as (f, begin, end, _):
        e.loop(begin, end, lambda item: _item(e, plan, bands, bias, f, item))
    return compile_kernel(e, names)


def _item(e: Emitter, plan, bands, bias, f: SimpleNamespace, item: ir.Value) -> None:
    runs = e.max(e.divmod(e.add(f.n_taps, e.sub(f.item_taps, 1)), f.item_taps)[0], 1)
    rest, run = e.divmod(item, runs)
    chunk, block_number = e.divmod(rest, e.mul(f.groups, plan.blocks_per_group))
    group, block = e.divmod(block_number, plan.blocks_per_group)
    tap = e.mul(run, f.item_taps)
    count = e.min(e.sub(f.n_taps, tap), f.item_taps)
    tap_size = plan.channels * plan.width
    partial = e.add(e.mul(chunk, f.chunk_step), e.mul(e.mul(block_number, f.n_taps), tap_size))
    partial = e.at(f.partial, e.add(partial, e.mul(tap, tap_size)))
    e.zero_fill(partial, e.mul(count, tap_size))
    x = e.at(f.x, e.mul(group, f.x_group))
    channel = e.add(e.mul(group, plan.out_channels), e.mul(block, plan.width))
    grad = e.at(f.grad, channel)
    sums = None
    if bias is not None:
        sums = e.at(f.bias, e.add(e.mul(chunk, f.bias_step), e.mul(block_number, plan.width)))
        e.choose(e.equal(run, 0), lambda: e.zero_fill(sums, plan.width))
    taps = e.b.gep(f.taps, [tap], source_etype=I64)

    def image(n: ir.Value) -> None:
        def band(y: ir.Value) -> None:
            height = e.min(e.sub(f.rows, y), f.band)
            grad_here = e.at(grad, e.add(e.mul(n, f.grad_image), e.mul(y, f.grad_row)))
            x_here = e.at(x, e.add(e.mul(n, f.x_image), e.mul(y, f.x_row)))
            sizes = [height, f.x_row, f.grad_row, f.grad_pixel, f.cols]
            last = e.b.icmp_signed(">=", e.add(y, f.band), f.rows)
            ahead = [
                e.b.select(last, e.sub(image, e.mul(y, row)), e.mul(f.band, row))
                for image, row in ((f.x_image, f.x_row), (f.grad_image, f.grad_row))
            ]

            def some(first: Int, number: int) -> None:
                at_taps = e.b.gep(taps, [first], source_etype=I64)
                to = e.at(partial, e.mul(first, tap_size))
                e.b.call(bands[number], [x_here, at_taps, grad_here, to, *sizes, *ahead])

            whole = e.sub(count, e.divmod(count, plan.taps)[1])
            e.loop(0, whole, lambda t: some(t, plan.taps), step=plan.taps)
            e.loop(whole, count, lambda t: some(t, 1))
            if bias is not None:
                args = [grad_here, sums, height, f.grad_row, f.grad_pixel, f.cols]
                e.choose(e.equal(run, 0), lambda: e.b.call(bias, args) and None)

        # A band's height is a run-time number, hence a loop over bands rather than a step.
        number = e.divmod(e.add(f.rows, e.sub(f.band, 1)), f.band)[0]
        e.loop(0, number, lambda b: band(e.mul(b, f.band)))

    first = e.mul(chunk, f.chunk_images)
    e.loop(first, e.min(e.add(first, f.chunk_images), f.batch), image)


BAND_ARGS = (PTR, PTR, PTR, PTR, I64, I64, I64, I64, I64, I64, I64)
"""x, taps, grad, partial, height, x_row, grad_row, grad_pixel, cols; then how far behind them the
next band of x and of grad stand: each tile asks for its share of it, or reading from a distant
memory would hold up the first tile alone."""


def _tap_band_function(e: Emitter, plan: WeightGradientPlan, taps: int) -> ir.Function:
    """Add one band to the partial sums of ``taps`` taps x all channels."""
    limit = plan.target.pixels(plan.blocks) // taps
    tiles = -(-plan.channels // limit)
    size = -(-plan.channels // tiles)
    rest = plan.channels % size
    functions = {m: _tile_function(e, plan, taps, m, tiles) for m in {size, rest} - {0}}
    with e.function(f"band_{taps}", BAND_ARGS) as (fn, args):
        x, offsets, grad, partial, *sizes, next_x, next_grad = args
        lines = -(-plan.channels // e.lanes)

        def tile(c: Int, m: int = size) -> None:
            number = e.divmod(c, size)[0]
            to = e.at(partial, e.mul(c, plan.width))
            line = e.divmod(e.mul(number, _share(lines, tiles)), lines)[1]
            ahead_x = e.add(next_x, e.sub(e.mul(line, e.lanes), c))
            line = e.divmod(e.mul(number, _share(plan.blocks, tiles)), plan.blocks)[1]
            ahead = [ahead_x, e.add(next_grad, e.mul(line, e.lanes))]
            e.b.call(functions[m], [e.at(x, c), offsets, grad, to, *sizes, *ahead])

        e.loop(0, plan.channels - rest, tile, step=size)
        if rest:
            tile(plan.channels - rest, rest)
    return fn


def _share(lines: int, tiles: int) -> int:
    """Cache lines of each pixel of the next band that one tile asks for."""
    return -(-lines // tiles)


def _tile_function(
    e: Emitter, plan: WeightGradientPlan, taps: int, m: int, tiles: int
) -> ir.Function:
    """Add one band to the register tile of ``taps`` taps x ``m`` channels x NB vectors."""
    with e.function(f"tile_{taps}_{m}", BAND_ARGS) as (fn, args):
        x, offsets, grad, partial, height, x_row, grad_row, grad_pixel, cols, *following = args
        shares = _share(-(-plan.channels // e.lanes), tiles), _share(plan.blocks, tiles)
        bases = [e.at(x, e.load(I64, offsets, t)) for t in range(taps)]
        places = [
            (t * plan.channels + c) * plan.width + j * e.lanes
            for t in range(taps)
            for c in range(m)
            for j in range(plan.blocks)
        ]

        def row(y: Int, *sums: ir.Value) -> list[ir.Value]:
            x_start = e.mul(y, x_row)
            pointers = [e.at(base, x_start) for base in bases]
            start = [*pointers, e.at(grad, e.mul(y, grad_row)), *sums]
            return e.loop(0, cols, pixel, start)[taps + 1 :]

        def pixel(_: Int, *state: ir.Value) -> list[ir.Value]:
            xs, g, sums = state[:taps], state[taps], list(state[taps + 1 :])
            grads = [e.vload(g, j * e.lanes) for j in range(plan.blocks)]
            for p, ahead, lines in zip((xs[0], g), following, shares, strict=True):
                for line in range(lines):
                    e.prefetch(e.at(p, ahead), line * e.lanes, near=False)
            number = 0
            for t in range(taps):
                for c in range(m):
                    value = e.broadcast(xs[t], c)
                    for j in range(plan.blocks):
                        sums[number] = e.fma(value, grads[j], sums[number])
                        number += 1
            moved = [e.at(p, plan.pixel_step) for p in xs]
            return [*moved, e.at(g, grad_pixel), *sums]

        # Added to what there is at the end: short sums round less than one long one.
        sums = e.loop(0, height, row, [e.zero] * len(places))
        for value, place in zip(sums, places, strict=True):
            e.vstore(e.b.fadd(e.vload(partial, place), value), partial, place)
    return fn


def _bias_function(e: Emitter, plan: WeightGradientPlan) -> ir.Function:
    """Add the band's gradients themselves: (grad, sums, height, grad_row, grad_pixel, cols)."""
    kinds = (PTR, PTR, I64, I64, I64, I64)
    with e.function("bias_band", kinds) as (fn, (grad, to, height, grad_row, grad_pixel, cols)):

        def row(y: Int, *sums: ir.Value) -> list[ir.Value]:
            def pixel(x: Int, *sums: ir.Value) -> list[ir.Value]:
                g = e.at(grad, e.add(e.mul(y, grad_row), e.mul(x, grad_pixel)))
                return [e.b.fadd(s, e.vload(g, j * e.lanes)) for j, s in enumerate(sums)]

            return e.loop(0, cols, pixel, sums)

        for j, value in enumerate(e.loop(0, height, row, [e.zero] * plan.blocks)):
            e.vstore(e.b.fadd(e.vload(to, j * e.lanes), value), to, j * e.lanes)
    return fn
