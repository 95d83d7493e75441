"""What problems refuse: where torch refuses too, each time saying what and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

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
        ("conv n1 c3x8x8 k4 3x3 | softsign", "'softsign'"),
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
