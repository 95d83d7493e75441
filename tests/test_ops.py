"""The operators of torch.library: schemas, fake kernels, misuse, torch.compile, layouts.

The kernels themselves are tested in test_kernels.py, the wiring of autograd in test_autograd.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import kernel_tools as kt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from neocog import functional
from neocog import nn as neocog_nn
from neocog.problem import pooling

LAST = torch.channels_last
PLAIN = ([1, 1], [0, 0, 0, 0], [1, 1], 1)
PADDED = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
STRIDED = ([2, 1], [0, 1, 2, 1], [1, 2], 2)
MAX, MEAN = str(pooling("max", 2)), str(pooling("mean", 3, 2, 1))


def numbers(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype)


# ----------------------------------------------------------------------------------- opcheck

BLOCKS = (
    # window, epilogue, channels, outputs, residual?, channels_last?
    (PLAIN, "", 3, 5, False, False),
    (PADDED, "bias", 1, 4, False, True),
    (STRIDED, "bias | relu", 4, 6, False, False),
    (PADDED, "bias | add | leaky_relu(0.25)", 3, 5, True, True),
    (PADDED, f"bias | relu | {MAX}", 3, 5, False, False),
    (PADDED, f"bias | leaky_relu(0.25) | {MEAN}", 4, 4, False, True),
    (PADDED, f"add | {MEAN}", 2, 19, True, False),
)


def block_arguments(
    window: Any, epilogue: str, channels: int, outputs: int, residual: bool, last: bool
) -> tuple[Any, ...]:
    x = numbers(2, channels, 6, 7)
    w = numbers(outputs, channels // window[3], 3, 2)
    b = numbers(outputs) if "bias" in epilogue else None
    r = None
    if residual:
        r = torch.zeros_like(torch.ops.neocog.conv_block(x, w, None, None, *window, "", False)[0])
    if last:
        x, w = x.to(memory_format=LAST), w.to(memory_format=LAST)
    for t in (x, w, b, r):
        if t is not None:
            t.requires_grad_()
    return x, w, b, r, *window, epilogue


@pytest.mark.slow
@pytest.mark.parametrize("row", BLOCKS, ids=lambda row: row[1] or "plain")
def test_opcheck_of_blocks(row: Any) -> None:
    arguments = block_arguments(*row)
    torch.library.opcheck(torch.ops.neocog.conv_block.default, (*arguments, True))
    x, w, b, r, *window = arguments
    plain = [None if t is None else t.detach() for t in (x, w, b, r)]
    torch.library.opcheck(torch.ops.neocog.conv_block.default, (*plain, *window, False))
    out, winners, before = torch.ops.neocog.conv_block(*plain, *window, True)
    result = None
    if "relu" in window[-1]:
        result = before if before.numel() else out
    needs = [True, True, b is not None, r is not None]
    backward = (torch.ones_like(out), *plain[:2], result, winners, *window)
    for wanted in (needs, [True, False, False, False], [False, True, False, False]):
        torch.library.opcheck(torch.ops.neocog.conv_block_backward.default, (*backward, wanted))


@pytest.mark.slow
@pytest.mark.parametrize("text", [MAX, MEAN, str(pooling("max", 3, 2, 1, 1, True))])
@pytest.mark.parametrize("last", [False, True])
def test_opcheck_of_pools(text: str, last: bool) -> None:
    x = numbers(2, 5, 7, 6)
    x = x.to(memory_format=LAST) if last else x
    torch.library.opcheck(torch.ops.neocog.pool.default, (x, text, False))
    out, winners = torch.ops.neocog.pool(x, text, True)
    arguments = (torch.ones_like(out), winners, x.shape, text, last)
    torch.library.opcheck(torch.ops.neocog.pool_backward.default, arguments)
    torch.library.opcheck(torch.ops.neocog.pool.default, (x.requires_grad_(), text, True))


# ------------------------------------------------------------------------------ fake kernels

SHAPES = (  # input and weight of a convolution with padding 1
    ((2, 3, 8, 9), (5, 3, 3, 3)),
    ((2, 1, 8, 9), (5, 1, 3, 3)),
    ((2, 3, 8, 9), (1, 3, 3, 3)),
    ((2, 3, 1, 1), (5, 3, 3, 3)),
    ((2, 5, 8, 9), (5, 5, 1, 1)),
    ((2, 1, 1, 1), (5, 1, 3, 3)),
    ((2, 1, 1, 5), (1, 1, 3, 3)),
    ((1, 1, 1, 1), (1, 1, 1, 1)),
)


MAPS = ((2, 3, 8, 9), (2, 1, 8, 9), (2, 3, 1, 1), (2, 1, 1, 1), (1, 1, 1, 1))


def sliced(t: Tensor) -> Tensor:
    """The same numbers in a tensor that is neither contiguous nor channels_last."""
    room = t.new_zeros(*t.shape[:3], 2 * t.shape[3])
    room[..., ::2] = t
    return room[..., ::2]


WAYS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: torch.empty(t.shape, memory_format=LAST).copy_(t),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced": sliced,
    "sliced channels_last": lambda t: WAYS["channels_last"](t.repeat_interleave(2, 2))[:, :, ::2],
}


PAIRS = (
    ("contiguous", "contiguous"),
    ("contiguous", "channels_last"),
    ("channels_last", "contiguous"),
    ("channels_last", "channels_last"),
    ("permuted", "sliced"),
    ("sliced channels_last", "permuted"),
)


def symbolic(mode: FakeTensorMode, t: Tensor) -> Tensor:
    """A fake tensor whose sizes are symbols, but for those of 1."""
    sizes = [DimDynamic.DYNAMIC if s > 1 else DimDynamic.STATIC for s in t.shape]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(t, symbolic_context=context)


def hints(t: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides, symbols replaced by what they stood for."""
    return [int(s) for s in t.shape], [int(s) for s in t.stride()]


