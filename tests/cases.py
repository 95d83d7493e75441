"""The one table of problems: reference against torch, kernels against the reference, benchmarks.

Each case is a problem in one line (see :mod:`neocog.problem`) and the reason it is here; the line
is the test's name, so that a failure shows what to run again. All are small: a case costs
milliseconds even in the reference's loops.

``CONVS`` are what PyTorch's conv2d can be asked for, paddings that differ at the two ends included;
``SPREAD`` have a base dilation or cut positions off (negative padding), as gradients do; ``POOLS``
and ``BLOCKS`` speak for themselves. Whole numbers stay exact through all of them; ``SMOOTH`` are
the blocks whose activations round.
"""

from __future__ import annotations

from dataclasses import dataclass

from neocog.problem import Block, Conv, Pool, Problem, parse


@dataclass(frozen=True)
class Case:
    """A problem's line and why it is in the table."""

    why: str
    line: str

    @property
    def problem(self) -> Problem:
        return parse(self.line)

    @property
    def conv(self) -> Conv:
        assert isinstance(self.problem, Conv), self.line
        return self.problem

    @property
    def pool(self) -> Pool:
        assert isinstance(self.problem, Pool), self.line
        return self.problem

    @property
    def block(self) -> Block:
        assert isinstance(self.problem, Block), self.line
        return self.problem

    def __str__(self) -> str:
        return self.line


def _cases(why: str, *lines: str) -> tuple[Case, ...]:
    return tuple(Case(why, line) for line in lines)


CONVS: tuple[Case, ...] = (
    *_cases(
        "kernel sizes and shapes",
        "conv n2 c3x7x6 k4 1x1",
        "conv n2 c3x7x6 k4 2x2",
        "conv n2 c3x7x6 k4 3x3",
        "conv n1 c2x8x7 k3 5x5",
        "conv n1 c2x9x8 k3 7x7",
        "conv n1 c3x6x9 k4 1x5",
        "conv n1 c3x9x6 k4 5x1",
    ),
    *_cases(
        "strides, also different ones and those larger than the kernel",
        "conv n1 c3x9x10 k4 3x3 s2",
        "conv n1 c3x11x10 k4 3x3 s3",
        "conv n1 c3x9x10 k4 3x3 s1x2",
        "conv n1 c3x9x10 k4 3x3 s3x1 p1",
        "conv n1 c3x8x9 k4 1x1 s2",
        "conv n1 c3x8x9 k4 1x1 s3",
        "conv n1 c3x9x9 k4 2x2 s3",
        "conv n1 c3x9x8 k4 2x2 s2",
        "conv n1 c2x12x12 k3 5x5 s2 p2",
        "conv n1 c3x14x13 k4 7x7 s2 p3",
        "conv n1 c3x10x12 k4 1x5 s1x3",
        "conv n1 c2x13x13 k3 3x3 s5 p1",
    ),
    *_cases(
        "paddings: same, one end only, different at all ends, larger than the kernel",
        "conv n2 c3x6x7 k4 3x3 p1",
        "conv n1 c3x6x7 k4 5x5 p2",
        "conv n1 c3x6x7 k4 7x7 p3",
        "conv n1 c3x6x7 k4 2x2 p0,1,0,1",
        "conv n1 c3x6x7 k4 2x2 p1,0,1,0",
        "conv n1 c3x6x7 k4 3x3 p0,1,2,3",
        "conv n1 c3x6x7 k4 3x3 p3,0,1,2 s2",
        "conv n1 c3x5x4 k4 3x3 p5",
        "conv n1 c3x5x4 k4 2x2 p0,4,3,0",
        "conv n1 c3x5x4 k4 1x1 p2",
        "conv n1 c3x5x4 k4 1x1 p1 s2",
        "conv n1 c3x2x2 k4 5x5 p2",
        "conv n1 c3x6x9 k4 1x5 p0,0,2,2",
        "conv n1 c3x9x6 k4 5x1 p2,2,0,0",
    ),
    *_cases(
        "dilations, alone and with stride and padding",
        "conv n1 c3x8x9 k4 3x3 d2",
        "conv n1 c3x9x10 k4 3x3 d3",
        "conv n1 c3x8x9 k4 3x3 d2 p2",
        "conv n1 c3x8x9 k4 3x3 d3 p3 s2",
        "conv n1 c3x8x9 k4 2x2 d2x3 p1",
        "conv n1 c3x9x9 k4 3x3 d1x2 s2x1 p1,0,0,2",
        "conv n1 c3x10x9 k4 2x2 d3 s3 p2",
        "conv n1 c3x4x5 k4 1x1 d3",
    ),
    *_cases(
        "groups: several, depthwise, depthwise with a multiplier",
        "conv n2 c4x6x7 k6 3x3 p1 g2",
        "conv n1 c6x7x6 k9 3x3 s2 p1 g3",
        "conv n1 c8x6x6 k8 1x1 g2",
        "conv n1 c32x6x6 k64 3x3 p1 g2",
        "conv n2 c8x6x7 k8 3x3 p1 g8",
        "conv n1 c19x7x7 k19 3x3 s2 p1 g19",
        "conv n1 c32x6x6 k32 5x5 p2 g32",
        "conv n1 c33x5x5 k33 3x3 d2 p2 g33",
        "conv n1 c3x6x6 k6 3x3 p1 g3",
        "conv n1 c8x6x7 k24 3x3 s2 p1 g8",
        "conv n1 c16x5x5 k32 3x3 p1 g16",
    ),
    *_cases(
        "channel counts around the widths of vectors and tiles",
        "conv n1 c1x6x6 k1 3x3 p1",
        "conv n2 c1x7x7 k32 3x3 p1",
        "conv n1 c1x6x6 k17 5x5 p2",
        "conv n1 c2x6x6 k8 3x3 p1",
        "conv n1 c3x6x6 k64 3x3 p1",
        "conv n1 c3x6x6 k31 3x3 p1 s2",
        "conv n1 c8x5x5 k16 3x3 p1",
        "conv n1 c16x5x5 k16 3x3 p1",
        "conv n1 c16x5x5 k17 3x3 p1",
        "conv n1 c17x5x5 k16 3x3 p1",
        "conv n1 c19x5x5 k19 3x3 p1",
        "conv n1 c31x5x5 k33 3x3 p1",
        "conv n1 c33x4x4 k31 1x1",
        "conv n1 c32x5x5 k2 3x3 p1",
        "conv n1 c64x4x4 k64 3x3 p1",
        "conv n1 c64x5x5 k96 1x1",
        "conv n1 c96x4x4 k3 3x3",
        "conv n1 c33x5x5 k1 2x2",
    ),
    *_cases(
        "map sizes: one pixel, one row, one column, wider and higher than a tile",
        "conv n3 c8x1x1 k16 1x1",
        "conv n2 c8x1x1 k5 3x3 p1",
        "conv n2 c3x1x17 k4 1x3 p0,0,1,1",
        "conv n1 c3x17x1 k4 3x1 p1,1,0,0",
        "conv n1 c3x1x9 k4 1x5 s1x2",
        "conv n2 c5x3x3 k7 3x3",
        "conv n1 c4x2x37 k16 3x3 p1",
        "conv n1 c4x30x3 k16 3x3 p1",
        "conv n1 c2x19x29 k3 3x3 p1",
    ),
    *_cases(
        "batches: none, many",
        "conv n0 c3x5x5 k4 3x3 p1",
        "conv n0 c4x5x5 k4 1x1 g4 s2",
        "conv n17 c2x4x4 k3 3x3 p1",
    ),
)

