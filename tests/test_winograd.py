"""Winograd's convolution against the literal sum: its matrices exactly, its kernels within a bound.

Kernels run on every row of the table of targets. Results are NaN beforehand and every program has
run on NaN before (``kernel_tools.run_twice``), so that an element nobody wrote, or one read from
stale scratch, fails. Around inputs and results stand guards that must not be read or written.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import kernel_tools as kt
import numpy as np
import pytest
import torch

from neocog import convolutions, maps, reference, winograd_steps
from neocog.cpu import winograd_transforms as transforms
from neocog.maps import Map
from neocog.problem import Act, Add, Affine, Bias, Block, Conv, parse, pooling
from neocog.program import Program
from neocog.target import Target, host

BOUND = {2: 5e-6, 4: 5e-6, 6: 2e-5}
"""m -> of the largest result; seen: 3e-6 for 512 channels, 1e-5 with m = 6. Direct: 6e-7."""

GUARD = 96
"""NaN before and behind every tensor, in elements; results must leave them as they are."""

POINTWISE = ("", "bias", "affine", "bias | relu", "affine | leaky_relu(0.1)", "add",
             "bias | add | relu", "bias | relu | affine", "relu | add")  # fmt: skip

SHAPES = (
    "conv n1 c1x1x1 k1 3x3 p1",
    "conv n1 c3x2x5 k5 3x3 p1",
    "conv n2 c19x9x7 k19 3x3 p1",
    "conv n1 c8x3x3 k17 3x3",
    "conv n1 c17x1x13 k7 3x3 p2",
    "conv n3 c16x4x8 k64 3x3 p1",
    "conv n1 c37x6x11 k70 3x3 p0,2,2,1",
    "conv n1 c5x12x6 k33 3x3 p2,0,1,2",
    "conv n1 c4x1x1 k4 3x3 p2",
    "conv n3 c11x22x23 k13 3x3 p1",  # more tiles than are done in stages
    "conv n5 c20x17x14 k36 3x3 p1",
)

STRIDED = (
    "conv n1 c3x15x18 k19 7x7 s2x2 p3",
    "conv n2 c1x9x6 k5 3x3 s2x2 p1",
    "conv n3 c4x13x11 k17 5x5 s2x2 p2",
    "conv n1 c3x37x40 k19 7x7 s2x2 p3,2,1,3",
    "conv n1 c8x1x1 k4 3x3 s2x2 p1",
    "conv n2 c8x12x9 k19 3x3 s2x2 p1",
    "conv n1 c16x19x14 k36 5x5 s2x2 p2",
    "conv n1 c24x16x23 k7 7x7 s2x2 p0,1,3,2",
    "conv n3 c32x33x35 k16 3x3 s2x2 p1",
    "conv n1 c72x10x10 k70 3x3 s2x2",
)


class Case:
    """One block as a program on guarded NHWC tensors with the halo its taps reach."""

    def __init__(self, block: Block, target: Target, m: int, seed: int = 0, pixel: int = 0):
        self.block, conv = block, block.conv
        self.inputs = kt.block_inputs(block, kt.normals)
        self.halo = maps.Halo() if winograd_steps.folds(conv) else maps.halo_of(conv)
        self.pixel = conv.in_channels + pixel
        names = [name for name in self.inputs if name != "grad"]
        self.names = (*names, "out")
        p = self.program = Program(self.names)
        self.out_pixel = conv.out_channels + pixel
        n, k, oh, ow = block.out_shape
        out = Map(p.buffer("out") + GUARD, oh * ow * self.out_pixel, ow * self.out_pixel,
                  self.out_pixel)  # fmt: skip
        size = conv.rows.size
        strides = (conv.in_channels * size**2, size**2, size, 1)
        w = convolutions.Weights.of(p.buffer("w"), strides, conv)
        plan = winograd_steps.plan_of(target, conv, block.epilogue, m)
        packed = p.scratch(winograd_steps.packed_elements(plan))
        winograd_steps.pack(p, target, conv, w, packed, m)
        winograd_steps.convolve(
            p, target, conv, self._x_map(p), packed, out, block.epilogue, self._extra(p), m
        )

    @property
    def padded(self) -> tuple[int, int]:
        conv, halo = self.block.conv, self.halo
        return conv.height + halo.top + halo.bottom, conv.width + halo.left + halo.right

    def _x_map(self, p: Program) -> Map:
        rows, cols = self.padded
        corner = GUARD + (self.halo.top * cols + self.halo.left) * self.pixel
        return Map(p.buffer("x") + corner, rows * cols * self.pixel, cols * self.pixel, self.pixel)

    def _extra(self, p: Program) -> dict:
        extra = {n: p.buffer(n) for n in self.inputs if n in ("bias", "scale", "shift")}
        if "residual" in self.inputs:
            _, channels, height, width = self.block.conv_shape
            residual = Map.dense(p.buffer("residual") + GUARD, channels, height, width)
            extra |= {"residual": residual.place, "residual_image": residual.image,
                      "residual_row": residual.row, "residual_pixel": residual.pixel}  # fmt: skip
        return extra

    def _guarded(self, array: np.ndarray) -> torch.Tensor:
        flat = torch.full((array.size + 2 * GUARD,), float("nan"))
        flat[GUARD : GUARD + array.size] = torch.tensor(array.reshape(-1), dtype=torch.float32)
        return flat

    def tensors(self, x: np.ndarray) -> dict[str, torch.Tensor]:
        """The inputs in memory: x with its halo, and NaN between the channels and around it."""
        conv, halo = self.block.conv, self.halo
        rows, cols = self.padded
        wide = np.full((conv.batch, rows, cols, self.pixel), np.nan)
        wide[..., : conv.in_channels] = 0
        inside = wide[:, halo.top : halo.top + conv.height, halo.left : halo.left + conv.width]
        inside[..., : conv.in_channels] = x.transpose(0, 2, 3, 1)
        made = {n: kt.tensor(a) for n, a in self.inputs.items() if n not in ("x", "residual")}
        made["x"] = self._guarded(wide)
        if "residual" in self.inputs:
            made["residual"] = self._guarded(self.inputs["residual"].transpose(0, 2, 3, 1))
        return made

    def run(self, threads: int = 1, x: np.ndarray | None = None) -> np.ndarray:
        """The result (N, K, OH, OW); fails if anything around it was written."""
        n, k, oh, ow = self.block.out_shape
        size = n * oh * ow * self.out_pixel
        out = torch.empty(size + 2 * GUARD)
        inputs = self.tensors(self.inputs["x"] if x is None else x)
        kt.run_twice(self.program, inputs, {"out": out}, threads)
        inner = out[GUARD : GUARD + size].view(n, oh, ow, self.out_pixel)
        assert out[:GUARD].isnan().all() and out[GUARD + size :].isnan().all(), "wrote outside"
        assert inner[..., k:].isnan().all(), "wrote between the pixels"
        return inner[..., :k].permute(0, 3, 1, 2).numpy().astype(np.float64)

    def truth(self) -> np.ndarray:
        """The reference's result."""
        return reference.block(self.block, **kt.operands(self.inputs)).out


