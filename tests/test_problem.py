"""Problems: their shapes, their one line, and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BLOCKS, CONVS, POOLS, SPREAD, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blocks, convs, pools

from neocog.errors import InvalidProblem, NeocogError
from neocog.geometry import Window
from neocog.problem import (
    Act,
    Add,
    Affine,
    Bias,
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


# torch is asked for the same and must agree on what is valid and on the shape.

some = st.integers(-1, 4)
numbers = some | st.tuples(some, some)


def torchs(function: Callable[..., torch.Tensor], *args: Any, **options: Any) -> Any:
    """The shape that torch gives, or None where it refuses."""
    try:
        return tuple(function(*args, **options).shape)
    except (RuntimeError, ValueError):
        return None


@settings(max_examples=400)
@given(
    # With an empty batch torch takes anything, a dilation of 0 for one.
    x_shape=st.tuples(*[st.integers(1, 3)], *[st.integers(1, 6)] * 3),
    w_shape=st.tuples(*[st.integers(1, 6)] * 2, *[st.integers(0, 4)] * 2),
    match_channels=st.booleans(),
    stride=numbers,
    padding=numbers | st.sampled_from(["same", "valid", "full"]),
    dilation=numbers,
    groups=st.integers(-1, 4),
)
def test_convolutions_are_refused_where_torch_refuses(
    x_shape: Any,
    w_shape: Any,
    match_channels: bool,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> None:
    if match_channels:
        x_shape = (x_shape[0], w_shape[1] * max(groups, 1), *x_shape[2:])
        w_shape = (w_shape[0] * max(groups, 1), *w_shape[1:])
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    try:
        shape = conv2d_problem(x_shape, w_shape, **options).out_shape
    except InvalidProblem:
        shape = None
    assert shape == torchs(F.conv2d, torch.zeros(x_shape), torch.zeros(w_shape), None, **options)


@settings(max_examples=400)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 7), st.integers(0, 7)),
    kernel_size=numbers,
    stride=st.none() | numbers,
    padding=st.integers(-1, 2) | st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.just(1) | numbers,
    ceil_mode=st.booleans(),
    kind=st.sampled_from(["max", "mean"]),
    divisor=st.none() | st.integers(-2, 2),
)
def test_pools_are_refused_where_torch_refuses(
    shape: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    kind: str,
    divisor: int | None,
) -> None:
    options = {
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "ceil_mode": ceil_mode,
    }
    if kind == "max":
        options["dilation"] = dilation
        function: Any = F.max_pool2d
    else:
        options["divisor_override"] = divisor
        function = F.avg_pool2d
    try:
        step = pooling(kind, **options)
        ours = Pool.of(step, *shape).out_shape
    except InvalidProblem:
        ours = None
    assert ours == torchs(function, torch.zeros(shape), **options)


# Every refusal says what was given and what was expected; sizes come with the formula.

WINDOW = Window(3)
CONV = Conv(1, 4, 8, 8, 4, WINDOW, WINDOW)
X, W = (1, 4, 8, 8), (6, 4, 3, 3)

REFUSALS: list[tuple[str, Callable[[], object], list[str]]] = [
    (
        "kernel larger than the padded input",
        lambda: conv2d_problem((1, 4, 8, 3), (6, 4, 3, 5)),
        ["cols", "1*(5-1) + 1 = 5", "0 + 3 + 0 = 3", "floor((3 - 1*(5-1) - 1 + 0 + 0)/1) + 1 = -1"],
    ),
    (
        "dilated kernel larger than the padded input",
        lambda: conv2d_problem(X, W, padding=1, dilation=5),
        ["rows", "5*(3-1) + 1 = 11", "1 + 8 + 1 = 10", "floor((8 - 5*(3-1) - 1 + 1 + 1)/1) + 1"],
    ),
    (
        "kernel larger than the spread-out input",
        lambda: replace(CONV, rows=Window(20, base_dilation=2)),
        ["0 + 15 + 0 = 15", "floor((((8-1)*2+1) - 1*(20-1) - 1 + 0 + 0)/1) + 1 = -4"],
    ),
    (
        "pool larger than its input",
        lambda: Pool.of(pooling("max", 9), *X),
        ["rows", "1*(9-1) + 1 = 9", "0 + 8 + 0 = 8", "floor((8 - 1*(9-1) - 1 + 0 + 0)/9) + 1 = 0"],
    ),
    (
        "pool larger than the convolution's output",
        lambda: Block(CONV, (pooling("mean", 7),)),
        ["mean n1 c4x6x6 7x7", "floor((6 - 1*(7-1) - 1 + 0 + 0)/7) + 1 = 0"],
    ),
    (
        "channels",
        lambda: conv2d_problem((1, 3, 8, 8), W),
        ["(1, 3, 8, 8)", "3 channels", "(6, 4, 3, 3)", "groups=1", "4*1 = 4"],
    ),
    (
        "channels with groups",
        lambda: conv2d_problem(X, W, groups=2),
        ["4 channels", "groups=2", "4*2 = 8"],
    ),
    (
        "groups and input channels",
        lambda: replace(CONV, groups=3),
        ["groups=3 must divide in_channels=4", "4 = 3*1 + 1"],
    ),
    (
        "groups and output channels",
        lambda: conv2d_problem((1, 8, 8, 8), (7, 4, 3, 3), groups=2),
        ["groups=2 must divide out_channels=7", "7 = 2*3 + 1"],
    ),
    ("zero groups", lambda: conv2d_problem(X, W, groups=0), ["groups", "at least 1", "got 0"]),
    ("zero height", lambda: conv2d_problem((1, 4, 0, 8), W), ["height", "at least 1", "got 0"]),
    ("negative width", lambda: replace(CONV, width=-8), ["width", "at least 1", "got -8"]),
    ("negative batch", lambda: replace(CONV, batch=-1), ["batch", "at least 0", "got -1"]),
    ("no outputs", lambda: conv2d_problem(X, (0, 4, 3, 3)), ["out_channels", "got 0"]),
    (
        "no inputs",
        lambda: conv2d_problem((1, 0, 8, 8), (6, 0, 3, 3)),
        ["in_channels", "at least 1", "got 0"],
    ),
    ("no pool channels", lambda: Pool.of(pooling("max", 2), 1, 0, 8, 8), ["channels", "got 0"]),
    ("zero kernel", lambda: conv2d_problem(X, (6, 4, 0, 3)), ["rows: kernel size", "got 0"]),
    ("zero stride", lambda: conv2d_problem(X, W, stride=(1, 0)), ["cols: stride", "got 0"]),
    ("zero dilation", lambda: conv2d_problem(X, W, dilation=0), ["rows: dilation", "got 0"]),
    (
        "zero base dilation",
        lambda: replace(CONV, rows=Window(3, base_dilation=0)),
        ["rows: base_dilation", "got 0"],
    ),
    ("negative padding", lambda: conv2d_problem(X, W, padding=-1), ["padding", "least 0", "-1"]),
    ("padding word", lambda: conv2d_problem(X, W, padding="full"), ["'same'", "got 'full'"]),
    (
        "same padding with a stride",
        lambda: conv2d_problem(X, W, stride=(1, 2), padding="same"),
        ["'same' needs stride 1", "(1, 2)"],
    ),
    ("three strides", lambda: conv2d_problem(X, W, stride=(1, 2, 3)), ["stride", "(1, 2, 3)"]),
    ("half a stride", lambda: conv2d_problem(X, W, stride=0.5), ["stride", "0.5"]),  # type: ignore
    ("input without batch", lambda: conv2d_problem(X[1:], W), ["input", "4 dim", "(4, 8, 8)"]),
    ("flat weight", lambda: conv2d_problem(X, W[:2]), ["weight", "4 dimensions", "(6, 4)"]),
    (
        "fraction",
        lambda: replace(CONV, height=8.0),  # type: ignore
        ["height", "8.0", "float"],
    ),
    ("truth value", lambda: replace(CONV, batch=True), ["batch", "True", "bool"]),
    ("no window", lambda: replace(CONV, rows=3), ["rows", "Window", "3"]),  # type: ignore
    (
        "half a padding",
        lambda: replace(CONV, cols=Window(3, low=0.5)),  # type: ignore
        ["cols: low padding", "0.5"],
    ),
    ("ceil", lambda: replace(CONV, rows=Window(3, ceil=True)), ["rows", "ceil mode"]),
    ("pool kind", lambda: pooling("median", 2), ["'median'", "max, mean"]),
    (
        "pool padding",
        lambda: pooling("max", (3, 5), padding=2),
        ["rows", "half its kernel, 3 // 2 = 1", "low=2"],
    ),
    ("negative pool padding", lambda: pooling("max", 3, padding=-1), ["low=-1"]),
    ("pool stride", lambda: pooling("max", 3, stride=0), ["rows: stride", "got 0"]),
    ("mean dilation", lambda: pooling("mean", 3, dilation=2), ["mean", "dilation=2"]),
    (
        "pool base dilation",
        lambda: Pooling("max", Window(2, base_dilation=2), Window(2)),
        ["base_dilation=2"],
    ),
    (
        "one ceil",
        lambda: Pooling("max", Window(2, ceil=True), Window(2)),
        ["ceil", "rows and cols"],
    ),
    ("zero divisor", lambda: pooling("mean", 2, divisor_override=0), ["divisor_override", "0"]),
    (
        "divisor of a maximum",
        lambda: pooling("max", 2, divisor_override=3),
        ["max", "divisor_override", "3"],
    ),
    (
        "uncounted padding of a maximum",
        lambda: pooling("max", 2, count_include_pad=False),
        ["max", "count_include_pad", "False"],
    ),
    ("unknown activation", lambda: Act("swish"), ["'swish'", "identity, relu, leaky_relu"]),
    ("slope of relu", lambda: Act("relu", 0.5), ["relu", "0.5"]),
    ("infinite slope", lambda: Act("leaky_relu", float("inf")), ["slope", "inf"]),
    ("step twice", lambda: Block(CONV, (Bias(), Add(), Bias())), ["Bias", "once", "bias | add"]),
    (
        "two activations",
        lambda: Block(CONV, (Act("relu"), Affine(), Act("identity"))),
        ["Act", "relu | affine | identity"],
    ),
    (
        "step after the pool",
        lambda: Block(CONV, (pooling("max", 2), Bias())),
        ["last", "max 2x2", "| bias"],
    ),
    ("unknown step", lambda: Block(CONV, ("relu",)), ["'relu'"]),  # type: ignore
    ("no convolution", lambda: Block(pooling("max", 2)), ["Conv", "Pooling"]),  # type: ignore
]


@pytest.mark.parametrize(
    ("build", "fragments"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS]
)
def test_refusals_say_what_and_why(build: Callable[[], object], fragments: list[str]) -> None:
    with pytest.raises(InvalidProblem) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_refusals_are_caught_as_torchs_are() -> None:
    assert issubclass(InvalidProblem, (NeocogError, ValueError, RuntimeError))
    for kind in (NeocogError, ValueError, RuntimeError):
        with pytest.raises(kind, match="groups=3"):
            replace(CONV, groups=3)


@pytest.mark.parametrize(
    ("line", "blamed"),
    [
        ("", "''"),
        ("convolution n1", "'convolution'"),
        ("conv n1 c3x8x8 k4 3x3 z2", "'z2'"),
        ("conv n1 c3x8x8 k4 3x3 p1,1", "'p1,1' has 2 numbers, expected 1 or 4"),
        ("conv n1 c3x8 k4 3x3", "'c3x8' has 2 numbers, expected 1 or 3"),
        ("conv n1,2 c3x8x8 k4 3x3", "'n1,2' has 2 numbers, expected 1 or 1"),
        ("conv n1 c3x8x8 k4 3x3 n2", "'n2' comes twice"),
        ("conv n1 c3x8x8 k4 3x3 5x5", "'5x5' comes twice"),
        ("conv n1 c3x8x8 k4 3x3 s", "'s'"),
        ("conv n1 c3x8x8 k4 3x3 s1.5", "'s1.5'"),
        ("conv n1 c3x8x8 k4 3x3 ceil", "'ceil'"),
        ("conv n1 c3x8x8 k4", "no kernel size"),
        ("conv c3x8x8 k4 3x3", "no n<batch>"),
        ("conv n1 k4 3x3", "no c<channels"),
        ("conv n1 c3x8x8 3x3", "no k<outputs>"),
        ("conv n1 c3x8x8 k4 9x3", "floor((8 - 1*(9-1) - 1 + 0 + 0)/1) + 1 = 0"),
        ("conv n1 c3x8x8 k4 3x3 | sigmoid", "'sigmoid'"),
        ("conv n1 c3x8x8 k4 3x3 | bias relu", "'bias relu'"),
        ("conv n1 c3x8x8 k4 3x3 | leaky_relu(x)", "'x'"),
        ("conv n1 c3x8x8 k4 3x3 | leaky_relu(nan)", "nan"),
        ("conv n1 c3x8x8 k4 3x3 | leaky_relu(0.1", "'leaky_relu(0.1'"),
        ("conv n1 c3x8x8 k4 3x3 | relu(0.1)", "relu has no slope"),
        ("conv n1 c3x8x8 k4 3x3 | max", "no kernel size"),
        ("conv n1 c3x8x8 k4 3x3 | max 2x2 b2", "'b2'"),
        ("conv n1 c3x8x8 k4 3x3 | max 2x2 ceil ceil", "'ceil' comes twice"),
        ("conv n1 c3x8x8 k4 3x3 | bias | | relu", "''"),
        ("max n1 c3x8x8 2x2 | relu", "nothing can follow a pool, got 'relu'"),
        ("max n1 c3x8x8 2x2 g1", "'g1'"),
        ("mean n1 c3x8x8 2x2 div0", "divisor_override"),
    ],
)
def test_lines_that_cannot_be_read_name_the_token(line: str, blamed: str) -> None:
    with pytest.raises(InvalidProblem, match=re.escape(blamed)) as caught:
        parse(line)
    assert repr(line) in str(caught.value)
