"""The steps that sum a depthwise convolution's weight and bias gradients, inside a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .convolutions import Taps
from .cpu import copy, depthwise_gradient
from .cpu.tiling import cover
from .kernels import copy_kernel, kernel, serves_any_size
from .maps import Map
from .problem import Conv
from .program import Place, Program
from .target import Target

ITEMS = 16
"""Work items a gradient is cut into at least, if it can be: enough for the threads to share."""

CHUNK_PIXELS = 128
"""Pixels of a chunk at least: its sums are written and read once more."""


def depthwise_weight_gradient_steps(
    p: Program,
    target: Target,
    conv: Conv,
    x: Map,
    g: Map,
    needs: Sequence[str],
    gw: Place | None,
    gbias: Place | None,
) -> None:
    """The steps that sum the gradients of a depthwise ``conv`` into ``gw`` and ``gbias``.

    ``x`` needs the halo of ``conv``; ``g`` is the gradient of its output. ``needs``: which of "w"
    and "bias" are wanted; ``gw`` is contiguous (C, 1, KH, KW), ``gbias`` (C,), None if not wanted.
    """
    (rows,), (cols,) = conv.rows.phases(conv.height), conv.cols.phases(conv.width)
    bias = "bias" in needs and gbias is not None
    plan = depthwise_gradient.plan_for(target, conv, bias)
    for_any = depthwise_gradient.for_any_size(plan)
    if serves_any_size(plan, lambda: kernel(for_any)):
        plan = for_any
    lanes, channels = target.lanes, conv.out_channels
    vectors, groups = -(-channels // lanes), -(-rows.count // plan.heights[0])
    chunk_groups, chunks = _chunks(conv.batch * groups, plan.heights[0] * cols.count)
    part = -(-vectors // min(vectors, -(-ITEMS // chunks)))
    parts = -(-vectors // part)
    sums = vectors * lanes * conv.rows.size * conv.cols.size
    partial = p.scratch(chunks * sums)
    total = p.scratch(chunks * vectors * lanes) if bias else None
    fields: dict[str, Place | int] = {}
    if total is not None:
        fields = {"bias": total, "bias_step": vectors * lanes}
    wide, tail = cover(cols.count, plan.tiles)
    _, (top, left) = Taps(rows, cols).pairs[0]
    p.step(
        kernel(plan), chunks * parts,
        **replace(x, place=x.place + (top * x.row + left * x.pixel)).fields("x"),
        **g.fields("grad"), partial=partial, chunk_step=sums, chunk_groups=chunk_groups,
        groups=groups, batch=conv.batch, channels=channels, part=part * lanes, parts=parts,
        tiles=wide + len(tail), wide=wide, **fields,
    )  # fmt: skip
    p.work += conv.multiply_adds
    if gw is not None and "w" in needs:
        offsets = [kh * conv.cols.size + kw for kh, kw in plan.order]
        _add_up(p, target, channels, partial, (chunks, sums), gw, offsets)
    if gbias is not None and total is not None:
        _add_up(p, target, channels, total, (chunks, vectors * lanes), gbias, [0])


def _add_up(p: Program, target: Target, channels: int, partial: Place, chunks: tuple[int, int],
            to: Place, offsets: list[int]) -> None:  # fmt: skip
    """Add ``chunks`` (how many, how far apart) of sums; those of tap t go to ``offsets[t]``."""
    vectors, taps = -(-channels // target.lanes), len(offsets)
    p.step(
        copy_kernel(copy.unpack_weights, target, 1, False), vectors,
        w=to, w_out=taps, w_in=0, group_step=0,
        packed=partial, chunks=chunks[0], chunk_step=chunks[1],
        taps=p.constant(offsets), n_taps=taps, channels=1,
        out_channels=channels, blocks_per_group=vectors,
    )  # fmt: skip


def _chunks(groups: int, pixels: int) -> tuple[int, int]:
    """Groups of rows per chunk, and chunks, for ``groups`` of ``pixels`` each; one at least."""
    most = max(1, min(ITEMS, groups * pixels // CHUNK_PIXELS))
    size = max(1, -(-groups // most))
    return size, max(1, -(-groups // size))