def check(line: str, target: Target, m: int, pixel: int = 0) -> None:
    block = parse(line)
    block = Block(block) if isinstance(block, Conv) else block
    assert winograd_steps.covers(block.conv, block.epilogue), line
    case = Case(block, target, m, pixel=pixel)
    ours, truth = case.run(), case.truth()
    assert ours.shape == truth.shape
    # The largest sum before the epilogue is what rounding is relative to.
    sums = reference.convolution(block.conv, case.inputs["x"], case.inputs["w"])
    scale = max(np.abs(sums).max(initial=0), np.abs(truth).max(initial=0), 1)
    error = np.abs(ours - truth)
    context = f"{line}, F{m}, {target.name}\n{case.program}"
    assert (error <= BOUND[m] * scale).all(), f"{error.max() / scale} of the largest: {context}"


SIZES = [(m, taps) for m in (2, 4, 6) for taps in (2, 3, 4) if m + taps - 2 in transforms.POINTS]


@pytest.mark.parametrize(("m", "taps"), SIZES)
def test_the_matrices_are_exact(m, taps):
    def product(a, b):
        return [[sum((x * y for x, y in zip(r, c, strict=True)), Fraction(0))
                 for c in zip(*b, strict=True)] for r in a]  # fmt: skip

    def transposed(a):
        return list(zip(*a, strict=True))

    def whole(rng, size):
        return [[Fraction(int(v)) for v in row] for row in rng.integers(-9, 10, (size, size))]

    for outputs in range(1, m + 1):
        rng = np.random.default_rng(m)
        a, b = (f(m, taps, outputs) for f in (transforms.output_matrix, transforms.input_matrix))
        used = transforms.indices(m, taps, outputs)
        g = [transforms.weight_matrix(m, taps)[i] for i in used]
        d, w = whole(rng, outputs + taps - 1), whole(rng, taps)
        u, v = product(product(g, w), transposed(g)), product(product(b, d), transposed(b))
        products = [[x * y for x, y in zip(r, s, strict=True)] for r, s in zip(u, v, strict=True)]
        ours = product(product(a, products), transposed(a))
        places = list(itertools.product(range(taps), repeat=2))
        for y, x in itertools.product(range(outputs), repeat=2):
            assert ours[y][x] == sum(w[i][j] * d[y + i][x + j] for i, j in places)


