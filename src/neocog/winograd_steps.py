"""The steps of a Winograd convolution inside a program: which it covers, its memory, its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from .convolutions import Weights
from .cpu import epilogue as ep
from .cpu.winograd import LINE, UNROLL, WinogradPlan, emit
from .cpu.winograd_transforms import TAPS
from .cpu.winograd_weights import pack_winograd
from .errors import Unsupported
from .kernels import copy_kernel
from .maps import Map
from .problem import Conv, Pooling, Step
from .program import Place, Program
from .target import Target

STAGED_TILES = 64
"""Up to this many tiles the three stages are steps of their own, which threads share evenly."""

BLOCK_BYTES = 600_000
"""V and M of one block of tiles: a part of the second-level cache."""

REUSE = 48
"""Tiles per block at least, where U does not fit that cache: each block reads all of U."""

CACHED_WEIGHTS = 700_000
"""Bytes of U that stay in the cache from block to block."""


PRODUCTS_SHARE = 0.97
"""Of the peak that the matrix products reach on data in the caches."""

TRANSFORM_SLOTS = {2: 4.5, 4: 6.5}
"""m -> vector instructions per vector of V, and of M, to transform it."""

SLOTS_PER_BYTE = 3.0
"""Multiply-adds at peak in the time that one byte comes from memory."""

HIDDEN = 0.8
"""The part of the shorter of computing and reading U that the longer one hides."""


def covers(conv: Conv, epilogue: tuple[Step, ...] = ()) -> bool:
    """Whether these kernels do ``conv`` with ``epilogue``, without saving anything for a gradient.

    3x3, dense, stride 1, one group, any padding; any pointwise steps; a max or mean pool of 2x2
    with stride 2, without padding, that leaves out what hangs over the end.
    """
    windows = (conv.rows, conv.cols)
    dense = all(
        (w.size, w.stride, w.dilation, w.base_dilation, w.ceil) == (TAPS, 1, 1, 1, False)
        for w in windows
    )
    if not dense or conv.groups != 1:
        return False
    try:
        ep.check_supported(epilogue)
    except Unsupported:
        return False
    pool = ep.pooling_of(epilogue)
    return pool is None or _covers_pool(pool)


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
) -> WinogradPlan:
    """The plan of the kernel that does one stage of ``conv``."""
    channels, out_channels = conv.in_channels, conv.out_channels
    if stage == "input":  # the same for every number of output channels, and for every epilogue
        return WinogradPlan(target, channels, 1, m, (), stage)
    if stage == "output":
        return WinogradPlan(target, 1, out_channels, m, epilogue, stage)
    steps = epilogue if stage == "whole" else ()
    return WinogradPlan(target, channels, out_channels, m, steps, stage)


def packed_elements(plan: WinogradPlan) -> int:
    """float32 elements of U."""
    return plan.planes * plan.groups * plan.panel


def pack(
    p: Program, target: Target, conv: Conv, weights: Weights, packed: Place, m: int = 4
) -> None:
    """The step that transforms weights into U, for :func:`convolve` of any size and epilogue."""
    plan = plan_of(target, conv, m=m)
    taps = [weights.tap(conv, y, x) for y in range(TAPS) for x in range(TAPS)]
    p.step(
        copy_kernel(pack_winograd, target, plan.channels, plan.out_channels, plan.m),
        plan.groups * plan.channels,
        w=weights.place, w_out=weights.out, w_in=weights.into,
        taps=p.constant(taps), packed=packed,
    )  # fmt: skip


def tiles_of(conv: Conv, m: int) -> tuple[int, int, int]:
    """(batch, tiles down, tiles across)."""
    batch, _, rows, cols = conv.out_shape
    return batch, -(-rows // m), -(-cols // m)


def block_of(plan: WinogradPlan, tiles: int) -> int:
    """Tiles per work item of the stage ``whole``: even blocks, and an even number of them."""
    fitting = BLOCK_BYTES // (4 * plan.planes * (plan.v_row + plan.m_row))
    if 4 * packed_elements(plan) > CACHED_WEIGHTS:
        fitting = max(fitting, REUSE)
    count = max(1, round(tiles / max(fitting, plan.pixels[0])))
    return -(-tiles // (count + count % 2))


def _prefetch(plan: WinogradPlan, tiles: int) -> int:
    """Lines of the next panel of U to fetch per trip, so that ``tiles`` tiles fetch all of it."""
    trips = plan.channels // UNROLL
    if not trips or 4 * packed_elements(plan) <= CACHED_WEIGHTS:
        return 0
    register_tiles = -(-tiles // plan.pixels[0])
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
    batch, down, across = tiles_of(conv, m)
    tiles = batch * down * across
    products = tiles * plan.planes * plan.channels * plan.m_row / PRODUCTS_SHARE
    transforms = tiles * plan.planes * TRANSFORM_SLOTS[m] * (plan.v_row + plan.m_row)
    bytes_read = 4 * packed_elements(plan)
    if bytes_read <= CACHED_WEIGHTS or not tiles:
        return products + transforms
    passes = 1 if tiles <= STAGED_TILES else -(-tiles // block_of(plan, tiles))
    computed, read = products + transforms, bytes_read * passes * SLOTS_PER_BYTE
    return max(computed, read) + (1 - HIDDEN) * min(computed, read)


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
) -> None:
    """The steps of a convolution that :func:`covers` accepts, on weights from :func:`pack`.

    ``x`` needs the halo of ``maps.halo_of(conv)`` and no more; ``out`` is the map of the pooled
    result if the epilogue pools. ``extra``: the places of the epilogue's parameters and residual.
    """
    batch, down, across = tiles_of(conv, m)
    tiles = batch * down * across
    corner = x.place + (-conv.rows.low * x.row - conv.cols.low * x.pixel)
    grid = {
        "tiles": tiles, "tiles_y": down, "tiles_x": across,
        "rows": conv.out_shape[2], "cols": conv.out_shape[3],
    }  # fmt: skip
    into, to = replace(x, place=corner).fields("x"), {**out.fields("out"), **extra}
    whole = plan_of(target, conv, epilogue, m)
    if tiles > STAGED_TILES:
        _blocks(p, whole, tiles, packed, grid | into | to)
    elif tiles:
        plans = [plan_of(target, conv, epilogue, m, s) for s in ("input", "products", "output")]
        _stages(p, plans, packed, grid, into, to)
    p.work += conv.multiply_adds


def _blocks(p: Program, plan: WinogradPlan, tiles: int, packed: Place, fields: dict) -> None:
    block = block_of(plan, tiles)
    v_plane, m_plane = block * plan.v_row + LINE, block * plan.m_row + LINE
    step = p.step(
        copy_kernel(emit, plan), -(-tiles // block),
        **fields, u=packed, prefetch=_prefetch(plan, block),
        v_plane=v_plane, m_plane=m_plane, block=block,
    )  # fmt: skip
    between = plan.planes * (v_plane + m_plane)
    p.thread_scratch(step, "scratch", plan.patch + LINE + between)


def _stages(p: Program, plans: list[WinogradPlan], packed: Place, grid, into, to) -> None:
    """Three steps; V and M of all tiles in the arena."""
    first, products, last = plans
    tiles = grid["tiles"]
    v_plane, m_plane = tiles * products.v_row + LINE, tiles * products.m_row + LINE
    v, m = p.scratch(products.planes * v_plane), p.scratch(products.planes * m_plane)
    step = p.step(copy_kernel(emit, first), tiles, **grid, **into, v=v, v_plane=v_plane)
    p.thread_scratch(step, "scratch", first.patch)
    p.step(
        copy_kernel(emit, products), products.planes * products.groups, tiles=tiles,
        u=packed, prefetch=_prefetch(products, tiles), v=v, v_plane=v_plane, m=m, m_plane=m_plane,
    )  # fmt: skip
    p.step(copy_kernel(emit, last), tiles, **grid, **to, m=m, m_plane=m_plane)
    p.release(v)
    p.release(m)
