"""Problems: their shapes, their one line, and the table of them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from cases import BLOCKS, CONVS, POOLS, SPREAD, Case
from hypothesis import given
from strategies import blocks, convs, pools

from neocog.errors import InvalidProblem
from neocog.geometry import Window
from neocog.problem import (
    Act,
    Block,
    Conv,
    Pool,
    Pooling,
    conv2d_problem,
    parse,
    pooling,
)

ALL = (*CONVS, *SPREAD, *POOLS, *BLOCKS)


def test_the_table_names_each_problem_once() -> None:
    problems = [str(case.problem) for case in ALL]
    assert len(set(problems)) == len(problems)


def test_the_table_covers_what_it_says() -> None:
    conv_windows = [w for case in CONVS for w in (case.conv.rows, case.conv.cols)]
    assert {w.stride for w in conv_windows} >= {1, 2, 3}
    assert {w.dilation for w in conv_windows} >= {1, 2, 3}
    assert any(w.low != w.high for w in conv_windows)
    assert any(w.low > w.size for w in conv_windows)
    assert any(w.stride > w.size for w in conv_windows)
    assert any(case.conv.rows.stride != case.conv.cols.stride for case in CONVS)
    kernels = {(case.conv.rows.size, case.conv.cols.size) for case in CONVS}
    assert kernels >= {(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (1, 5), (5, 1)}
    counts = {1, 2, 3, 8, 16, 17, 19, 31, 32, 33, 64, 96}
    assert {case.conv.in_channels for case in CONVS} >= counts
    assert {case.conv.out_channels for case in CONVS} >= counts
    assert any(case.conv.groups == 2 for case in CONVS)
    depthwise = [case.conv for case in CONVS if 1 < case.conv.in_channels == case.conv.groups]
    assert {conv.out_channels // conv.groups for conv in depthwise} >= {1, 2, 3}
    for table in ([case.conv for case in CONVS], [case.pool for case in POOLS]):
        assert any(problem.batch == 0 for problem in table)
        assert any(problem.height == problem.width == 1 for problem in table)
        assert any(problem.height == 1 < problem.width for problem in table)
    for kind in ("max", "mean"):
        assert any(case.pool.kind == kind and case.pool.rows.ceil for case in POOLS)
    activations = {str(step) for case in BLOCKS for step in case.block.epilogue} & {
        "identity",
        "relu",
        "leaky_relu(0.125)",
    }
    assert len(activations) == 3


@pytest.mark.parametrize("case", ALL, ids=str)
def test_line_of_the_table_round_trips(case: Case) -> None:
    assert parse(str(case.problem)) == case.problem


@given(convs() | pools() | blocks())
def test_line_round_trips(problem: Conv | Pool | Block) -> None:
    assert parse(str(problem)) == problem
    assert "\n" not in str(problem)


def test_a_line_may_be_short_or_complete() -> None:
    full = (
        "conv n1 c64x56x56 k64 3x3 s1x1 p1,1,1,1 d1x1 b1x1 g1 | bias | relu"
        " | max 2x2 s2x2 p0,0,0,0 d1x1"
    )
    short = "conv n1 c64x56x56 k64 3x3 s1x1 p1,1,1,1 | bias | relu | max 2x2 s2x2 p0,0,0,0"
    assert str(parse(full)) == short
    assert parse("  conv 3 k64   c64x56x56 p1 n1|bias|relu|max 2 ") == parse(full)


def test_problems_are_values() -> None:
    first, second = (parse("conv n1 c3x8x8 k4 3x3 | bias | relu") for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert len({first, second}) == 1
    with pytest.raises(FrozenInstanceError):
        first.conv = None  # type: ignore


def test_shapes_and_work() -> None:
    block = parse("conv n2 c6x9x10 k8 3x2 s2x1 p1 g2 | bias | relu | max 2x2 s2x2")
    assert isinstance(block, Block)
    conv = block.conv
    assert conv.in_shape == block.in_shape == (2, 6, 9, 10)
    assert conv.weight_shape == (8, 3, 3, 2)
    assert conv.out_shape == block.conv_shape == (2, 8, 5, 11)
    assert conv.multiply_adds == 2 * 8 * 5 * 11 * 3 * 3 * 2
    assert block.pool == parse("max n2 c8x5x11 2x2 s2x2")
    assert block.out_shape == (2, 8, 2, 5)
    assert Block(conv).pool is None
    assert Block(conv).out_shape == conv.out_shape


def test_four_weights_do_where_a_fully_connected_layer_takes_36() -> None:
    conv = conv2d_problem((1, 1, 3, 3), (1, 1, 2, 2))
    assert conv.out_shape == (1, 1, 2, 2)
    assert torch.Size(conv.weight_shape).numel() == 4
    fully_connected = torch.nn.Linear(3 * 3, 2 * 2, bias=False)
    assert fully_connected.weight.numel() == 36


@given(convs(least_batch=1))
def test_gradients_are_problems_of_the_right_shapes(conv: Conv) -> None:
    to_input, to_weight = conv.grad_input(), conv.grad_weight()
    assert to_input.in_shape == conv.out_shape
    assert to_input.out_shape == conv.in_shape
    assert to_weight.out_shape == (
        conv.weight_shape[1],
        conv.weight_shape[0],
        *conv.weight_shape[2:],
    )
    assert to_weight.weight_shape == (conv.out_channels, conv.batch, *conv.out_shape[2:])


def test_an_empty_batch_has_no_convolution_for_the_gradient_of_its_weights() -> None:
    conv = conv2d_problem((0, 3, 8, 8), (4, 3, 3, 3))
    assert conv.grad_input().out_shape == (0, 3, 8, 8)
    with pytest.raises(InvalidProblem, match="batch=0 is zero"):
        conv.grad_weight()


def test_pools_from_torchs_arguments() -> None:
    assert pooling("max", 3) == Pooling("max", Window(3, 3), Window(3, 3))
    rows = Window(3, 2, low=1, high=1, ceil=True)
    cols = Window(2, 1, low=0, high=0, ceil=True)
    assert pooling("mean", (3, 2), [2, 1], (1, 0), 1, True, False, 7) == Pooling(
        "mean", rows, cols, count_include_pad=False, divisor_override=7
    )
    assert pooling("max", 2, dilation=(1, 3)).cols.dilation == 3


def test_steps_know_whether_they_keep_the_order_of_values() -> None:
    assert Act("relu").monotone
    assert Act("leaky_relu", 0.5).monotone
    assert not Act("leaky_relu", -0.5).monotone