SPREAD: tuple[Case, ...] = (
    *_cases(
        "base dilation, whose outputs fall into phases, some without a tap",
        "conv n1 c3x4x5 k4 3x3 b2 p1",
        "conv n1 c3x4x5 k4 3x3 b2 p2",
        "conv n1 c3x4x5 k4 3x3 b3 p2,3,1,2",
        "conv n1 c3x4x5 k4 2x2 b3 p1",
        "conv n1 c3x4x5 k4 1x1 b2",
        "conv n1 c3x4x5 k4 2x3 b2x3 s3x2 p2",
        "conv n1 c3x4x5 k4 3x3 b4 s2 p1",
        "conv n1 c3x4x5 k4 3x3 b2 d2 p2",
        "conv n2 c4x4x4 k6 3x3 b2 p1 g2",
        "conv n1 c3x1x1 k4 3x3 b2 p2",
    ),
    *_cases(
        "so large a base dilation that products come first, and are added up where they belong",
        "conv n2 c5x6x7 k9 3x4 p7,8,9,10 b8x11",
        "conv n1 c5x3x4 k9 2x3 s3x2 p4 b7x9 d2x3",
        "conv n2 c6x4x4 k4 3x3 b5 p1 g2",
        "conv n2 c20x4x3 k20 3x3 b5x6 p2 g20",
        "conv n0 c3x4x5 k4 3x3 b5 p2",
    ),
    *_cases(
        "negative padding cuts positions off",
        "conv n1 c3x7x8 k4 3x3 p-1,0,0,-2",
        "conv n1 c3x7x8 k4 1x1 p-2",
        "conv n1 c3x7x8 k4 2x2 s2 p-1,1,2,-1",
        "conv n1 c3x5x5 k4 3x3 b2 p-1,2,1,-2",
    ),
)

