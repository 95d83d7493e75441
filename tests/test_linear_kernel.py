"""The fully connected kernel against float64, on every target, in memory full of NaN."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import kernel_tools as kt
import numpy as np
import pytest
import torch
from torch_oracle import torch_activation

from neocog.activations import ACTIVATIONS
from neocog.cpu import linear
from neocog.cpu.runtime import Kernel
from neocog.program import Program
from neocog.steps import Act, Affine, Bias, Step
from neocog.target import Target

GAP = 5
"""Elements between rows, which belong to nobody."""


@functools.cache
def compiled(target: Target, epilogue: tuple[Step, ...] = ()) -> Kernel:
    return linear.emit(linear.LinearPlan(target, epilogue))


@dataclass
class Case:
    """Matrices in the middle of NaN: (batch, inputs), (outputs, inputs), vectors (outputs)."""

    x: np.ndarray
    w: np.ndarray
    vectors: dict[str, np.ndarray]

    @staticmethod
    def of(batch: int, outputs: int, inputs: int, fill=kt.integers) -> Case:
        names = ("bias", "scale", "shift")
        vectors = {name: fill((outputs,), i) for i, name in enumerate(names)}
        return Case(fill((batch, inputs), 7), fill((outputs, inputs), 8), vectors)


def framed(matrix: np.ndarray) -> torch.Tensor:
    """float32 with a NaN row before and after, and GAP NaN behind each row."""
    rows, cols = matrix.shape
    made = torch.full((rows + 2, cols + GAP), math.nan)
    made[1 : rows + 1, :cols] = torch.tensor(matrix, dtype=torch.float32)
    return made


def run(target: Target, case: Case, epilogue: tuple[Step, ...] = (), threads: int = 1):
    """(N, K) results; nothing around them was written."""
    kernel = compiled(target, epilogue)
    (batch, inputs), outputs = case.x.shape, len(case.w)
    buffers = {"x": framed(case.x), "w": framed(case.w)}
    buffers["out"] = torch.full((batch + 2, outputs + GAP), math.nan)
    for name in kernel.fields:
        if name[:-1] in case.vectors:
            buffers[name[:-1]] = framed(case.vectors[name[:-1]][None])
    program = Program(tuple(buffers))
    places = {n: program.buffer(n) + t.shape[1] for n, t in buffers.items()}
    program.step(
        kernel, -(-outputs // linear.OUTPUTS_PER_ITEM), **places, x_row=inputs + GAP,
        w_row=inputs + GAP, out_row=outputs + GAP, batch=batch, outputs=outputs, inputs=inputs,
    )  # fmt: skip
    program.run(*(t.data_ptr() for t in buffers.values()), threads=threads)
    out = buffers["out"]
    result = out[1 : batch + 1, :outputs].clone()
    out[1 : batch + 1, :outputs] = math.nan
    assert out.isnan().all(), "written outside of the result"
    return result.numpy()


SIZES = [
    *itertools.product((1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13), ((19, 37),)),
    *itertools.product((1, 4), ((1, 1), (1, 19), (16, 16), (17, 512), (33, 513), (10, 1031))),
    (6, (40, 1)),
    (16, (24, 1100)),
    (linear.IMAGES_AT_ONCE, (5, 7)),
    (linear.IMAGES_AT_ONCE + 1, (18, 531)),
    (2 * linear.IMAGES_AT_ONCE + 13, (3, 2)),
]


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_sums_of_whole_numbers_are_exact(target: Target) -> None:
    for batch, (outputs, inputs) in SIZES:
        case = Case.of(batch, outputs, inputs)
        np.testing.assert_array_equal(
            run(target, case), case.x @ case.w.T, err_msg=f"{batch} x {outputs} x {inputs}"
        )


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_an_empty_batch_is_left_alone_and_no_inputs_sum_to_zero(target: Target) -> None:
    assert run(target, Case.of(0, 19, 7)).shape == (0, 19)
    bias = Case.of(3, 19, 0)
    np.testing.assert_array_equal(
        run(target, bias, (Bias(),)), np.broadcast_to(bias.vectors["bias"], (3, 19))
    )


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_rounding_stays_small_over_many_inputs(target: Target) -> None:
    case = Case.of(2, 5, 25088, kt.normals)
    error = np.abs(run(target, case) - case.x @ case.w.T)
    bound = np.abs(case.x) @ np.abs(case.w.T)
    # Twice 2**-24 for each of the additions a product passes: chunk, chunks, lanes.
    passes = linear.CHUNK // target.lanes + 25088 // linear.CHUNK + target.lanes
    assert (error <= bound * passes * 2**-23).all()
    assert error.max() <= 5e-6 * np.abs(case.x @ case.w.T).max()


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_steps_follow_in_order(target: Target, name: str) -> None:
    act = Act(name, 0.25 if ACTIVATIONS[name].takes_slope else 0.0)
    case = Case.of(5, 19, 3)
    product, vectors = case.x @ case.w.T, case.vectors
    forward = ACTIVATIONS[name].forward
    expected = forward(product + vectors["bias"], act.slope)
    ours = run(target, case, (Bias(), act))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)
    expected = vectors["scale"] * forward(product, act.slope) + vectors["shift"]
    ours = run(target, case, (act, Affine()))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_nan_and_infinities_reach_their_results_and_no_others(target: Target) -> None:
    hostile = (math.nan, math.inf, -math.inf)
    for place, value in itertools.product((0, 18, 36), hostile):
        case = Case.of(7, 19, 37)
        case.x[4, place], case.w[:, place] = value, 2.0
        np.testing.assert_array_equal(run(target, case), case.x @ case.w.T)
        case = Case.of(7, 19, 37)
        case.w[18, place], case.x[:, place] = value, 2.0
        products = torch.tensor(case.x @ case.w.T, dtype=torch.float32)
        np.testing.assert_array_equal(
            run(target, case, (Act("relu"),)), torch_activation(Act("relu"), products).numpy()
        )


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_neither_threads_nor_the_rest_of_the_batch_change_a_bit(target: Target) -> None:
    case = Case.of(13, 83, 1031, kt.normals)
    together = run(target, case)
    np.testing.assert_array_equal(run(target, case, threads=2), together)
    for batch in (1, 2, 5):
        alone = run(target, replace(case, x=case.x[:batch]))
        np.testing.assert_array_equal(alone, together[:batch])
