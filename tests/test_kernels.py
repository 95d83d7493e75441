"""Every kernel against the float64 reference, over the one table of problems.

Whole numbers go in and are compared with ``==``, behind averages within the bound of float32. All
results are NaN beforehand, and every program has run on NaN before, so that an element nobody
wrote, or one read from stale scratch, fails. A failure prints the problem's line and the program.
"""

from __future__ import annotations

import itertools

import kernel_tools as kt
import numpy as np
import pytest
from cases import BLOCKS, CONVS, POOLS, SPREAD, Case
from hypothesis import HealthCheck, given, settings
from kernel_tools import LAYOUTS, NCHW, NHWC
from strategies import blocks, pools

from neocog import compiler, reference
from neocog.errors import Unsupported
from neocog.problem import Act, Add, Affine, Bias, Block, Pool, parse
from neocog.target import Target, host, named

EVERY_FORWARD = list(itertools.product(itertools.product(LAYOUTS, repeat=3), (False, True)))
FEW_FORWARD = [((NCHW, NCHW, NCHW), True), ((NHWC, NHWC, NHWC), False), ((NCHW, NHWC, NHWC), True)]
EVERY_BACKWARD = list(itertools.product(LAYOUTS, repeat=5))
FEW_BACKWARD = [(NCHW,) * 5, (NHWC,) * 5, (NCHW, NHWC, NCHW, NHWC, NHWC)]


def check_forward(problem: Block, target: Target | None = None, ways=None) -> None:
    inputs = kt.block_inputs(problem)
    truth = reference.block(problem, **kt.operands(inputs))
    bound = None if kt.is_exact(problem) else kt.rounded(truth.out)
    for layouts, save in ways or EVERY_FORWARD:
        results, context = kt.forward(problem, inputs, layouts, save, target)
        context.check("out", results["out"], truth.out, bound)
        if "winners" in results:
            kt.winners_agree(context, results["winners"], truth.winners)
        if "before" in results:
            context.check("before", results["before"], truth.before_pool)


def check_backward(problem: Block, target: Target | None = None, ways=None, needs=None) -> None:
    inputs = kt.block_inputs(problem)
    truth = reference.block_grad(problem, inputs["grad"], **kt.operands(inputs))
    bounds = {} if kt.is_exact(problem) else kt.gradient_bounds(problem, inputs)
    saved, _ = kt.forward(problem, inputs, (NHWC, NCHW, NHWC), True, target)
    needs = needs or kt.needed(problem)
    for layouts in ways or EVERY_BACKWARD:
        grads, context = kt.backward(problem, inputs, saved, needs, layouts, target)
        assert tuple(grads) == needs
        for name, grad in grads.items():
            context.check(name, grad, truth[name], bounds.get(name))


def check_pool(problem: Pool, target: Target | None = None) -> None:
    x, g = kt.integers(problem.in_shape, 0), kt.integers(problem.out_shape, 1)
    out, winners = reference.pool(problem, x)
    mean = problem.kind == "mean"
    saved = {}
    for *layouts, save in itertools.product(LAYOUTS, LAYOUTS, (False, True)):
        results, context = kt.pool_forward(problem, x, tuple(layouts), save, target)
        context.check("out", results["out"], out, kt.rounded(out) if mean else None)
        if "winners" in results:
            kt.winners_agree(context, results["winners"], winners)
        saved = results
    grad = reference.pool_grad(problem, g, winners)
    bound = None
    if mean:  # the shares of a negative divisor are as large as those of a positive one
        windows = problem.rows.size * problem.cols.size
        divisor = problem.divisor_override
        sign = -1 if divisor is not None and divisor < 0 else 1
        sizes = sign * reference.pool_grad(problem, np.abs(g), winners)
        bound = kt.FLOAT32.error_bound(windows, sizes)
    for layouts in itertools.product(LAYOUTS, LAYOUTS):
        gx, context = kt.pool_backward(problem, g, saved, layouts, target)
        context.check("gx", gx, grad, bound)


def biased(case: Case) -> Block:
    return Block(case.conv, (Bias(),))


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_convolutions(case: Case) -> None:
    check_forward(biased(case))
    check_backward(biased(case))