POOLS: tuple[Case, ...] = (
    *_cases(
        "max: kernels and strides, overlapping, touching and with gaps",
        "max n2 c3x8x8 2x2",
        "max n2 c3x9x7 2x2",
        "max n1 c3x7x8 3x3",
        "max n1 c3x7x8 3x3 s1",
        "max n1 c3x9x8 3x3 s2",
        "max n1 c3x9x9 2x2 s3",
        "max n1 c3x7x8 1x1 s1",
        "max n1 c3x7x8 1x1 s2",
        "max n1 c3x9x10 2x3 s2x1",
        "max n1 c3x9x10 1x4 s1x3",
        "max n1 c3x12x12 5x5 s3 p2",
    ),
    *_cases(
        "max: padding",
        "max n1 c3x7x8 2x2 p1",
        "max n1 c3x7x8 3x3 s2 p1",
        "max n1 c3x7x8 3x3 s1 p1",
        "max n1 c3x7x8 3x3 s2 p1,0,0,1",
        "max n1 c3x7x8 5x5 s1 p2",
        "max n1 c3x7x8 4x2 s2 p2,1,0,1",
    ),
    *_cases(
        "max: dilation",
        "max n1 c3x8x9 2x2 s1 d2",
        "max n1 c3x9x9 3x3 s2 d2 p1",
        "max n1 c3x9x9 3x3 s1 d3x1 p1",
        "max n1 c3x9x10 2x2 s2 d3 p1 ceil",
    ),
    *_cases(
        "max: ceil mode with leftovers, without, and with a last window in the padding",
        "max n1 c3x7x9 2x2 ceil",
        "max n1 c3x8x8 2x2 ceil",
        "max n1 c3x8x9 3x3 s2 ceil",
        "max n1 c3x6x7 2x2 s3 ceil",
        "max n1 c3x7x6 3x3 s2 p1 ceil",
        "max n1 c3x5x5 2x2 s4 p1 ceil",
        "max n1 c3x2x2 3x3 s2 ceil",
    ),
    *_cases(
        "max: map sizes, channel counts, batches",
        "max n2 c5x6x4 6x4",
        "max n2 c5x1x1 1x1",
        "max n1 c3x1x12 1x2",
        "max n1 c3x12x1 3x1 s2x1 p1,1,0,0",
        "max n1 c19x6x6 2x2",
        "max n1 c64x4x4 3x3 s2 p1",
        "max n1 c33x5x5 3x3 s1 p1",
        "max n0 c3x4x4 2x2",
        "max n9 c1x4x4 2x2",
    ),
    *_cases(
        "mean: the same, padding counted",
        "mean n2 c3x8x8 2x2",
        "mean n1 c3x9x7 3x3 s2",
        "mean n1 c3x9x9 2x2 s3",
        "mean n1 c3x7x8 3x3 s1 p1",
        "mean n1 c3x7x8 3x3 s2 p1,0,1,1",
        "mean n1 c3x8x9 3x3 s2 ceil",
        "mean n1 c3x7x6 3x3 s2 p1 ceil",
        "mean n1 c3x2x3 3x4 s2 ceil",
        "mean n2 c16x7x7 7x7",
        "mean n1 c19x6x5 2x3 s1x2 p1",
        "mean n1 c3x1x12 1x3 s1x2 p0,0,1,1",
        "mean n0 c3x4x4 2x2",
    ),
    *_cases(
        "mean: padding not counted, the divisor given",
        "mean n1 c3x7x8 3x3 s1 p1 exclude_pad",
        "mean n1 c3x7x8 4x4 s3 p2 exclude_pad",
        "mean n1 c3x7x6 3x3 s2 p1 ceil exclude_pad",
        "mean n1 c3x7x8 3x3 s2 p1 div5",
        "mean n1 c3x7x8 3x3 s2 p1 ceil exclude_pad div-2",
    ),
)

_ACTIVATIONS = ("identity", "relu", "leaky_relu(0.125)", "relu6")
_BLOCK_POOLS = (
    "",
    " | max 2x2",
    " | mean 2x2",
    " | max 3x3 s2 p1",
    " | mean 3x3 s2 p1 exclude_pad",
)

