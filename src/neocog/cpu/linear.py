"""The fully connected layer, on PyTorch's own weight matrix.

    out[n, k] = epilogue(sum over c of x[n, c] * w[k, c])

x is (N, C), w is (K, C), out is (N, K), all with rows of neighbouring elements. The weights are
read where they are: no packed copy to keep or to keep true. Vectors run along c, so every pair of
an output and an image has a vector of partial sums, which is added up at the end. The register
tile holds the sums of KR outputs x up to NR images:

    for c in vectors:  for k in KR:  for n in NR:  acc[k][n] += w[k][c] * x[n][c]

A work item is a block of outputs for all images. Its weights are used in chunks of c that stay in
the cache while all images pass, and sums wait on the stack in between; with one tile of images
there is nothing to keep, and the rows of weights are read from end to end. Each chunk is summed
from zero, which also keeps rounding errors small. What is added to what, in which order, depends
on C alone: neither threads nor the other images of a batch change a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from llvmlite import ir

from ..steps import Step
from ..target import Target
from . import epilogue as ep
from .lanes import I64, PTR, Emitter, Int
from .runtime import Kernel, compile_kernel

OUTPUTS_PER_ITEM = 16
"""Outputs of a work item: a multiple of the lanes of every target and of every KR."""

ROWS = 4
"""KR: each input vector is used for so many outputs."""

CHUNK = 512
"""Inputs per chunk: those of one item's outputs fill 32 KB. A multiple of the lanes."""

IMAGES_AT_ONCE = 48
"""Images that pass while a chunk of weights is in the cache; their sums stand on the stack."""

LINE = 64
"""Bytes of a cache line: a vector of sums that crosses one costs twice."""


@dataclass(frozen=True)
class LinearPlan:
    """Everything a linear kernel is specialised on; all sizes arrive at run time."""

    target: Target
    epilogue: tuple[Step, ...] = ()

    @property
    def name(self) -> str:
        """A name for the listing."""
        return f"linear_v{self.target.lanes}{ep.spelled(self.epilogue)}"

    @property
    def images(self) -> int:
        """NR: images of the largest register tile."""
        return self._accumulators // ROWS

    def outputs(self, images: int) -> int:
        """KR for a tile of ``images``: with few of them, more rows of weights are under way."""
        return 2 * ROWS if 2 * ROWS * images <= self._accumulators else ROWS

    @property
    def _accumulators(self) -> int:
        return max(blocks * pixels for blocks, pixels in self.target.tiles)


def fields(plan: LinearPlan) -> tuple[str, ...]:
    """What a step of this plan passes; row strides count in elements.

    Items: OUTPUTS_PER_ITEM outputs each.
    """
    names = ["x*", "x_row", "w*", "w_row", "out*", "out_row", "batch", "outputs", "inputs"]
    return (*names, *(f"{p}*" for p in ep.parameters(plan.epilogue)))


