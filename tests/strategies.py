"""Hypothesis strategies: windows and problems of every kind, valid by construction."""

from __future__ import annotations

from hypothesis import strategies as st

from neocog.geometry import Window
from neocog.problem import Act, Add, Affine, Bias, Block, Conv, Pool, Pooling, Step


@st.composite
def windows(draw: st.DrawFn, spread: bool = True, padding: int = 4, ceil: bool = True) -> Window:
    """Any window; ``spread`` allows base dilations and negative paddings too, ``ceil`` pools'."""
    size = draw(st.integers(1, 4))
    pooling = ceil and draw(st.booleans())
    least, most = (0, size // 2) if pooling else (-2 if spread else 0, padding)
    return Window(
        size=size,
        stride=draw(st.integers(1, 4)),
        dilation=draw(st.integers(1, 3)),
        low=draw(st.integers(least, most)),
        high=draw(st.integers(least, most)),
        base_dilation=draw(st.integers(1, 4)) if spread and not pooling else 1,
        ceil=pooling,
    )


def smallest_fitting(window: Window) -> int:
    """The fewest inputs (at least 1) on which the window has an output."""
    n = 1
    while window.out_size(n) < 1:
        n += 1
    return n


@st.composite
def axes(draw: st.DrawFn, spread: bool = True, ceil: bool = True) -> tuple[Window, int]:
    """A window and a number of inputs that it fits."""
    window = draw(windows(spread=spread, ceil=ceil))
    return window, smallest_fitting(window) + draw(st.integers(0, 8))


@st.composite
def convs(draw: st.DrawFn, spread: bool = True, least_batch: int = 0) -> Conv:
    """Convolutions with a few channels on small maps."""
    groups = draw(st.integers(1, 3))
    (rows, height), (cols, width) = (draw(axes(spread=spread, ceil=False)) for _ in range(2))
    return Conv(
        batch=draw(st.integers(least_batch, 2)),
        in_channels=groups * draw(st.integers(1, 3)),
        height=height,
        width=width,
        out_channels=groups * draw(st.integers(1, 3)),
        rows=rows,
        cols=cols,
        groups=groups,
    )


@st.composite
def poolings(draw: st.DrawFn, symmetric: bool = False) -> Pooling:
    """Pools without an input; ``symmetric`` as PyTorch has them, the same padding at both ends."""
    kind = draw(st.sampled_from(["max", "mean"]))
    ceil = draw(st.booleans())
    rows, cols = (
        Window(
            size=size,
            stride=draw(st.integers(1, 4)),
            dilation=draw(st.integers(1, 3)) if kind == "max" else 1,
            low=(low := draw(st.integers(0, size // 2))),
            high=low if symmetric else draw(st.integers(0, size // 2)),
            ceil=ceil,
        )
        for size in (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    )
    if kind == "max":
        return Pooling(kind, rows, cols)
    divisor = draw(st.none() | st.integers(1, 9) | st.integers(-9, -1))
    return Pooling(kind, rows, cols, draw(st.booleans()), divisor)


@st.composite
def pools(draw: st.DrawFn, symmetric: bool = False) -> Pool:
    """Pools on small maps."""
    step = draw(poolings(symmetric=symmetric))
    height, width = (
        smallest_fitting(window) + draw(st.integers(0, 6)) for window in (step.rows, step.cols)
    )
    return Pool.of(step, draw(st.integers(0, 2)), draw(st.integers(1, 3)), height, width)


def activations() -> st.SearchStrategy[Act]:
    """Every activation, with slopes of either sign."""
    slopes = st.floats(-4, 4, allow_subnormal=False)
    return st.sampled_from([Act("identity"), Act("relu")]) | st.builds(
        Act, st.just("leaky_relu"), slopes
    )


@st.composite
def blocks(draw: st.DrawFn, symmetric_pool: bool = False) -> Block:
    """Blocks with any steps in any order and, if it fits, a pool."""
    conv = draw(convs())
    candidates: list[Step] = [Bias(), Affine(), Add(), draw(activations())]
    steps = draw(st.permutations(candidates))[: draw(st.integers(0, len(candidates)))]
    step = draw(st.none() | poolings(symmetric=symmetric_pool))
    _, _, height, width = conv.out_shape
    if step and step.rows.out_size(height) > 0 and step.cols.out_size(width) > 0:
        steps = [*steps, step]
    return Block(conv, tuple(steps))
