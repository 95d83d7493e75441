"""The steps of a Winograd convolution inside a program: which it covers, its memory, its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from .convolutions import Weights
from .cpu import copy
from .cpu import epilogue as ep
from .cpu.winograd import emit
from .cpu.winograd_plan import LINE, UNROLL, WinogradPlan
from .cpu.winograd_transforms import POINTS
from .cpu.winograd_weights import NO_TAP, pack_winograd
from .errors import Unsupported
from .kernels import copy_kernel, serves_any_size
from .maps import FEW, Map
from .problem import Conv, Pooling, Step
from .program import Place, Program
from .target import Target

KERNELS = {1: (3,), 2: (3, 5, 7)}
"""Stride -> sizes of kernels."""

STAGES = ("input", "products", "output")

STAGED_TILES = 64
"""Up to this many tiles the three stages are steps of their own, which threads share evenly."""

BLOCK_BYTES = 600_000
"""V and M of one block of tiles: a part of the second-level cache."""

REUSE = 32
"""Tiles per block at least, where U does not fit that cache: each block reads all of U."""

CACHED_WEIGHTS = 700_000
"""Bytes of U that stay in the cache from block to block."""


SLICE_BYTES = 4_800_000
"""U of so many output channels at a time, where it serves once: it never gets as far as memory."""

PRODUCTS_SHARE = 0.97
"""Of the peak that the matrix products reach on data in the caches."""

TRANSFORM_SLOTS = {2: 4.5, 4: 6.5, 6: 8.0}
"""m -> vector instructions per vector of V, and of M, to transform it."""

SLOTS_PER_BYTE = 3.0
"""Multiply-adds at peak in the time that one byte comes from memory."""

HIDDEN = 0.8
"""The part of the shorter of computing and reading U that the longer one hides."""


def covers(conv: Conv, epilogue: tuple[Step, ...] = ()) -> bool:
    """Whether these kernels do ``conv`` with ``epilogue``, without saving anything for a gradient.

    Square kernels of one group (3x3; with stride 2 also 5x5 and 7x7), any padding; any pointwise
    steps; a max or mean pool of 2x2 with stride 2, without padding, that leaves out what hangs over
    the end.
    """
    down, across = conv.rows, conv.cols
    square = (down.size, down.stride) == (across.size, across.stride)
    dense = all((w.dilation, w.base_dilation, w.ceil) == (1, 1, False) for w in (down, across))
    if not (square and dense and conv.groups == 1):
        return False
    if down.size not in KERNELS.get(down.stride, ()):
        return False
    if down.stride > 1 and conv.in_channels % UNROLL and not folds(conv):
        return False
    try:
        ep.check_supported(epilogue)
    except Unsupported:
        return False
    pool = ep.pooling_of(epilogue)
    return pool is None or _covers_pool(pool)


def has_tiles(conv: Conv, m: int) -> bool:
    """Whether there are kernels for tiles of m x m; the largest pay at stride 1 alone."""
    stride = conv.rows.stride
    return m + -(-conv.rows.size // stride) - 2 in POINTS and (m <= 4 or stride == 1)


def folds(conv: Conv) -> bool:
    """Whether the phases of the input of a layer with stride 2 become channels beforehand.

    With few channels: they would fill no vectors otherwise.
    """
    return conv.rows.stride == conv.cols.stride == 2 and conv.in_channels <= FEW


def _covers_pool(pool: Pooling) -> bool:
    whole = all(
        (w.size, w.stride, w.dilation, w.low, w.high, w.ceil) == (2, 2, 1, 0, 0, False)
        for w in (pool.rows, pool.cols)
    )
    return whole and pool.divisor_override in (None, 4)


def plan_of(
    target: Target,
    conv: Conv,
    epilogue: tuple[Step, ...] = (),
    m: int = 4,
    stage: str = "whole",
    any_size: bool = False,
) -> WinogradPlan:
    """The plan of the kernel that does one stage of ``conv``, or of maps of any size like it."""
    channels, out_channels = conv.in_channels, conv.out_channels
    if stage == "input":  # the same for every number of output channels, and for every epilogue
        out_channels = 1
    if stage == "output":
        channels = 1
    steps = epilogue if stage in ("whole", "output") else ()
    rows, cols = _outputs(conv, epilogue)
    return WinogradPlan(
        target, channels, out_channels, m, steps, stage,
        kernel=conv.rows.size, stride=conv.rows.stride,
        tails=(0, 0) if any_size else (rows % m, cols % m), folded=folds(conv), any_size=any_size,
    )  # fmt: skip


def _outputs(conv: Conv, epilogue: tuple[Step, ...]) -> tuple[int, int]:
    """Rows and columns that are computed: a pool drops what fills no window."""
    _, _, rows, cols = conv.out_shape
    if ep.pooling_of(epilogue) is not None:
        return rows - rows % 2, cols - cols % 2
    return rows, cols


def packed_elements(plan: WinogradPlan) -> int:
    """float32 elements of U."""
    return plan.planes * plan.groups * plan.panel


def pack(
    p: Program, target: Target, conv: Conv, weights: Weights, packed: Place, m: int = 4
) -> None:
    """The step that transforms weights into U, for :func:`convolve` of any size and epilogue."""
    plan = plan_of(target, conv, m=m)
    taps = []
    for odd_row, odd_col in plan.phases:
        for y in range(odd_row, plan.taps * plan.stride, plan.stride):
            for x in range(odd_col, plan.taps * plan.stride, plan.stride):
                inside = max(y, x) < plan.kernel
                taps.append(weights.tap(conv, y, x) if inside else NO_TAP)
    p.step(
        copy_kernel(
            pack_winograd, target, plan.channels, plan.out_channels, plan.m, plan.kernel,
            plan.stride,
        ),
        plan.groups * plan.depth,
        w=weights.place, w_out=weights.out, w_in=weights.into,
        taps=p.constant(taps), packed=packed,
    )  # fmt: skip


def grid_of(plan: WinogradPlan, conv: Conv) -> dict[str, int]:
    """How many whole tiles the outputs of ``conv`` hold, by the names the kernels use.

    Where tiles of any size count as whole, all that hold outputs which ``plan`` computes.
    """
    if plan.any_size:
        rows, cols = _outputs(conv, plan.epilogue)
        return {"batch": conv.batch, "whole_y": -(-rows // plan.m), "whole_x": -(-cols // plan.m)}
    _, _, rows, cols = conv.out_shape
    return {"batch": conv.batch, "whole_y": rows // plan.m, "whole_x": cols // plan.m}


def tiles_of(plan: WinogradPlan, conv: Conv) -> int:
    """Tiles of all kinds."""
    grid = grid_of(plan, conv)
    down, across = (
        grid[name] + (tail > 0)
        for name, tail in zip(("whole_y", "whole_x"), plan.tails, strict=True)
    )
    return conv.batch * down * across


def block_of(plan: WinogradPlan, tiles: int) -> int:
    """Tiles per work item of the stage ``whole``: even blocks, and an even number of them."""
    fitting = BLOCK_BYTES // (4 * plan.planes * (plan.v_row + plan.m_row))
    if 4 * packed_elements(plan) > CACHED_WEIGHTS:
        fitting = max(fitting, REUSE)
    count = max(1, round(tiles / max(fitting, plan.pixels)))
    return -(-tiles // (count + count % 2))


def _prefetch(plan: WinogradPlan, tiles: int) -> int:
    """Lines of the next panel of U to fetch per trip, so that ``tiles`` tiles fetch all of it."""
    trips = plan.depth // UNROLL
    if not trips or 4 * packed_elements(plan) <= CACHED_WEIGHTS:
        return 0
    register_tiles = -(-tiles // plan.pixels)
    return min(2 * LINE, -(-plan.panel // (LINE * trips * register_tiles)))


def cost(target: Target, conv: Conv, m: int = 4) -> float:
    """The time of :func:`convolve` on one thread, in multiply-adds at the processor's peak.

    To be compared with the multiply-adds of a direct convolution over its share of the peak:

        c = products + transforms,   u = reading U from behind the second-level cache
        max(c, u) + (1 - HIDDEN) * min(c, u)

    because U of the next register tiles is fetched while these are multiplied. Padding to whole
    vectors and tiles counts in all terms. The constants are fitted to measured layers.
    """
    plan = plan_of(target, conv, (), m)
    tiles = tiles_of(plan, conv)
    products = products_of(plan, conv) * plan.channels * plan.m_row / PRODUCTS_SHARE
    transforms = tiles * plan.planes * TRANSFORM_SLOTS[m] * (plan.v_row + plan.m_row)
    bytes_read = 4 * packed_elements(plan)
    if bytes_read <= CACHED_WEIGHTS or not tiles:
        return products + transforms
    passes = 1 if tiles <= STAGED_TILES else -(-tiles // block_of(plan, tiles))
    computed, read = products + transforms, bytes_read * passes * SLOTS_PER_BYTE
    return max(computed, read) + (1 - HIDDEN) * min(computed, read)


def products_of(plan: WinogradPlan, conv: Conv) -> int:
    """Products for each pair of channels, of all tiles and phases."""
    grid, result = grid_of(plan, conv), conv.batch
    for name, tail in zip(("whole_y", "whole_x"), plan.tails, strict=True):
        one_axis = 0
        for outputs, count in ((plan.m, grid[name]), (tail, int(tail > 0))):
            used = len(plan.uses(outputs)) * plan.stride - plan.shortened if count else 0
            one_axis += count * used
        result *= one_axis
    return result


def convolve(
    p: Program,
    target: Target,
    conv: Conv,
    x: Map,
    packed: Place,
    out: Map,
    epilogue: tuple[Step, ...] = (),
    extra: Mapping[str, Place | int] = MappingProxyType({}),
    m: int = 4,
    plane: int = 0,
) -> None:
    """The steps of a convolution that :func:`covers` accepts, on weights from :func:`pack`.

    ``x`` needs the halo of ``maps.halo_of(conv)`` and no more, and none if it is folded, when its
    channels may also be ``plane`` elements apart (NCHW); ``out`` is the map of the pooled
    result if the epilogue pools. ``extra``: the places of the epilogue's parameters and residual.
    """
    x = _with_padding(p, target, plan_of(target, conv, epilogue, m), conv, x, plane)
    any_size = _serves_any_size(target, conv, epilogue, m)
    _computed(p, target, conv, m, epilogue, x, packed, {**out.fields("out"), **extra}, any_size)


def convolve_packing(
    p: Program, target: Target, conv: Conv, weights: Weights, x: Map, out: Map,
    epilogue: tuple[Step, ...] = (), extra: Mapping[str, Place | int] = MappingProxyType({}),
    m: int = 4,
) -> None:  # fmt: skip
    """:func:`pack` and :func:`convolve` for weights that serve once.

    As many output channels at a time as U has room for near the processor: it is written, read
    once, and gone.
    """
    whole = plan_of(target, conv, epilogue, m)
    x = _with_padding(p, target, whole, conv, x, 0)
    count = whole.width * max(1, SLICE_BYTES // (4 * whole.planes * whole.panel))
    largest = replace(conv, out_channels=min(count, conv.out_channels))
    packed = p.scratch(packed_elements(plan_of(target, largest, m=m)))
    v, fields = None, {**out.fields("out"), **extra}
    for first in range(0, conv.out_channels, count):
        part = replace(conv, out_channels=min(count, conv.out_channels - first))
        own = replace(weights, place=weights.place + first * weights.out)
        pack(p, target, part, own, packed, m)
        # All places are of vectors per channel, or of maps whose channels are neighbours.
        to = {n: f + first if isinstance(f, Place) else f for n, f in fields.items()}
        any_size = _serves_any_size(target, part, epilogue, m)
        v = _computed(p, target, part, m, epilogue, x, packed, to, any_size, v)


def _with_padding(
    p: Program, target: Target, plan: WinogradPlan, conv: Conv, x: Map, plane: int
) -> Map:
    """The input from the corner of its padding on."""
    if folds(conv):
        return fold(p, target, plan, conv, x, plane)
    return replace(x, place=x.place + (-conv.rows.low * x.row - conv.cols.low * x.pixel))


def _computed(
    p: Program, target: Target, conv: Conv, m: int, epilogue: tuple[Step, ...], x: Map,
    packed: Place, to: Mapping[str, Place | int], any_size: bool, v: Place | None = None,
) -> Place | None:  # fmt: skip
    """The steps that compute; ``v``: the transformed input, if it is there from an earlier part."""
    plan = plan_of(target, conv, epilogue, m, any_size=any_size)
    grid, tiles, into = grid_of(plan, conv), tiles_of(plan, conv), x.fields("x")
    p.work += conv.multiply_adds
    size = {}
    if any_size:
        size = dict(zip(("rows", "cols"), _outputs(conv, epilogue), strict=True))
    if tiles > STAGED_TILES:
        _blocks(p, plan, tiles, packed, {**grid, **size, **into, **to})
    elif tiles:
        plans = [plan_of(target, conv, epilogue, m, s, any_size) for s in STAGES]
        v = _stages(p, plans, tiles, packed, grid, {**size, **into}, {**size, **to}, v)
    return v


def _serves_any_size(target: Target, conv: Conv, epilogue: tuple[Step, ...], m: int) -> bool:
    """Whether kernels for any size take the place of those for this one."""
    own = plan_of(target, conv, epilogue, m)
    staged = tiles_of(own, conv) <= STAGED_TILES

    def prepare() -> None:
        for stage in ("whole", *STAGES):
            copy_kernel(emit, plan_of(target, conv, epilogue, m, stage, any_size=True))

    return serves_any_size((own, staged), prepare)


def fold(p: Program, target: Target, plan: WinogradPlan, conv: Conv, x: Map, plane: int) -> Map:
    """The input with its padding, the four phases of a pixel as its channels."""
    _, _, rows, cols = conv.out_shape
    rows, cols = rows + plan.taps - 1, cols + plan.taps - 1
    depth = plan.depth
    place = p.scratch(conv.batch * rows * cols * depth)
    made = Map(place, rows * cols * depth, cols * depth, depth)
    p.step(
        copy_kernel(copy.fold, target, plan.channels, plan.phases), conv.batch * rows,
        **x.fields("x"), x_channel=plane or 1,
        out=place, rows=rows, cols=cols, height=conv.height, width=conv.width,
        top=conv.rows.low, left=conv.cols.low,
    )  # fmt: skip
    return made


def _blocks(p: Program, plan: WinogradPlan, tiles: int, packed: Place, fields: dict) -> None:
    block = block_of(plan, tiles)
    v_plane, m_plane = block * plan.v_row + LINE, block * plan.m_row + LINE
    step = p.step(
        copy_kernel(emit, plan), -(-tiles // block),
        **fields, u=packed, prefetch=_prefetch(plan, block),
        v_plane=v_plane, m_plane=m_plane, block=block,
    )  # fmt: skip
    between = plan.planes * (v_plane + m_plane)
    p.thread_scratch(step, "scratch", between)


def _stages(
    p: Program, plans: list[WinogradPlan], tiles: int, packed: Place, grid, into, to,
    v: Place | None,
) -> Place:  # fmt: skip
    """Three steps; V and M of all tiles in the arena."""
    first, products, last = plans
    v_plane, m_plane = tiles * products.v_row + LINE, tiles * products.m_row + LINE
    if v is None:
        v = p.scratch(products.planes * v_plane)
        p.step(copy_kernel(emit, first), tiles, **grid, **into, v=v, v_plane=v_plane)
    m = p.scratch(products.planes * m_plane)
    p.step(
        copy_kernel(emit, products), products.planes * products.groups, **grid,
        u=packed, prefetch=_prefetch(products, tiles), v=v, v_plane=v_plane, m=m, m_plane=m_plane,
    )  # fmt: skip
    p.step(copy_kernel(emit, last), tiles, **grid, **to, m=m, m_plane=m_plane)
    return v