def check_fake(operator: Any, tensors: list[Tensor | None], rest: tuple[Any, ...]) -> None:
    real = operator(*tensors, *rest)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [None if t is None else symbolic(mode, t) for t in tensors]
    with mode:
        fake = operator(*fakes, *rest)
    pairs = zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]
    for ours, true in pairs:
        assert hints(ours) == (list(true.shape), list(true.stride())), (operator, rest)
        assert (ours.dtype, ours.device) == (true.dtype, true.device)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("epilogue", ["", f"relu | {MAX}", f"relu | {MEAN}"])
def test_fake_blocks_have_the_real_strides(shapes: Any, epilogue: str) -> None:
    x, w = numbers(*shapes[0]), numbers(*shapes[1])
    if "max" in epilogue and min(shapes[0][2:]) < 2:
        epilogue = f"relu | {pooling('max', 1)}"
    for x_way, w_way in PAIRS:
        tensors = [WAYS[x_way](x), WAYS[w_way](w)]
        for save in (False, True):
            rest = (None, None, *PADDED, epilogue, save)
            check_fake(torch.ops.neocog.conv_block, tensors, rest)
        out, winners, before = torch.ops.neocog.conv_block(
            *tensors, None, None, *PADDED, epilogue, 1
        )
        result = None if not epilogue else before if before.numel() else out
        given = [torch.ones_like(out), *tensors, result, winners]
        needs = [True, True, True, True]
        check_fake(torch.ops.neocog.conv_block_backward, given, (*PADDED, epilogue, needs))


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("kind", ["max", "mean"])
def test_fake_pools_have_the_real_strides(shape: Any, kind: str) -> None:
    step = pooling(kind, min(2, shape[2]))
    for way, save in itertools.product(WAYS.values(), (False, True)):
        x = way(numbers(*shape))
        check_fake(torch.ops.neocog.pool, [x], (str(step), save))
        out, winners = torch.ops.neocog.pool(x, str(step), True)
        for last in (False, True):
            rest = (shape, str(step), last)
            check_fake(torch.ops.neocog.pool_backward, [torch.ones_like(out), winners], rest)


def small(dtype: Any = torch.float32) -> nn.Sequential:
    """Every operator: fused and separate pools, C = 1, a 1x1 map at the end."""
    torch.manual_seed(0)
    return nn.Sequential(
        neocog_nn.ConvBlock(1, 4, 3, padding=1, pool=neocog_nn.MaxPool2d(2)),
        neocog_nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        neocog_nn.ConvBlock(
            6, 6, 3, padding="same", activation="leaky_relu", pool=neocog_nn.AvgPool2d(2, 1)
        ),
        neocog_nn.MaxPool2d(2, 1, 1),
        neocog_nn.AvgPool2d(3, 1),
    ).to(dtype)


def test_export_with_sizes_left_open() -> None:
    model = small().eval()
    sizes = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=16), 3: Dim("width", min=16)}
    program = torch.export.export(model, (numbers(2, 1, 20, 24),), dynamic_shapes=(sizes,))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"neocog.conv_block.default", "neocog.pool.default"} <= names
    for shape in ((1, 1, 16, 16), (5, 1, 23, 31), (64, 1, 17, 40)):
        x = numbers(*shape)
        assert torch.equal(program.module()(x), model(x))