@pytest.mark.parametrize(("m", "taps"), SIZES)
def test_the_matrices_of_data_are_exact_in_float32(m, taps):
    for outputs in range(1, m + 1):
        for make in (transforms.input_matrix, transforms.output_matrix):
            entries = [c for row in make(m, taps, outputs) for c in row]
            assert all(Fraction(float(np.float32(float(c)))) == c for c in entries)


@pytest.mark.parametrize("m", (2, 4, 6))
@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
@pytest.mark.parametrize("line", SHAPES)
def test_shapes(line, target, m):
    check(f"{line} | bias | relu", target, m)


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("line", "m"),
    [(line, m) for line in STRIDED for m in (2, 4, 6) if winograd_steps.has_tiles(parse(line), m)],
)
def test_strides(line, m, target):
    check(f"{line} | bias | relu", target, m)


@pytest.mark.parametrize("m", (2, 4, 6))
@pytest.mark.parametrize("rows", range(1, 10))
def test_every_end_of_a_map(rows, m):
    for cols in range(1, 10):
        check(f"conv n2 c3x{rows}x{cols} k5 3x3 p1 | relu", host(), m)


@pytest.mark.parametrize("m", (2, 4, 6))
@pytest.mark.parametrize("steps", POINTWISE)
def test_epilogues(steps, m):
    check(f"conv n2 c6x7x9 k19 3x3 p1 | {steps}".rstrip("| "), host(), m)
    if m >= 4:  # so many tiles that they are done in blocks
        check(f"conv n2 c6x29x23 k19 3x3 p1 | {steps}".rstrip("| "), host(), m)


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ("max", "mean"))
@pytest.mark.parametrize("size", ("2x2", "3x5", "7x6", "8x13", "17x34"))
def test_pools(size, kind, target):
    for m, steps in ((2, "bias | relu"), (4, "bias | add | relu"), (6, "bias | relu")):
        check(f"conv n2 c5x{size} k19 3x3 p1 | {steps} | {kind} 2x2 s2x2 p0,0,0,0", target, m)


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_maps_may_be_channels_of_wider_ones(target):
    check("conv n2 c19x9x7 k19 3x3 p1 | bias | relu", target, 4, pixel=13)
    check("conv n2 c19x9x7 k19 3x3 p1 | bias | relu | max 2x2 s2x2 p0,0,0,0", target, 4, pixel=13)


@pytest.mark.parametrize("channels", (256, 512))
def test_many_channels_keep_the_bound(channels):
    for m in (2, 4, 6):
        check(f"conv n1 c{channels}x8x8 k64 3x3 p1", host(), m)


def test_panels_larger_than_the_cache_are_fetched_ahead():
    block = Block(parse("conv n1 c130x8x8 k128 3x3 p1"))
    program = Case(block, host(), 4).program
    assert any(step.fields.get("prefetch", 0) for step in program.steps)
    check(str(block), host(), 4)


@pytest.mark.parametrize("steps", ("bias", "relu | max 2x2 s2x2 p0,0,0,0"))
def test_a_batch_of_none(steps):
    block = parse(f"conv n0 c5x6x6 k7 3x3 p1 | {steps}")
    case = Case(block, host(), 4)
    assert case.run().shape == block.out_shape


@pytest.mark.parametrize("line", (SHAPES[2], SHAPES[-1], "conv n1 c64x15x13 k96 3x3 p1"))
def test_threads_give_the_same_bits(line):
    case = Case(Block(parse(line), (Bias(), Act("relu"))), host(), 4)
    assert case.run(1).tobytes() == case.run(2).tobytes() == case.run(3).tobytes()


@pytest.mark.parametrize("batch", (2, 12))
def test_stages_and_blocks_give_the_same_bits(batch):
    """An image's results do not depend on how many others there are."""
    conv = parse("conv n1 c19x21x18 k40 3x3 p1")
    one = Case(Block(conv, (Add(), Affine())), host(), 4)
    many = Case(Block(replace(conv, batch=batch), (Add(), Affine())), host(), 4)
    for name in ("x", "residual"):
        many.inputs[name] = np.concatenate([one.inputs[name]] * batch)
    many.inputs |= {name: one.inputs[name] for name in ("w", "scale", "shift")}
    expected, ours = one.run(), many.run()
    assert all(image.tobytes() == expected[0].tobytes() for image in ours)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("m", (2, 4, 6))
