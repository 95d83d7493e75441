"""Activations in kernels: against float64 on every target, in blocks, and their gradients.

The numbers run through a real block, a 1x1 convolution with the weight 1, so that what a layer
computes is what is measured.
"""

from __future__ import annotations

import itertools
import math
import re

import kernel_tools as kt
import numpy as np
import pytest
import torch
from cases import SMOOTH, Case
from kernel_tools import NCHW, NHWC
from numpy.typing import NDArray
from torch_oracle import close, tensor, torch_activation, torch_block, torch_grads

from neocog import compiler, functional, handback, reference
from neocog.activations import ACTIVATIONS
from neocog.cpu import epilogue as ep
from neocog.cpu import vector_math
from neocog.cpu.lanes import Emitter
from neocog.cpu.runtime import compile_kernel
from neocog.errors import Unsupported
from neocog.problem import Act, Block, parse
from neocog.program import Program
from neocog.target import Target, host

NEW = tuple(name for name in ACTIVATIONS if name not in ("identity", "relu", "leaky_relu"))
TRAINABLE = tuple(name for name in NEW if ep.has_gradient(Act(name)))
FORWARD_ONLY = tuple(name for name in NEW if name not in TRAINABLE)

SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
LARGEST = float(np.finfo(np.float32).max)
HOSTILE = (
    *(0.0, -0.0, math.inf, -math.inf, math.nan, LARGEST, -LARGEST, SMALLEST, -SMALLEST),
    *(1e-38, -1e-38, 1e20, -1e20, 3.0, -3.0, 6.0, 88.7, -88.7, 103.9, -103.9, 127.0, -150.0),
)
WIDTH = 64


