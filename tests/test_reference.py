"""The reference against torch in float64, and against the laws that define it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BLOCKS, CONVS, POOLS, SPREAD, Case
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import blocks, convs, pools

from neocog import reference
from neocog.activations import ACTIVATIONS
from neocog.dtypes import FLOAT32
from neocog.errors import InvalidProblem
from neocog.problem import Act, Add, Affine, Bias, Block, Conv, Pool, conv2d_problem, parse, pooling

Array = NDArray[np.float64]


def integers(shape: tuple[int, ...], seed: int) -> Array:
    """Small whole numbers, ties and zeros among them: sums of their products are exact."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float64)


def normals(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def tensor(array: Array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


# What torch is asked to compute the same.


def torch_conv(problem: Conv, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    rows, cols = problem.rows, problem.cols
    if (rows.base_dilation, cols.base_dilation) != (1, 1):
        height = (problem.height - 1) * rows.base_dilation + 1
        width = (problem.width - 1) * cols.base_dilation + 1
        spread = torch.zeros(*problem.in_shape[:2], height, width, dtype=x.dtype)
        spread[:, :, :: rows.base_dilation, :: cols.base_dilation] = x
        x = spread
    frame = (cols.low, cols.high, rows.low, rows.high)
    # In two steps: torch refuses to cut off more than there was before padding.
    x = F.pad(x, [max(p, 0) for p in frame])
    x = F.pad(x, [min(p, 0) for p in frame])
    return F.conv2d(
        x,
        w,
        stride=(rows.stride, cols.stride),
        dilation=(rows.dilation, cols.dilation),
        groups=problem.groups,
    )


def torch_max(problem: Pool, x: torch.Tensor) -> tuple[torch.Tensor, Array]:
    """The maxima and, from torch's indices into the map, the winners as taps."""
    rows, cols = problem.rows, problem.cols
    padding = (rows.low, cols.low)
    if (rows.high, cols.high) != padding:
        assert not rows.ceil, "torch's ceil mode depends on the padding being its own"
        x = F.pad(x, (cols.low, cols.high, rows.low, rows.high), value=-math.inf)
        padding = (0, 0)
    out, indices = F.max_pool2d(
        x,
        kernel_size=(rows.size, cols.size),
        stride=(rows.stride, cols.stride),
        padding=padding,
        dilation=(rows.dilation, cols.dilation),
        ceil_mode=rows.ceil,
        return_indices=True,
    )
    ih, iw = np.divmod(indices.numpy(), x.shape[3])
    oh = np.arange(out.shape[2])[:, None]
    ow = np.arange(out.shape[3])
    kh = (ih + padding[0] - oh * rows.stride) // rows.dilation
    kw = (iw + padding[1] - ow * cols.stride) // cols.dilation
    return out, kh * cols.size + kw


def torch_mean(problem: Pool, x: torch.Tensor) -> torch.Tensor:
    rows, cols = problem.rows, problem.cols
    padding = (rows.low, cols.low)
    if (rows.high, cols.high) != padding:
        assert not rows.ceil and problem.count_include_pad
        x = F.pad(x, (cols.low, cols.high, rows.low, rows.high))
        padding = (0, 0)
    return F.avg_pool2d(
        x,
        kernel_size=(rows.size, cols.size),
        stride=(rows.stride, cols.stride),
        padding=padding,
        ceil_mode=rows.ceil,
        count_include_pad=problem.count_include_pad,
        divisor_override=problem.divisor_override,
    )


def torch_block(problem: Block, given: dict[str, torch.Tensor]) -> torch.Tensor:
    value = torch_conv(problem.conv, given["x"], given["w"])
    for step in problem.epilogue:
        if isinstance(step, Bias):
            value = value + given["bias"][:, None, None]
        elif isinstance(step, Affine):
            value = value * given["scale"][:, None, None] + given["shift"][:, None, None]
        elif isinstance(step, Add):
            value = value + given["residual"]
        elif isinstance(step, Act):
            value = {
                "identity": lambda v, slope: v,
                "relu": lambda v, slope: F.relu(v),
                "leaky_relu": F.leaky_relu,
            }[step.name](value, step.slope)
        else:
            assert problem.pool is not None
            kind = problem.pool.kind
            value = (
                torch_max(problem.pool, value)[0]
                if kind == "max"
                else torch_mean(problem.pool, value)
            )
    return value


def torch_grads(out: torch.Tensor, g: Array, *inputs: torch.Tensor) -> list[Array]:
    return [grad.numpy() for grad in torch.autograd.grad(out, inputs, torch.tensor(g))]


def close(ours: Array, theirs: Array | torch.Tensor) -> None:
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def equal(ours: Array, theirs: Array | torch.Tensor) -> None:
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    np.testing.assert_array_equal(ours, theirs, strict=True)


def check_conv(problem: Conv, fill: Any, same: Any) -> None:
    x, w, g = (
        fill(shape, seed)
        for seed, shape in enumerate((problem.in_shape, problem.weight_shape, problem.out_shape))
    )
    xt, wt = tensor(x), tensor(w)
    out = torch_conv(problem, xt, wt)
    same(reference.convolution(problem, x, w), out)
    grad_x, grad_w = torch_grads(out, g, xt, wt)
    same(reference.convolution_grad_input(problem, g, w), grad_x)
    same(reference.convolution_grad_weight(problem, g, x), grad_w)


@pytest.mark.parametrize("case", (*CONVS, *SPREAD), ids=str)
def test_convolutions_of_the_table(case: Case) -> None:
    check_conv(case.conv, normals, close)
    check_conv(case.conv, integers, equal)


@given(convs())
def test_convolutions_of_any_shape(problem: Conv) -> None:
    check_conv(problem, integers, equal)


def test_bias_is_added_to_its_channel() -> None:
    problem = conv2d_problem((2, 3, 5, 5), (4, 3, 3, 3))
    x, w, bias = integers((2, 3, 5, 5), 0), integers((4, 3, 3, 3), 1), np.arange(4.0)
    out = F.conv2d(torch.tensor(x), torch.tensor(w), torch.tensor(bias))
    equal(reference.convolution(problem, x, w, bias), out)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, (2, 5)])
@pytest.mark.parametrize("dilation", [1, 2, (3, 1)])
def test_same_padding_is_torchs(size: Any, dilation: Any) -> None:
    x = integers((1, 2, 9, 8), 0)
    w = integers((3, 2, *(size if isinstance(size, tuple) else (size, size))), 1)
    problem = conv2d_problem(x.shape, w.shape, padding="same", dilation=dilation)
    out = F.conv2d(torch.tensor(x), torch.tensor(w), padding="same", dilation=dilation)
    equal(reference.convolution(problem, x, w), out)


def test_four_products_by_hand() -> None:
    problem = conv2d_problem((1, 1, 3, 3), (1, 1, 2, 2))
    picture = np.arange(9.0).reshape(1, 1, 3, 3)
    kernel = np.array([[[[1.0, 10.0], [100.0, 1000.0]]]])
    out = reference.convolution(problem, picture, kernel)
    assert out[0, 0].tolist() == [[4310, 5421], [7643, 8754]]


def test_shifting_the_picture_shifts_the_output() -> None:
    problem = conv2d_problem((1, 2, 9, 9), (3, 2, 3, 3))
    x, w = integers((1, 2, 9, 9), 0), integers((3, 2, 3, 3), 1)
    out = reference.convolution(problem, x, w)
    shifted = reference.convolution(problem, np.roll(x, (2, 1), axis=(2, 3)), w)
    equal(shifted[..., 2:, 1:], out[..., :-2, :-1])


# Gradients are problems too.


def turned(problem: Conv, w: Array) -> Array:
    """The weight of ``problem.grad_input()``."""
    groups = problem.groups
    k, c, kh, kw = w.shape
    exchanged = w.reshape(groups, k // groups, c, kh, kw).swapaxes(1, 2)
    return exchanged.reshape(groups * c, k // groups, kh, kw)[:, :, ::-1, ::-1]


def grad_input_as_a_problem(problem: Conv, g: Array, w: Array) -> Array:
    return reference.convolution(problem.grad_input(), g, turned(problem, w))


def grad_weight_as_a_problem(problem: Conv, g: Array, x: Array) -> Array:
    n, c, h, w = x.shape
    groups = problem.groups
    by_group = x.reshape(n, groups, c // groups, h, w)
    pictures = by_group.transpose(2, 1, 0, 3, 4).reshape(c // groups, groups * n, h, w)
    out = reference.convolution(problem.grad_weight(), pictures, g.swapaxes(0, 1))
    return np.ascontiguousarray(out.swapaxes(0, 1))


@given(convs(least_batch=1))
def test_gradients_are_problems_too(problem: Conv) -> None:
    x, w = integers(problem.in_shape, 0), integers(problem.weight_shape, 1)
    g = integers(problem.out_shape, 2)
    equal(
        grad_input_as_a_problem(problem, g, w),
        reference.convolution_grad_input(problem, g, w),
    )
    equal(
        grad_weight_as_a_problem(problem, g, x),
        reference.convolution_grad_weight(problem, g, x),
    )


@given(convs())
def test_the_gradient_of_the_gradient_is_the_convolution(problem: Conv) -> None:
    x, w = integers(problem.in_shape, 0), integers(problem.weight_shape, 1)
    back = problem.grad_input()
    again = back.grad_input()
    assert again.out_shape == problem.out_shape
    equal(
        reference.convolution(again, x, turned(back, turned(problem, w))),
        reference.convolution(problem, x, w),
    )


@given(convs())
def test_adjoint_identity(problem: Conv) -> None:
    x, w = integers(problem.in_shape, 0), integers(problem.weight_shape, 1)
    y = integers(problem.out_shape, 2)
    product = (reference.convolution(problem, x, w) * y).sum()
    assert product == (x * reference.convolution_grad_input(problem, y, w)).sum()
    assert product == (w * reference.convolution_grad_weight(problem, y, x)).sum()


# Pools.


def check_pool(problem: Pool, fill: Any, same: Any) -> None:
    x, g = fill(problem.in_shape, 0), fill(problem.out_shape, 1)
    xt = tensor(x)
    out, winners = reference.pool(problem, x)
    if problem.kind == "mean":
        assert winners is None
        theirs = torch_mean(problem, xt)
    else:
        assert winners is not None
        theirs, torchs = torch_max(problem, xt)
        # torch gives an index outside the map to a window that covers padding only.
        empty = winners == -1
        equal(winners[~empty], torchs[~empty])
        assert np.all(out[empty] == -np.inf)
        if empty.any():
            assert problem.rows.dilation > 1 or problem.cols.dilation > 1
            equal(out, theirs)
            return
    same(out, theirs)
    (grad,) = torch_grads(theirs, g, xt)
    same(reference.pool_grad(problem, g, winners), grad)


@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pools_of_the_table(case: Case) -> None:
    check_pool(case.pool, normals, close)
    check_pool(case.pool, integers, equal if case.pool.kind == "max" else close)


@given(pools(symmetric=True))
def test_pools_of_any_shape(problem: Pool) -> None:
    check_pool(problem, integers, equal if problem.kind == "max" else close)


@given(pools())
def test_pools_padded_differently_at_the_two_ends(problem: Pool) -> None:
    """Against the windows cut out of the padded map one by one, as the numbers to reduce."""
    x = normals(problem.in_shape, 0)
    out, _ = reference.pool(problem, x)
    rows, cols = problem.rows, problem.cols
    fill = -np.inf if problem.kind == "max" else 0.0
    frame = ((0, 0), (0, 0), (rows.low, rows.high), (cols.low, cols.high))
    padded = np.pad(x, frame, constant_values=fill)
    inside = np.pad(np.ones(x.shape[2:]), frame[2:])
    for oh, ow in np.ndindex(*out.shape[2:]):
        across = slice(oh * rows.stride, oh * rows.stride + rows.span, rows.dilation)
        along = slice(ow * cols.stride, ow * cols.stride + cols.span, cols.dilation)
        cut = padded[:, :, across, along]
        if problem.kind == "max":
            equal(out[..., oh, ow], cut.max(axis=(2, 3)))
            continue
        counted = cut[0, 0].size if problem.batch else inside[across, along].size
        if not problem.count_include_pad:
            counted = int(inside[across, along].sum())
        close(out[..., oh, ow], cut.sum(axis=(2, 3)) / (problem.divisor_override or counted))


def test_equal_maxima_the_first_wins() -> None:
    problem = Pool.of(pooling("max", 3), 1, 1, 3, 3)
    x = np.array([[[[1.0, 5, 2], [5, 5, 0], [5, 1, 1]]]])
    out, winners = reference.pool(problem, x)
    assert (out.item(), winners.item()) == (5, 1)  # type: ignore
    grad = reference.pool_grad(problem, np.array([[[[7.0]]]]), winners)
    assert grad[0, 0].tolist() == [[0, 7, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    "values",
    [
        [math.nan, 1, 2, 3],
        [1, math.nan, 3, 2],
        [math.nan, 1, math.nan, 2],
        [math.inf, math.nan, math.inf, 1],
        [-math.inf] * 4,
        [-math.inf, -math.inf, -math.inf, -1],
        [-math.inf, math.nan, -math.inf, -math.inf],
        [math.inf, math.inf, 1, math.inf],
        [0.0, -0.0, 0.0, -0.0],
        [-1, -1, -2, -1],
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [0, 1])
def test_nan_and_infinities_as_in_torch(values: list[float], padding: int) -> None:
    problem = Pool.of(pooling("max", 2, stride=1, padding=padding), 1, 1, 2, 2)
    x = np.array(values, dtype=np.float64).reshape(1, 1, 2, 2)
    out, winners = reference.pool(problem, x)
    theirs, torchs = torch_max(problem, torch.tensor(x))
    equal(out, theirs)
    assert winners is not None
    equal(winners, torchs)


@given(pools(symmetric=True).filter(lambda pool: pool.kind == "max" and pool.batch > 0), st.data())
def test_maxima_of_ill_behaved_maps(problem: Pool, data: st.DataObject) -> None:
    """NaN, infinities and ties anywhere in maps of any shape."""
    value = st.sampled_from([math.nan, -math.inf, math.inf, 0.0, 1.0])
    size = math.prod(problem.in_shape)
    x = np.array(data.draw(st.lists(value, min_size=size, max_size=size)))
    x = x.reshape(problem.in_shape)
    out, winners = reference.pool(problem, x)
    theirs, torchs = torch_max(problem, torch.tensor(x))
    equal(out, theirs)
    assert winners is not None
    met = winners != -1
    equal(winners[met], torchs[met])


def test_a_window_on_padding_only_has_no_winner() -> None:
    # Taps at -1 and 2 of a map of 2: both miss it.
    problem = parse("max n1 c1x2x2 2x2 s1 p1 d3")
    assert isinstance(problem, Pool)
    out, winners = reference.pool(problem, np.ones((1, 1, 2, 2)))
    assert (out.item(), winners.item()) == (-math.inf, -1)  # type: ignore
    assert not reference.pool_grad(problem, np.ones((1, 1, 1, 1)), winners).any()


def test_the_mean_of_a_nan_is_nan() -> None:
    problem = Pool.of(pooling("mean", 2), 1, 1, 2, 4)
    out, _ = reference.pool(problem, [[[[math.nan, 1, 1, 2], [1, 1, 3, 4]]]])
    equal(out, np.array([[[[math.nan, 2.5]]]]))


def test_the_gradient_of_a_maximum_needs_the_winners() -> None:
    problem = Pool.of(pooling("max", 2), 1, 1, 2, 2)
    with pytest.raises(InvalidProblem, match="max n1 c1x2x2 .* needs the winners"):
        reference.pool_grad(problem, np.ones((1, 1, 1, 1)))


# Blocks.


def block_inputs(problem: Block, fill: Any) -> dict[str, Array]:
    """What the block's steps need, named as its arguments."""
    channels = (problem.conv.out_channels,)
    shapes = {"x": problem.in_shape, "w": problem.conv.weight_shape}
    for step in problem.epilogue:
        if isinstance(step, Bias):
            shapes["bias"] = channels
        elif isinstance(step, Affine):
            shapes |= {"scale": channels, "shift": channels}
        elif isinstance(step, Add):
            shapes["residual"] = problem.conv_shape
    return {name: fill(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def check_block(problem: Block, fill: Any, same: Any) -> None:
    inputs = block_inputs(problem, fill)
    g = fill(problem.out_shape, 99)
    result = reference.block(problem, **inputs)
    tensors = {name: tensor(value) for name, value in inputs.items()}
    theirs = torch_block(problem, tensors)
    same(result.out, theirs)
    if problem.pool is not None and result.winners is not None:
        before = torch.tensor(result.before_pool)
        met = result.winners != -1
        equal(result.winners[met], torch_max(problem.pool, before)[1][met])
        if not met.all():
            return
    grads = reference.block_grad(problem, g, **inputs)
    assert grads.keys() == inputs.keys()
    for name, grad in zip(tensors, torch_grads(theirs, g, *tensors.values()), strict=True):
        same(grads[name], grad)


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_blocks_of_the_table(case: Case) -> None:
    check_block(case.block, normals, close)
    means = case.block.pool is not None and case.block.pool.kind == "mean"
    check_block(case.block, integers, close if means else equal)


@given(blocks(symmetric_pool=True))
def test_blocks_of_any_shape(problem: Block) -> None:
    check_block(problem, integers, close)


def test_a_block_keeps_what_entered_each_step() -> None:
    problem = parse("conv n1 c2x4x4 k3 3x3 p1 | bias | relu | max 2x2")
    assert isinstance(problem, Block)
    inputs = block_inputs(problem, integers)
    result = reference.block(problem, **inputs)
    conv = reference.convolution(problem.conv, inputs["x"], inputs["w"])
    biased = reference.convolution(problem.conv, inputs["x"], inputs["w"], inputs["bias"])
    for entering, expected in zip(
        result.entering, (conv, biased, np.maximum(biased, 0)), strict=True
    ):
        equal(entering, expected)
    equal(result.before_pool, np.maximum(biased, 0))
    assert problem.pool is not None
    equal(result.out, reference.pool(problem.pool, result.before_pool)[0])


# The tables beneath.

SPECIAL = np.array([math.nan, -math.inf, -2.0, -0.0, 0.0, 3.0, math.inf])


@pytest.mark.parametrize(
    "act",
    [Act("identity"), Act("relu"), *(Act("leaky_relu", s) for s in (0.0, 0.25, 1.0, 2.0, -0.5))],
    ids=str,
)
def test_activations_and_derivatives_are_torchs(act: Act) -> None:
    row = ACTIVATIONS[act.name]
    x = tensor(SPECIAL)
    theirs = {
        "identity": lambda v: v * 1,
        "relu": F.relu,
        "leaky_relu": lambda v: F.leaky_relu(v, act.slope),
    }[act.name](x)
    (grad,) = torch_grads(theirs, np.ones(SPECIAL.shape), x)
    with np.errstate(invalid="ignore"):  # 0 times infinity, as torch has it
        out = row.forward(SPECIAL, act.slope)
    equal(out, theirs)
    equal(row.derivative(SPECIAL, act.slope), grad)
    if act.slope >= 0:
        equal(row.derivative_from_output(out, act.slope), grad)
        finite = out[~np.isnan(out)]
        assert act.monotone and np.all(np.diff(finite) >= 0)


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_float32_sums_stay_within_their_bound(terms: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, terms)).astype(np.float32)
    exact = math.fsum((a.astype(np.float64) * b).tolist())
    magnitude = np.abs(a.astype(np.float64) * b).sum()
    bound = FLOAT32.error_bound(terms, magnitude)
    for order in (slice(None), slice(None, None, -1)):
        one_by_one = np.cumsum((a * b)[order], dtype=np.float32)[-1]
        assert abs(one_by_one - exact) <= bound
    assert bound <= 2e-5 * magnitude


def test_float32_counts_exactly_as_far_as_it_says() -> None:
    last = FLOAT32.storage.type(FLOAT32.exact_integers)
    assert last - 1 == FLOAT32.exact_integers - 1
    assert last + FLOAT32.storage.type(1) == last


# Bad arguments.


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        ({"x": np.zeros((1, 3, 6, 6))}, ["x must have shape (1, 2, 6, 6)", "(1, 3, 6, 6)"]),
        ({"w": np.zeros((4, 2, 3))}, ["w must have shape (4, 2, 3, 3)", "(4, 2, 3)"]),
        ({"bias": np.zeros(3)}, ["bias must have shape (4,)", "(3,)"]),
        ({"bias": None}, ["bias is missing", "(4,)"]),
        ({"scale": np.zeros(1)}, ["scale must have shape (4,)", "(1,)"]),
        ({"shift": None}, ["shift is missing"]),
        ({"residual": np.zeros((1, 4, 2, 2))}, ["residual", "(1, 4, 4, 4)", "(1, 4, 2, 2)"]),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_are_refused(changed: Any, fragments: list[str]) -> None:
    problem = parse("conv n1 c2x6x6 k4 3x3 | bias | affine | add | relu | max 2x2")
    assert isinstance(problem, Block)
    inputs = block_inputs(problem, integers) | changed
    with pytest.raises(InvalidProblem) as caught:
        reference.block(problem, **inputs)
    for fragment in fragments:
        assert fragment in str(caught.value)