def test_make_fx_with_symbolic_sizes() -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return functional.max_pool2d(functional.conv2d(x, w, stride=2, padding=1), 2)

    x, w = numbers(3, 2, 9, 8), numbers(5, 2, 3, 3)
    graph = make_fx(run, tracing_mode="symbolic")(x, w)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    traced = output.args[0].meta["val"]
    assert hints(traced)[0] == list(run(x, w).shape)
    assert not isinstance(traced.shape[0], int) and not isinstance(traced.shape[2], int)
    for other in (x, numbers(7, 2, 15, 30)):
        assert torch.equal(graph(other, w), run(other, w))


# ------------------------------------------------------------------- misuse of the operators


def child_misuses() -> None:
    """What would read through a missing pointer must be an error, not a crash."""
    x, w, b = numbers(1, 2, 4, 4), numbers(3, 2, 3, 3), numbers(3)
    wrong = (
        (x, w, None, None, *PADDED, "bias", False),
        (x, w, None, None, *PADDED, "add", False),
        (x, w, None, None, *PADDED, "affine", False),
        (x, w, b, None, *PADDED, "", False),
        (x, w, None, numbers(1, 3, 4, 4), *PADDED, "relu", False),
        (x.double(), w, None, None, *PADDED, "", False),
        (x, w.double(), None, None, *PADDED, "", False),
        (x, w, b[:2], None, *PADDED, "bias", False),
    )
    for arguments in wrong:
        try:
            torch.ops.neocog.conv_block(*arguments)
        except Exception as error:
            print(type(error).__name__)
        else:
            print("no error", arguments[-2])


def test_operators_refuse_what_does_not_fit() -> None:
    names = kt.in_child("test_ops", "child_misuses").splitlines()
    assert set(names) <= {"InvalidProblem", "Unsupported"} and len(names) == 8, names


def child_forgets_to_save() -> None:
    x = numbers(1, 2, 4, 4).requires_grad_()
    w = numbers(3, 2, 3, 3).requires_grad_()
    for epilogue in (MAX, f"relu | {MEAN}"):
        try:
            torch.ops.neocog.conv_block(x, w, None, None, *PADDED, epilogue, False)[
                0
            ].sum().backward()
        except Exception as error:
            print(type(error).__name__, "save" in str(error))
    try:
        torch.ops.neocog.pool(x, MAX, False)[0].sum().backward()
    except Exception as error:
        print(type(error).__name__, "save" in str(error))


def test_a_graph_traced_without_gradients_cannot_be_differentiated() -> None:
    """``save`` is decided when a graph is traced; running it with gradients must not crash."""
    lines = kt.in_child("test_ops", "child_forgets_to_save").splitlines()
    assert len(lines) == 3 and all(line.endswith("True") for line in lines), lines


# -------------------------------------------------------------------------------- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_aot_eager(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = small()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((2, 1, 20, 24), (3, 1, 17, 32), (3, 1, 20, 24)):
        gradients = []
        for run in (model, compiled):
            x = numbers(*shape).requires_grad_()
            model.zero_grad()
            y = run(x)
            y.square().sum().backward()
            gradients.append([y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())])
        for ours, theirs in zip(*gradients, strict=True):
            assert torch.equal(ours, theirs)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------- channels_last


def layout(t: Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), t.stride()


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_convolutions_have_torchs_strides(shapes: Any) -> None:
    wrong = []
    for x_way, w_way in itertools.product(WAYS, WAYS):
        x, w = WAYS[x_way](numbers(*shapes[0])), WAYS[w_way](numbers(*shapes[1]))
        ours, theirs = functional.conv2d(x, w, padding=1), F.conv2d(x, w, padding=1)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        # Of one pixel with one channel torch reads the layout off the strides of sizes of 1, where
        # its own convolutions do not agree among themselves: then both layouts will do.
        free = x_way == "sliced channels_last" and shapes[0][1:] == (1, 1, 1)
        if layout(ours) != layout(theirs) and not free:
            wrong.append((x_way, w_way, ours.stride(), theirs.stride()))
    assert wrong == []


@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_pools_have_torchs_strides(shape: Any) -> None:
    wrong = []
    for way, name in itertools.product(WAYS, ("max_pool2d", "avg_pool2d")):
        x = WAYS[way](numbers(*shape))
        ours, theirs = (getattr(library, name)(x, min(2, shape[2])) for library in (functional, F))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        if layout(ours) != layout(theirs):
            wrong.append((way, name, ours.stride(), theirs.stride()))
    assert wrong == []