def test_what_is_not_finite_stays_in_the_tiles_that_read_it(value, m):
    conv = parse("conv n2 c3x19x15 k5 3x3 p1")
    case = Case(Block(conv), host(), m)
    clean = case.run()
    for image, row, col in ((0, 9, 9), (1, 0, 0), (0, 18, 14), (1, 11, 3)):
        x = case.inputs["x"].copy()
        x[image, 1, row, col] = value
        ours = case.run(x=x)
        touched = np.zeros(ours.shape, bool)
        # Output tile t reads the inputs from t*m - 1 to t*m + m.
        for y, xx in itertools.product(range(19), range(15)):
            rows, cols = (t // m * m for t in (y, xx))
            if rows - 1 <= row <= rows + m and cols - 1 <= col <= cols + m:
                touched[image, :, y, xx] = True
        assert np.array_equal(ours[~touched], clean[~touched])
        near = ours[image, :, max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2]
        assert not np.isfinite(near).any()


def test_a_nan_wins_the_max_pool():
    conv = parse("conv n1 c3x8x8 k5 3x3 p1")
    case = Case(Block(conv, (Act("relu"), pooling("max", 2))), host(), 2)
    x = case.inputs["x"].copy()
    x[0, 1, 3, 3] = float("nan")
    ours = case.run(x=x)
    assert np.isnan(ours[0, :, 1:3, 1:3]).all()
    assert np.isfinite(ours[0, :, 0, 3]).all()


def test_weights_of_any_strides_and_flipped():
    conv = parse("conv n1 c6x9x9 k10 3x3 p1")
    g = kt.normals(conv.out_shape, 1)
    w = kt.normals(conv.weight_shape, 2)
    adjoint = conv.grad_input()
    case = Case(Block(adjoint), host(), 4)
    p = Program(("x", "w", "out"))
    weights = convolutions.Weights.of(p.buffer("w"), (6 * 9, 9, 3, 1), conv).adjoint()
    plan = winograd_steps.plan_of(host(), adjoint)
    packed = p.scratch(winograd_steps.packed_elements(plan))
    winograd_steps.pack(p, host(), adjoint, weights, packed)
    out = Map.dense(p.buffer("out") + GUARD, 6, 9, 9)
    winograd_steps.convolve(p, host(), adjoint, case._x_map(p), packed, out)
    case.program, case.inputs["w"] = p, w
    truth = reference.convolution_grad_input(conv, g, w)
    assert np.abs(case.run(x=g) - truth).max() <= BOUND[4] * np.abs(truth).max()


def test_the_cost_tells_where_winograd_pays():
    def relative(line, m):
        """Against the multiply-adds of a direct convolution."""
        return winograd_steps.cost(host(), parse(line), m) / parse(line).multiply_adds

    many, small = "conv n1 c64x56x56 k64 3x3 p1", "conv n1 c512x7x7 k512 3x3 p1"
    assert relative(many, 4) < relative(many, 2) < 1
    assert relative(small, 2) < 1 < relative(small, 4)  # F(4x4) reads more weights
    assert relative("conv n1 c1x28x28 k32 3x3 p1", 4) > 1  # nothing but transforms
    assert winograd_steps.cost(host(), parse("conv n0 c4x8x8 k4 3x3 p1")) == 0


@pytest.mark.parametrize(
    "line",
    (
        "conv n1 c4x8x8 k4 1x1",
        "conv n1 c4x8x8 k4 5x5 p2",
        "conv n1 c5x8x8 k4 3x3 s2x2 p1",
        "conv n1 c4x8x8 k4 3x3 s1x2 p1",
        "conv n1 c4x8x8 k4 3x3 p2 d2",
        "conv n1 c4x8x8 k4 3x3 p1 g2",
        "conv n1 c4x8x8 k4 3x3 p1 | max 3x3 s2x2 p1,1,1,1",
        "conv n1 c4x8x8 k4 3x3 p1 | max 2x2 s1x1 p0,0,0,0",
        "conv n1 c4x8x8 k4 3x3 p1 | max 2x2 s2x2 p0,0,0,0 ceil",
        "conv n1 c4x8x8 k4 3x3 p1 | mean 2x2 s2x2 p0,0,0,0 div3",
    ),
)
def test_what_it_does_not_cover(line):
    problem = parse(line)
    block = Block(problem) if isinstance(problem, Conv) else problem
    assert not winograd_steps.covers(block.conv, block.epilogue)
