"""The rows of the tables: activations against torch, number formats against their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch_oracle import (
    equal,
    tensor,
    torch_grads,
)

from neocog.activations import ACTIVATIONS
from neocog.dtypes import FLOAT32
from neocog.problem import Act

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