@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_convolutions_that_stand_for_gradients(case: Case) -> None:
    check_forward(Block(case.conv))


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_blocks(case: Case) -> None:
    block = case.block
    if not kt.is_covered(block):
        with pytest.raises(Unsupported, match="negative slope"):
            compiler.forward(block, NCHW, (1, 1, 1, 1), NCHW)
        return
    check_forward(block)
    if kt.is_trainable(block):
        check_backward(block)
        return
    with pytest.raises(Unsupported, match="gradient of a"):
        compiler.backward(block, NCHW, NCHW, (1, 1, 1, 1), NCHW, NCHW, ("x",))


@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pools(case: Case) -> None:
    check_pool(case.pool)


@pytest.mark.parametrize("step", ["add", "max 2x2", "mean 2x2"])
def test_steps_that_cut_across_phases_are_refused(step: str) -> None:
    """A base dilation computes its outputs phase by phase: no place for a residual or a pool."""
    problem = parse(f"conv n1 c3x4x5 k4 3x3 b2 p1 | bias | {step}")
    with pytest.raises(Unsupported, match="base dilation"):
        compiler.forward(problem, NCHW, (27, 9, 3, 1), NCHW)


# Gradients of some inputs only: their programs leave steps out.
SUBSETS = (
    "conv n2 c3x7x6 k19 3x3 p1 | bias | add",
    "conv n2 c3x6x6 k17 3x3 s2 | bias | add | relu",
    "conv n2 c8x6x6 k8 3x3 p1 g8 | add | bias | relu | max 2x2",
    "conv n1 c6x7x7 k9 3x3 p1 g3 | bias | add | leaky_relu(0.5) | mean 3x3 s2 p1 exclude_pad",
)


@pytest.mark.parametrize("line", SUBSETS)
def test_any_subset_of_gradients(line: str) -> None:
    problem = parse(line)
    assert isinstance(problem, Block)
    names = kt.needed(problem)
    assert names == ("x", "w", "bias", "residual")
    for count in range(1, len(names)):
        for needs in itertools.combinations(names, count):
            check_backward(problem, ways=FEW_BACKWARD, needs=needs)


# Large enough that every loop of a kernel turns: whole register tiles, several blocks of channels,
# bands of rows, chunks of the batch; and more than one thread.
LAYERS = (
    "conv n1 c1x28x28 k32 3x3 p1 | bias | relu | max 2x2",
    "conv n3 c32x14x14 k64 3x3 p1 | bias | relu | max 2x2",
    "conv n1 c3x57x61 k64 7x7 s2 p3 | bias | relu | max 3x3 s2 p1",
    "conv n1 c64x29x27 k96 3x3 p1 | bias | add | relu",
    "conv n1 c128x14x14 k130 3x3 p1 | bias",
    "conv n1 c64x28x28 k256 1x1 | bias",
    "conv n2 c96x28x28 k96 3x3 s2 p1 g96 | bias | leaky_relu(0.5)",
    "conv n2 c16x20x41 k48 5x3 d2 p4,4,2,2 g2 | bias",
    "conv n40 c2x9x9 k16 3x3 | bias | relu | max 2x2",
)


@pytest.mark.slow
@pytest.mark.parametrize("line", LAYERS)
def test_layers_of_real_size(line: str) -> None:
    problem = parse(line)
    assert isinstance(problem, Block)
    inputs = kt.block_inputs(problem)
    truth = reference.block(problem, **kt.operands(inputs))
    grads = reference.block_grad(problem, inputs["grad"], **kt.operands(inputs))
    for threads in (1, 2):
        saved, context = kt.forward(problem, inputs, (NCHW, NCHW, NHWC), True, None, threads)
        context.check("out", saved["out"], truth.out)
        needs = kt.needed(problem)
        ours, context = kt.backward(problem, inputs, saved, needs, (NCHW,) * 5, None, threads)
        for name, grad in ours.items():
            context.check(name, grad, grads[name])