BLOCKS: tuple[Case, ...] = (
    *_cases(
        "every activation with every kind of pool",
        *(
            f"conv n2 c3x8x8 k19 3x3 p1 | bias | {activation}{pool}"
            for activation in _ACTIVATIONS
            for pool in _BLOCK_POOLS
        ),
    ),
    *_cases(
        "steps missing, and in other orders",
        "conv n1 c3x6x6 k4 3x3 |",
        "conv n1 c3x6x6 k4 3x3 | bias",
        "conv n1 c3x6x6 k4 3x3 p1 | relu",
        "conv n1 c3x6x6 k4 3x3 p1 | max 2x2",
        "conv n1 c3x6x6 k4 3x3 p1 | affine",
        "conv n1 c3x6x6 k4 3x3 p1 | add",
        "conv n1 c8x6x6 k16 3x3 p1 | bias | add | relu",
        "conv n1 c8x6x6 k16 3x3 p1 | affine | add | relu | max 2x2",
        "conv n1 c8x6x6 k16 3x3 p1 | relu | affine | add",
        "conv n1 c8x6x6 k16 3x3 p1 | bias | relu | affine",
        "conv n1 c8x6x6 k16 1x1 | add | bias | leaky_relu(0.5) | mean 2x2",
    ),
    *_cases(
        "slopes at the edges",
        "conv n1 c3x6x6 k4 3x3 p1 | bias | leaky_relu(0.0) | max 2x2",
        "conv n1 c3x6x6 k4 3x3 p1 | bias | leaky_relu(1.0) | max 2x2",
        "conv n1 c3x6x6 k4 3x3 p1 | bias | leaky_relu(2.0) | max 2x2",
        "conv n1 c3x6x6 k4 3x3 p1 | bias | leaky_relu(-0.5) | max 2x2",
    ),
    *_cases(
        "pools that leave rows and columns over, overlap, hang over, or take the whole map",
        "conv n1 c1x9x7 k32 3x3 p1 | bias | relu | max 2x2",
        "conv n1 c3x9x9 k8 3x3 p1 | bias | relu | max 2x2 ceil",
        "conv n1 c3x9x9 k8 3x3 p1 | bias | relu | max 3x3 s1",
        "conv n1 c3x9x9 k8 3x3 p1 | bias | relu | max 2x2 s3",
        "conv n1 c3x8x8 k8 3x3 p1 | bias | relu | max 3x3 s2 p1 ceil",
        "conv n1 c3x8x8 k8 3x3 p1 | bias | relu | max 2x2 s1 d2",
        "conv n1 c3x8x8 k8 3x3 p1 | bias | relu | mean 3x3 s2 ceil",
        "conv n1 c3x8x8 k8 3x3 p1 | bias | relu | mean 3x3 s2 p1 div4",
        "conv n2 c3x6x6 k17 3x3 | bias | relu | mean 4x4",
        "conv n2 c3x6x6 k17 3x3 | bias | relu | max 4x4",
    ),
    *_cases(
        "convolutions of other kinds under the same epilogue",
        "conv n1 c3x16x16 k8 7x7 s2 p3 | bias | relu | max 3x3 s2 p1",
        "conv n1 c8x8x8 k8 3x3 p1 g8 | bias | relu | max 2x2",
        "conv n1 c8x8x8 k12 3x3 s2 p1 g4 | bias | leaky_relu(0.25) | mean 2x2",
        "conv n1 c16x7x7 k33 1x1 | bias | relu | max 2x2",
        "conv n1 c3x9x9 k5 3x3 d2 p2 | bias | relu | max 3x3",
        "conv n1 c2x1x16 k8 1x5 p0,0,2,2 | bias | relu | max 1x2",
        "conv n0 c3x6x6 k4 3x3 p1 | bias | relu | max 2x2",
        "conv n9 c1x6x6 k4 3x3 p1 | bias | relu | max 2x2",
        "conv n1 c64x5x5 k64 3x3 p1 | bias | relu | max 2x2",
    ),
)

SMOOTH: tuple[Case, ...] = (
    *_cases(
        "activations that are not exact, with and without a pool, which comes after them",
        *(
            f"conv n2 c3x6x6 k19 3x3 p1 | bias | {activation}{pool}"
            for activation in (
                *("hardsigmoid", "hardswish", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh"),
            )
            for pool in ("", " | max 2x2", " | mean 3x3 s2 p1")
        ),
    ),
    *_cases(
        "between other steps, and on kernels of other kinds",
        "conv n1 c8x6x6 k16 3x3 p1 | affine | silu | add",
        "conv n1 c8x6x6 k16 1x1 | bias | add | sigmoid",
        "conv n1 c19x7x7 k19 3x3 s2 p1 g19 | bias | hardswish",
        "conv n1 c3x7x7 k37 3x3 s2 p1 | bias | tanh | max 3x3 s2 p1",
    ),
)
