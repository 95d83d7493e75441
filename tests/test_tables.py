"""The rows of the tables: activations against torch, number formats against their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_oracle import close, equal, tensor, torch_activation, torch_grads

from neocog.activations import ACTIVATIONS
from neocog.dtypes import FLOAT32
from neocog.problem import Act

SPECIAL = np.array([math.nan, -math.inf, -2.0, -0.0, 0.0, 3.0, math.inf])
ACTS = [
    *(Act(name) for name, row in ACTIVATIONS.items() if not row.takes_slope),
    *(Act("leaky_relu", s) for s in (0.0, 0.25, 1.0, 2.0, -0.5)),
]
SWEEP = np.concatenate([[-800.0, -30.0], np.linspace(-8, 8, 1025), [30.0, 800.0]])
UNSETTLED = ("relu6", "hardswish", "hardsigmoid")
"""Of NaN torch has derivatives of 0, 1 and NaN, by data type and by the length of the tensor."""
EXACT = ("identity", "relu", "leaky_relu", "relu6")


def torchs(act: Act, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An activation and its derivative as torch has them."""
    x = tensor(values)
    out = torch_activation(act, x)
    (grad,) = torch_grads(out, np.ones(values.shape), x)
    return out.detach().numpy(), grad


def test_every_activation_is_tested() -> None:
    assert {act.name for act in ACTS} == set(ACTIVATIONS)


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_activations_and_derivatives_are_torchs(act: Act) -> None:
    row = ACTIVATIONS[act.name]
    check = equal if act.name in EXACT else close
    for values in (SWEEP, SPECIAL):
        theirs, grad = torchs(act, values)
        with np.errstate(invalid="ignore"):  # 0 times infinity, as torch has it
            out, derivative = row.forward(values, act.slope), row.derivative(values, act.slope)
        check(out, theirs)
        known = ~np.isnan(values) if act.name in UNSETTLED else np.full(values.shape, True)
        check(derivative[known], grad[known])


@pytest.mark.parametrize("act", [act for act in ACTS if act.slope >= 0], ids=str)
def test_the_result_tells_the_derivative_or_the_row_says_not(act: Act) -> None:
    row = ACTIVATIONS[act.name]
    out, derivative = row.forward(SWEEP, act.slope), row.derivative(SWEEP, act.slope)
    if row.derivative_from_output is not None:
        # From the result near a bound, such as 1 - 1e-16, little is left of the derivative.
        told = row.derivative_from_output(out, act.slope)
        np.testing.assert_allclose(told, derivative, rtol=1e-9, atol=1e-15)
        return
    # Two inputs, one result, two derivatives: on both sides of the minimum.
    lowest = int(np.argmin(out))
    left, right = out[:lowest], out[lowest:]
    level = out[lowest] / 2
    inputs = SWEEP[[np.argmin(np.abs(left - level)), lowest + np.argmin(np.abs(right - level))]]
    slopes = row.derivative(inputs, act.slope)
    assert slopes[0] < -0.01 and slopes[1] > 0.01


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_monotone_is_what_the_function_is(act: Act) -> None:
    """Only then may a maximum be taken before the activation."""
    rises = np.diff(ACTIVATIONS[act.name].forward(SWEEP, act.slope)) >= 0
    assert act.monotone == rises.all()


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