@pytest.mark.parametrize(
    "line", ["max n1 c19x18x18 17x17 s4 p8", "max n1 c3x40x9 257x1 s1 p128,128,0,0"]
)
def test_windows_of_more_taps_than_a_byte_counts(line: str) -> None:
    problem = parse(line)
    assert isinstance(problem, Pool)
    check_pool(problem)


def test_sums_are_rounded_as_float32_sums_are() -> None:
    problem = parse("conv n2 c19x8x8 k33 3x3 p1 | bias")
    assert isinstance(problem, Block)
    inputs = kt.block_inputs(problem, kt.normals)
    x, w, bias, g = (inputs[n] for n in ("x", "w", "bias", "grad"))
    conv = problem.conv
    out, context = kt.forward(problem, inputs)
    size = reference.convolution(conv, np.abs(x), np.abs(w), np.abs(bias))
    truth = reference.block(problem, x, w, bias).out
    context.check("out", out["out"], truth, kt.FLOAT32.error_bound(9 * 19 + 1, size))
    grads, context = kt.backward(problem, inputs, out, ("x", "w", "bias"))
    true = reference.block_grad(problem, g, x, w, bias)
    g = np.abs(g)
    sizes = {
        "x": (9 * 33, reference.convolution_grad_input(conv, g, np.abs(w))),
        "w": (2 * 8 * 8, reference.convolution_grad_weight(conv, g, np.abs(x))),
        "bias": (2 * 8 * 8, g.sum(axis=(0, 2, 3))),
    }
    for name, (terms, size) in sizes.items():
        context.check(name, grads[name], true[name], kt.FLOAT32.error_bound(terms, size))


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(blocks().map(kt.with_exact_slopes).filter(kt.is_covered))
def test_blocks_of_any_shape(problem: Block) -> None:
    check_forward(problem, ways=FEW_FORWARD)
    if kt.is_trainable(problem):
        check_backward(problem, ways=FEW_BACKWARD)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(pools())
def test_pools_of_any_shape(problem: Pool) -> None:
    check_pool(problem)


# ------------------------------------------------------------------------- the other targets

# Every seventh case, and those whose names below meet code of their own.
ELSEWHERE = (
    *(biased(case) for case in CONVS[::7]),
    *(case.block for case in BLOCKS[::7] if kt.is_covered(case.block)),
    *(Block(case.conv) for case in SPREAD[::7]),
    parse("conv n1 c19x7x7 k19 3x3 s2 p1 g19 | bias | relu"),
    parse("conv n1 c33x5x5 k37 3x3 p1 | bias | leaky_relu(0.5)"),
    parse("conv n2 c3x8x8 k19 3x3 p1 | bias | relu | max 2x2"),
    parse("conv n2 c3x8x8 k19 3x3 p1 | bias | relu | mean 3x3 s2 p1 exclude_pad"),
)


@pytest.mark.parametrize("target", kt.OTHERS, ids=lambda t: t.name)
@pytest.mark.parametrize("problem", ELSEWHERE, ids=str)
def test_blocks_on_other_targets(problem: Block, target: Target) -> None:
    check_forward(problem, target, FEW_FORWARD)
    if kt.is_trainable(problem):
        check_backward(problem, target, FEW_BACKWARD)


@pytest.mark.parametrize("target", kt.OTHERS, ids=lambda t: t.name)
@pytest.mark.parametrize("case", (*POOLS[::6], *(c for c in POOLS if "c19" in c.line)), ids=str)
def test_pools_on_other_targets(case: Case, target: Target) -> None:
    check_pool(case.pool, target)


def test_the_table_of_targets() -> None:
    assert [t.name for t in kt.ROWS] == [t.name for t in (host(), *kt.OTHERS)]
    assert kt.ROWS[-1].name == "generic"  # the last row runs everywhere
    for target in kt.ROWS:
        assert named(target.name) is target
    with pytest.raises(ValueError, match="'sse9' is none of avx512, avx2, generic"):
        named("sse9")


def test_the_table_holds_every_step() -> None:
    """What this file cannot have missed: each kind of step is in the table, alone or in a row."""
    kinds = {type(step) for case in BLOCKS for step in case.block.epilogue}
    assert {Bias, Affine, Add, Act} < kinds
