"""The register tile of the direct convolution: its plan, and the code that fills one tile.

The tile holds up to MR output pixels x NB vectors of output channels:

    for t in taps:  for c in channels:
        for p in MR:  x = broadcast(input[p*pixel_step + taps[t] + c])
            for j in NB:  acc[p][j] += x * w[t][c][j]

:mod:`neocog.cpu.direct` puts the tiles together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from llvmlite import ir

from ..steps import Bias, Step
from . import epilogue as ep
from .lanes import I64, PTR, Emitter, Int
from .tiling import TiledPlan

HALVED_ABOVE = 8
"""Lanes from which on a vector may be halved."""

UNROLL = 8
"""Input channels per trip of the inner loop."""


@dataclass(frozen=True)
class DirectPlan(TiledPlan):
    """Everything a direct kernel is specialised on."""

    tiles: tuple[int, ...] = (1,)
    """Pixels of the register tiles, in falling order; see ``tiling.cover``."""
    epilogue: tuple[Step, ...] = ()
    depthwise: bool = False
    winners: bool = False
    """Whether a fused max pool also stores which tap won, for the backward pass."""
    chunk: int = 0
    """Input channels per chunk, a multiple of UNROLL; 0: all taps and channels at once."""

    @property
    def halved(self) -> bool:
        """Whether half a vector is enough for the last channels.

        Half a vector of 512 bits takes half the time where a unit works on 256 bits at once.
        """
        spare = self.blocks * self.target.lanes - self.out_channels
        single = self.blocks_per_group == 1 and 2 * spare >= self.target.lanes > HALVED_ABOVE
        return single and not (self.depthwise or self.chunk or ep.pooling_of(self.epilogue))

    @property
    def name(self) -> str:
        """A name for the listing."""
        kind = "depthwise" if self.depthwise else "direct"
        tile = f"{self.tiles[0]}x{self.blocks}v{self.target.lanes}"
        chunk = f"/{self.chunk}" if self.chunk else ""
        return (
            f"{kind}_c{self.channels}{chunk}k{self.out_channels}_{tile}{ep.spelled(self.epilogue)}"
        )


def tile_function(e: Emitter, plan: DirectPlan, pixels: int) -> ir.Function:
    """The function that fills one tile of the output.

    tile(x, w, taps, n_taps, out, out_pixel, valid, parameters..., residual, its pixel); in chunks:
    tile(sums, out, ...).
    """
    head = ["sums"] if plan.chunk else ["x", "w", "taps", "n_taps"]
    names = [*head, "out", "out_pixel", "valid", *ep.parameters(plan.epilogue)]
    if ep.adds_residual(plan.epilogue):
        names += ["residual", "residual_pixel"]
    integers = ("n_taps", "out_pixel", "valid", "residual_pixel")
    kinds = [I64 if name in integers else PTR for name in names]
    with e.function(f"tile_{pixels}", kinds) as (fn, args):
        a = SimpleNamespace(**dict(zip(names, args, strict=True)))
        a.vectors = vectors(e, plan)
        a.masks = masks(a.vectors, plan, a.valid)
        steps = plan.epilogue
        if plan.chunk:
            sums = [e.vload(a.sums, i * e.lanes) for i in range(pixels * plan.blocks)]
        else:
            start = [v.zero for v in a.vectors]
            if steps and isinstance(steps[0], Bias):  # then it is where the sum starts
                each = zip(range(plan.blocks), a.vectors, a.masks, strict=True)
                start = [v.vload(a.bias, j * e.lanes, mask) for j, v, mask in each]
                steps = steps[1:]
            sums = _sum_taps(e, plan, a, start * pixels, pixels)
        _store_tile(e, plan, a, steps, sums, pixels)
    return fn


def chunk_function(e: Emitter, plan: DirectPlan, pixels: int) -> ir.Function:
    """chunk(channels, x, w, sums, ahead): add the products of some channels of one tap.

    They are summed from zero first: short sums round less.
    """
    with e.function(f"chunk_{pixels}", [I64, PTR, PTR, PTR, PTR]) as (fn, args):
        channels, x, w, where, ahead = args
        count, vectors = pixels * plan.blocks, [e] * plan.blocks

        def some(c: Int, *sums: ir.Value) -> list[ir.Value]:
            for i in range(UNROLL):
                e.prefetch(ahead, e.mul(e.add(c, i), e.lanes))
            here = e.at(w, e.mul(c, plan.width))
            return _products(plan, e.at(x, c), here, UNROLL, sums, vectors)

        zeros = [e.zero] * count
        for i, value in enumerate(e.loop(0, channels, some, zeros, step=UNROLL)):
            e.vstore(e.b.fadd(e.vload(where, i * e.lanes), value), where, i * e.lanes)
    return fn


def vectors(e: Emitter, plan: DirectPlan) -> list[Emitter]:
    """What emits each of the NB vectors of channels."""
    return [e] * (plan.blocks - 1) + [e.halved() if plan.halved else e]


def masks(vectors: Sequence[Emitter], plan: DirectPlan, valid: Int) -> list[ir.Value | None]:
    """Per vector of channels, its lanes that exist; None where all do."""
    if plan.out_channels % plan.width == 0:
        return [None] * plan.blocks
    if plan.blocks_per_group == 1:
        valid = plan.out_channels

    def mask(first: int, v: Emitter) -> ir.Value | None:
        whole = isinstance(valid, int) and first + v.lanes <= valid
        return None if whole else v.lane_mask(v.sub(valid, first))

    return [mask(j * plan.target.lanes, v) for j, v in enumerate(vectors)]


def _products(
    plan: DirectPlan, x, w, channels: int, sums: Sequence[ir.Value], vectors: Sequence[Emitter]
) -> list[ir.Value]:
    """``sums[p * NB + j]`` plus the products of ``channels`` inputs at ``x``."""
    sums, blocks, lanes = list(sums), plan.blocks, plan.target.lanes
    for c in range(channels):
        weights = [v.vload(w, c * plan.width + j * lanes) for j, v in enumerate(vectors)]
        for p in range(len(sums) // blocks):
            where = p * plan.pixel_step + c
            values = {v.lanes: v.broadcast(x, where) for v in dict.fromkeys(vectors)}
            for j, v in enumerate(vectors):
                at = p * blocks + j
                sums[at] = v.fma(values[v.lanes], weights[j], sums[at])
    return sums


def _sum_taps(e: Emitter, plan: DirectPlan, a, start: Sequence[ir.Value], pixels: int):
    """The register tile's sums over all taps and channels, ``sums[p * blocks + j]``."""

    def lanewise(x, w, sums: Sequence[ir.Value]) -> list[ir.Value]:
        weights = [e.vload(w, j * e.lanes) for j in range(plan.blocks)]
        where = [(p, j) for p in range(pixels) for j in range(plan.blocks)]
        values = [e.vload(x, p * plan.pixel_step + j * e.lanes, a.masks[j]) for p, j in where]
        return [e.fma(v, weights[j], s) for v, (_, j), s in zip(values, where, sums, strict=True)]

    def tap(t: Int, *sums: ir.Value) -> list[ir.Value]:
        x = e.at(a.x, e.load(I64, a.taps, t))
        w = e.at(a.w, e.mul(t, plan.channels * plan.width))
        if plan.depthwise:
            return lanewise(x, w, sums)
        whole = plan.channels - plan.channels % UNROLL

        def some(c: Int, *sums: ir.Value) -> list[ir.Value]:
            here = e.at(w, e.mul(c, plan.width))
            return _products(plan, e.at(x, c), here, UNROLL, sums, a.vectors)

        sums = tuple(e.loop(0, whole, some, sums, step=UNROLL))
        rest = e.at(w, whole * plan.width)
        return _products(plan, e.at(x, whole), rest, plan.channels - whole, sums, a.vectors)

    return e.loop(0, a.n_taps, tap, start)


def _store_tile(e: Emitter, plan: DirectPlan, a, steps, sums, pixels: int) -> None:
    for j, v in enumerate(a.vectors):
        offset = j * e.lanes
        per_channel = ep.load_parameters(v, steps, a, offset, a.masks[j])

        def residual(p: int, offset: int = offset, v: Emitter = v, mask=a.masks[j]) -> ir.Value:
            return v.vload(e.at(a.residual, e.mul(a.residual_pixel, p)), offset, mask)

        values = ep.finish(v, steps, list(sums[j :: plan.blocks]), per_channel, residual)
        for p, value in enumerate(values):
            v.vstore(value, e.at(a.out, e.mul(a.out_pixel, p)), offset, a.masks[j])