def emit(plan: LinearPlan) -> Kernel:
    """Compile the kernel of a plan."""
    e = Emitter(plan.target, plan.name)
    tiles = {n: _tile_function(e, plan, n) for n in range(plan.images, 0, -1)}
    names = fields(plan)
    with e.kernel(names) as (f, begin, end, _):
        words = IMAGES_AT_ONCE * OUTPUTS_PER_ITEM * e.lanes // 2
        unaligned = e.b.ptrtoint(e.stack(words + LINE // 8), I64)
        sums = e.b.inttoptr(e.b.and_(e.b.add(unaligned, I64(LINE - 1)), I64(-LINE)), PTR)

        def item(number: ir.Value) -> None:
            first = e.mul(number, OUTPUTS_PER_ITEM)
            valid = e.min(e.sub(f.outputs, first), OUTPUTS_PER_ITEM)

            def group(image: Int) -> None:
                count = e.min(e.sub(f.batch, image), IMAGES_AT_ONCE)
                at = SimpleNamespace(
                    w=e.at(f.w, e.mul(first, f.w_row)),
                    x=e.at(f.x, e.mul(image, f.x_row)),
                    out=e.at(f.out, e.add(e.mul(image, f.out_row), first)),
                    sums=sums,
                    count=count,
                    valid=valid,
                )
                for name in ep.parameters(plan.epilogue):
                    setattr(at, name, e.at(getattr(f, name), first))
                e.zero_fill(sums, e.mul(count, OUTPUTS_PER_ITEM * e.lanes))
                _sum(e, plan, tiles, f, at)
                e.loop(0, count, lambda i: _finish(e, plan, f, at, i))

            e.loop(0, f.batch, group, step=IMAGES_AT_ONCE)

        e.loop(begin, end, item)
    return compile_kernel(e, names)


def _sum(
    e: Emitter, plan: LinearPlan, tiles: dict[int, ir.Function], f: SimpleNamespace, at
) -> None:
    """The partial sums of an item's outputs for a group of images: sums[image][output][lane].

    The images are ``number`` tiles as even as can be, ``larger`` of ``size`` + 1, the others of
    ``size``. A single tile takes few rows of weights from end to end, see above.
    """
    number = e.divmod(e.add(at.count, plan.images - 1), plan.images)[0]
    size, larger = e.divmod(at.count, number)
    pace = e.divmod(e.add(number, e.lanes - 1), number)[0]
    band = e.b.select(e.equal(number, 1), I64(2 * ROWS), I64(OUTPUTS_PER_ITEM))

    def outputs(number_of_band: Int) -> None:
        first = e.mul(number_of_band, band)
        valid = e.min(e.sub(at.valid, first), band)
        w = e.at(at.w, e.mul(first, f.w_row))

        def chunk(c: Int) -> None:
            inputs = e.min(e.sub(f.inputs, c), CHUNK)

            def tile(i: Int) -> None:
                image = e.add(e.mul(i, size), e.min(i, larger))
                sums = e.add(e.mul(image, OUTPUTS_PER_ITEM), first)
                x = e.at(at.x, e.add(e.mul(image, f.x_row), c))
                args = [e.at(w, c), f.w_row, x, f.x_row, inputs, valid]
                args.append(e.at(at.sums, e.mul(sums, e.lanes)))
                # Each tile of images asks for its share of the next chunk of weights.
                args += [e.add(CHUNK, e.mul(i, e.mul(pace, CHUNK // e.lanes))), pace]
                here = e.add(size, e.b.zext(e.less(i, larger), I64))
                e.call_for(here, tiles, args)

            e.loop(0, number, tile)

        e.loop(0, f.inputs, chunk, step=CHUNK)

    e.loop(0, e.divmod(e.add(at.valid, e.sub(band, 1)), band)[0], outputs)


def _tile_function(e: Emitter, plan: LinearPlan, images: int) -> ir.Function:
    """tile(w, w_row, x, x_row, inputs, outputs, sums): add the products of one chunk.

    KR outputs at a time. A tile that hangs over the last output reads that output's weights again,
    and leaves sums that nobody looks at.
    """
    kr = plan.outputs(images)
    with e.function(f"tile_{images}", [PTR, I64, PTR, I64, I64, I64, PTR, I64, I64]) as (fn, args):
        w, w_row, x, x_row, inputs, outputs, sums, ahead, pace = args
        # Tiles of few images mostly stand alone: rows are read from end to end, and the processor
        # sees by itself what comes next.
        ahead_of_time = kr == ROWS
        xs = [e.at(x, e.mul(x_row, n)) for n in range(images)]
        rest = e.b.and_(inputs, I64(e.lanes - 1))
        whole = e.sub(inputs, rest)
        mask = e.lane_mask(rest)

        def rows(first: Int) -> None:
            last = e.sub(outputs, 1)
            ws = [e.at(w, e.mul(w_row, e.min(e.add(first, k), last))) for k in range(kr)]

            def products(c: Int, acc: tuple, mask=None) -> list[ir.Value]:
                values = [e.vload(p, c, mask) for p in xs]
                result = list(acc)
                for k, row in enumerate(ws):
                    weight = e.vload(row, c, mask)
                    for n, value in enumerate(values):
                        at = k * images + n
                        result[at] = e.fma(value, weight, result[at])
                return result

            def some(c: Int, ahead: ir.Value, *acc: ir.Value) -> list[ir.Value]:
                for row in ws if ahead_of_time else ():
                    e.prefetch(row, ahead)
                return [e.add(ahead, pace), *products(c, acc)]

            start = [ahead, *[e.zero] * (kr * images)]
            _, *acc = e.loop(0, whole, some, start, step=e.lanes)
            acc = e.choose(e.equal(rest, 0), lambda: acc, lambda: products(whole, tuple(acc), mask))
            for k in range(kr):
                for n in range(images):
                    output = e.add(first, n * OUTPUTS_PER_ITEM + k)
                    place = e.at(sums, e.mul(output, e.lanes))
                    e.vstore(e.b.fadd(e.vload(place), acc[k * images + n]), place)

        e.loop(0, outputs, rows, step=kr)
    return fn


def _finish(e: Emitter, plan: LinearPlan, f: SimpleNamespace, at, image: Int) -> None:
    """Add up the partial sums of one image, take the epilogue's steps and store the outputs."""
    sums = e.at(at.sums, e.mul(image, OUTPUTS_PER_ITEM * e.lanes))
    out = e.at(at.out, e.mul(image, f.out_row))
    for first in range(0, OUTPUTS_PER_ITEM, e.lanes):
        mask = e.lane_mask(e.sub(at.valid, first))
        total = _across(e, [e.vload(sums, (first + k) * e.lanes) for k in range(e.lanes)])
        per_channel = ep.load_parameters(e, plan.epilogue, at, first, mask)
        (total,) = ep.finish(e, plan.epilogue, [total], per_channel, lambda _: e.zero)
        e.vstore(total, out, first, mask)


def _across(e: Emitter, vectors: list[ir.Value]) -> ir.Value:
    """The vector whose lane k is the sum over the lanes of ``vectors[k]``; as many as lanes.

    Each round adds neighbouring lanes and puts the halves of two vectors together.
    """

    def lanes(a: ir.Value, b: ir.Value, first: int) -> ir.Value:
        index = ir.Constant(e.ints, list(range(first, 2 * e.lanes, 2)))
        return e.b.shuffle_vector(a, b, index)

    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [e.b.fadd(lanes(a, b, 0), lanes(a, b, 1)) for a, b in pairs]
    return vectors[0]