def dense() -> NDArray[np.float32]:
    """A sweep where the functions bend, a coarse one as far as they do anything, magnitudes."""
    powers = np.logspace(-45, 38, 2000)
    parts = (np.linspace(-12, 12, 40001), np.linspace(-130, 130, 10001), powers, -powers)
    values = np.concatenate([*parts, HOSTILE]).astype(np.float32)
    return np.resize(values, -(-len(values) // WIDTH) * WIDTH)


def in_kernel(name: str, values: NDArray[np.float32], target: Target) -> NDArray[np.float64]:
    """The activation of ``values``, whose number is a multiple of WIDTH, in a block's kernel."""
    rows = values.size // WIDTH
    problem = parse(f"conv n1 c1x{rows}x{WIDTH} k1 1x1 | {name}")
    assert isinstance(problem, Block)
    inputs = {"x": values.reshape(problem.in_shape), "w": np.ones((1, 1, 1, 1))}
    results, _ = kt.forward(problem, inputs, target=target)
    return results["out"].numpy().astype(np.float64).ravel()


def in_float64(name: str, values: NDArray[np.float32]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # 0 times infinity
        return ACTIVATIONS[name].forward(values.astype(np.float64), 0.0)


FADING = 1e-8
"""How far GELU's values below -4 may be off, where the rounding of an exponent counts."""


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
@pytest.mark.parametrize("name", NEW)
def test_every_activation_is_that_of_float64(name: str, target: Target) -> None:
    values = dense()
    ours, theirs = in_kernel(name, values, target), in_float64(name, values)
    assert np.isnan(theirs).sum() == np.isnan(ours).sum() >= 1
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite])
    values, ours, theirs = (v[finite] for v in (values, ours, theirs))
    bound = 4e-7 * np.abs(theirs) + (FADING if "gelu" in name else 128 * SMALLEST)
    wrong = ~(np.abs(ours - theirs) <= bound)
    assert not wrong.any(), (values[wrong][:5], ours[wrong][:5], theirs[wrong][:5])


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_nan_and_infinities_are_as_in_torch(target: Target) -> None:
    values = np.resize(np.array([math.nan, math.inf, -math.inf], np.float32), WIDTH)
    for name in NEW:
        theirs = torch_activation(Act(name), tensor(values)).detach().numpy()
        np.testing.assert_array_equal(in_kernel(name, values, target), theirs, err_msg=name)


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_bounds_are_reached_and_never_passed(target: Target) -> None:
    values = dense()
    values = values[~np.isnan(values)]
    values = np.resize(values, -(-len(values) // WIDTH) * WIDTH)
    for name, low, high in (
        ("relu6", 0, 6),
        ("hardsigmoid", 0, 1),
        ("sigmoid", 0, 1),
        ("tanh", -1, 1),
    ):
        ours = in_kernel(name, values, target)
        assert (ours.min(), ours.max()) == (low, high), name
    tanh = in_kernel("tanh", values, target)
    assert np.array_equal(np.sign(tanh), np.sign(values))  # not 0 where the value is denormal


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_exp_is_within_two_units_in_the_last_place(target: Target) -> None:
    """On its own, in a kernel of one loop; with results that are denormal, 0 and infinite."""
    values = np.concatenate([dense(), np.linspace(-104, 89, 20001, dtype=np.float32)])
    values = np.resize(values, -(-len(values) // 16) * 16)
    e = Emitter(target, "exp")
    fields = ("values*", "out*")
    with e.kernel(fields) as (f, begin, end, _):

        def item(number):
            at = e.mul(number, e.lanes)
            e.vstore(vector_math.exp(e, e.vload(f.values, at)), f.out, at)

        e.loop(begin, end, item)
    program = Program(("values", "out"))
    given, out = torch.tensor(values), torch.empty(values.size)
    places = {name: program.buffer(name) for name in program.names}
    program.step(compile_kernel(e, fields), values.size // e.lanes, **places)
    program.run(given.data_ptr(), out.data_ptr(), threads=1)
    with np.errstate(over="ignore"):
        truth = np.exp(values.astype(np.float64))
        rounded = truth.astype(np.float32)
    ours = out.numpy()
    ends = np.isnan(truth) | np.isinf(rounded) | (values < -104)
    np.testing.assert_array_equal(ours[ends], rounded[ends])
    units = np.abs(ours[~ends] - truth[~ends]) / np.spacing(np.maximum(rounded[~ends], SMALLEST))
    assert units.max() <= 2


def test_a_kernel_holds_a_long_activation_once() -> None:
    """Compiling it for every accumulator of a register tile would take seconds."""
    e = Emitter(host(), "twice")
    with e.kernel(("values*",)) as (f, *_):
        v = e.vload(f.values)
        for _ in range(2):
            v = ep.activate(e, Act("gelu"), v)
        e.vstore(v, f.values)
    text = str(e.module)
    assert text.count("define internal") == 1 and len(re.findall(r"call .*@.gelu.\(", text)) == 2


# ------------------------------------------------------------------------------------ in blocks


def small(shape, seed: int):
    """Multiples of 1/8 of moderate size: sums of products are exact, activations are not."""
    return kt.integers(shape, seed) / 8


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_the_reference_of_blocks_is_torchs(case: Case) -> None:
    problem = case.block
    given = kt.block_inputs(problem, small)
    grad = given.pop("grad")
    tensors = {name: tensor(value) for name, value in given.items()}
    theirs = torch_block(problem, tensors)
    close(reference.block(problem, **given).out, theirs)
    gradients = torch_grads(theirs, grad, *tensors.values())
    ours = reference.block_grad(problem, grad, **given)
    assert set(ours) == set(tensors)
    for name, gradient in zip(tensors, gradients, strict=True):
        close(ours[name], gradient)


def spelling(value: Case | Target) -> str:
    return value.name if isinstance(value, Target) else str(value)


# Everything on this machine's own row; elsewhere a few, since the functions are tested there.
RUNS = [
    *((case, host()) for case in SMOOTH),
    *((case, target) for target in kt.OTHERS for case in SMOOTH[::4]),
]


@pytest.mark.parametrize(("case", "target"), RUNS, ids=spelling)
def test_blocks(case: Case, target: Target) -> None:
    problem = case.block
    inputs = kt.block_inputs(problem, small)
    truth = reference.block(problem, **kt.operands(inputs))
    # The activation's error, relative or of size 1 where a pool or a residual hides its size.
    bound = 1e-6 * np.maximum(np.abs(truth.out), 1)
    for layouts, save in itertools.product((((NCHW,) * 3), ((NHWC,) * 3)), (False, True)):
        if save and not ep.has_gradient(ep.activation_of(problem.epilogue)):
            continue
        results, context = kt.forward(problem, inputs, layouts, save, target)
        context.check("out", results["out"], truth.out, bound)


def has_gradient(problem: Block) -> bool:
    """Of an activation that kernels can differentiate; is_trainable tells of the other steps."""
    return ep.has_gradient(ep.activation_of(problem.epilogue)) and kt.is_trainable(problem)


@pytest.mark.parametrize(
    ("case", "target"),
    [(case, target) for case, target in RUNS if has_gradient(case.block)],
    ids=spelling,
)
def test_gradients_of_blocks(case: Case, target: Target) -> None:
    problem = case.block
    inputs = kt.block_inputs(problem, small)
    truth = reference.block_grad(problem, inputs["grad"], **kt.operands(inputs))
    saved, _ = kt.forward(problem, inputs, (NHWC, NCHW, NHWC), True, target)
    for layouts in ((NCHW,) * 5, (NHWC,) * 5):
        grads, context = kt.backward(problem, inputs, saved, kt.needed(problem), layouts, target)
        assert len(grads) >= 3
        for name, grad in grads.items():
            bound = np.full(truth[name].shape, 1e-5 * np.abs(truth[name]).max())
            context.check(name, grad, truth[name], bound)


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_gradients_that_the_result_does_not_tell_are_refused(name: str) -> None:
    problem = parse(f"conv n1 c3x6x6 k4 3x3 p1 | bias | {name}")
    assert isinstance(problem, Block)
    with pytest.raises(Unsupported, match=f"gradient of {name}: "):
        compiler.backward(problem, NCHW, NCHW, (27, 9, 3, 1), NCHW, NCHW, ("x",))


def test_which_activations_are_trained_in_kernels() -> None:
    assert TRAINABLE == ("relu6", "hardsigmoid", "sigmoid", "tanh")
    assert FORWARD_ONLY == ("hardswish", "silu", "gelu", "gelu_tanh")
    assert set(ACTIVATIONS) == set(ep.ACTIVATIONS)
    for name, row in ACTIVATIONS.items():
        assert ep.has_gradient(Act(name)) == (row.derivative_from_output is not None)


# ---------------------------------------------------------------------------- spelling, handback


@pytest.mark.parametrize("name", NEW)
def test_steps_print_and_parse(name: str) -> None:
    line = f"conv n1 c3x8x8 k4 3x3 p1 | bias | {name} | max 2x2"
    problem = parse(line)
    assert isinstance(problem, Block) and Act(name) in problem.epilogue
    assert parse(str(problem)) == problem and f"| {name} |" in str(problem)


def arguments() -> list[torch.Tensor]:
    shapes = ((2, 3, 9, 8), (5, 3, 3, 3), (5,))
    return [
        torch.tensor(kt.normals(shape, i), dtype=torch.float32) for i, shape in enumerate(shapes)
    ]


def block(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, name: str) -> torch.Tensor:
    return functional.conv_block(x, w, b, 1, 1, activation=name)


def expected(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, name: str) -> torch.Tensor:
    return torch_activation(Act(name), torch.nn.functional.conv2d(x, w, b, 1, 1))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture):
    """The warnings of the logger ``neocog`` so far."""
    handback.warn_once.cache_clear()
    caplog.set_level("WARNING", logger="neocog")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "neocog"]


@pytest.mark.parametrize("name", NEW)
def test_inference_runs_in_kernels(name: str, warnings) -> None:
    given = arguments()
    torch.testing.assert_close(block(*given, name), expected(*given, name))
    for t in given:
        t.requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(block(*given, name), expected(*given, name))
    assert warnings() == []


@pytest.mark.parametrize("name", NEW)
def test_training_runs_in_kernels_or_in_torch_and_says_so(name: str, warnings) -> None:
    given = [t.requires_grad_() for t in arguments()]
    grads = [torch.autograd.grad(f(*given, name).square().sum(), given) for f in (block, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if name in TRAINABLE:
        assert warnings() == []
        return
    (message,) = warnings()
    assert "handed back to PyTorch" in message and f"the gradient of {name}" in message


@pytest.mark.parametrize("name", NEW)
def test_what_is_handed_back_is_the_same_function(name: str) -> None:
    x = tensor(np.linspace(-5, 5, 41))
    close(handback.activation(x, Act(name)).detach().numpy(), torch_activation(Act(name), x))
