"""The reference against torch in float64, and against the laws that define it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BLOCKS, CONVS, SPREAD, Case
from hypothesis import given
from strategies import blocks, convs
from torch_oracle import (
    Array,
    close,
    equal,
    integers,
    normals,
    tensor,
    torch_block,
    torch_conv,
    torch_grads,
    torch_max,
)

from neocog import reference
from neocog.errors import InvalidProblem
from neocog.problem import Add, Affine, Bias, Block, Conv, conv2d_problem, parse


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
