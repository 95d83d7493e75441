"""The reference's pools against torch in float64: maxima with their winners, means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import POOLS, Case
from hypothesis import given
from hypothesis import strategies as st
from strategies import pools
from torch_oracle import (
    close,
    equal,
    integers,
    normals,
    tensor,
    torch_grads,
    torch_max,
    torch_mean,
)

from neocog import reference
from neocog.errors import InvalidProblem
from neocog.problem import Pool, parse, pooling


def check_pool(problem: Pool, fill: Any, same: Any) -> None:
    x, g = fill(problem.in_shape, 0), fill(problem.out_shape, 1)
    xt = tensor(x)
    out, winners = reference.pool(problem, x)
    if problem.kind == "mean":
        assert winners is None
        theirs = torch_mean(problem, xt)
    else:
        assert winners is not None
        theirs, torchs = torch_max(problem, xt)
        # torch gives an index outside the map to a window that covers padding only.
        empty = winners == -1
        equal(winners[~empty], torchs[~empty])
        assert np.all(out[empty] == -np.inf)
        if empty.any():
            assert problem.rows.dilation > 1 or problem.cols.dilation > 1
            equal(out, theirs)
            return
    same(out, theirs)
    (grad,) = torch_grads(theirs, g, xt)
    same(reference.pool_grad(problem, g, winners), grad)


@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pools_of_the_table(case: Case) -> None:
    check_pool(case.pool, normals, close)
    check_pool(case.pool, integers, equal if case.pool.kind == "max" else close)


@given(pools(symmetric=True))
def test_pools_of_any_shape(problem: Pool) -> None:
    check_pool(problem, integers, equal if problem.kind == "max" else close)


@given(pools())
def test_pools_padded_differently_at_the_two_ends(problem: Pool) -> None:
    """Against the windows cut out of the padded map one by one, as the numbers to reduce."""
    x = normals(problem.in_shape, 0)
    out, _ = reference.pool(problem, x)
    rows, cols = problem.rows, problem.cols
    fill = -np.inf if problem.kind == "max" else 0.0
    frame = ((0, 0), (0, 0), (rows.low, rows.high), (cols.low, cols.high))
    padded = np.pad(x, frame, constant_values=fill)
    inside = np.pad(np.ones(x.shape[2:]), frame[2:])
    for oh, ow in np.ndindex(*out.shape[2:]):
        across = slice(oh * rows.stride, oh * rows.stride + rows.span, rows.dilation)
        along = slice(ow * cols.stride, ow * cols.stride + cols.span, cols.dilation)
        cut = padded[:, :, across, along]
        if problem.kind == "max":
            equal(out[..., oh, ow], cut.max(axis=(2, 3)))
            continue
        counted = cut[0, 0].size if problem.batch else inside[across, along].size
        if not problem.count_include_pad:
            counted = int(inside[across, along].sum())
        close(out[..., oh, ow], cut.sum(axis=(2, 3)) / (problem.divisor_override or counted))


def test_equal_maxima_the_first_wins() -> None:
    problem = Pool.of(pooling("max", 3), 1, 1, 3, 3)
    x = np.array([[[[1.0, 5, 2], [5, 5, 0], [5, 1, 1]]]])
    out, winners = reference.pool(problem, x)
    assert (out.item(), winners.item()) == (5, 1)  # type: ignore
    grad = reference.pool_grad(problem, np.array([[[[7.0]]]]), winners)
    assert grad[0, 0].tolist() == [[0, 7, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    "values",
    [
        [math.nan, 1, 2, 3],
        [1, math.nan, 3, 2],
        [math.nan, 1, math.nan, 2],
        [math.inf, math.nan, math.inf, 1],
        [-math.inf] * 4,
        [-math.inf, -math.inf, -math.inf, -1],
        [-math.inf, math.nan, -math.inf, -math.inf],
        [math.inf, math.inf, 1, math.inf],
        [0.0, -0.0, 0.0, -0.0],
        [-1, -1, -2, -1],
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [0, 1])
def test_nan_and_infinities_as_in_torch(values: list[float], padding: int) -> None:
    problem = Pool.of(pooling("max", 2, stride=1, padding=padding), 1, 1, 2, 2)
    x = np.array(values, dtype=np.float64).reshape(1, 1, 2, 2)
    out, winners = reference.pool(problem, x)
    theirs, torchs = torch_max(problem, torch.tensor(x))
    equal(out, theirs)
    assert winners is not None
    equal(winners, torchs)


@given(pools(symmetric=True).filter(lambda pool: pool.kind == "max" and pool.batch > 0), st.data())
def test_maxima_of_ill_behaved_maps(problem: Pool, data: st.DataObject) -> None:
    """NaN, infinities and ties anywhere in maps of any shape."""
    value = st.sampled_from([math.nan, -math.inf, math.inf, 0.0, 1.0])
    size = math.prod(problem.in_shape)
    x = np.array(data.draw(st.lists(value, min_size=size, max_size=size)))
    x = x.reshape(problem.in_shape)
    out, winners = reference.pool(problem, x)
    theirs, torchs = torch_max(problem, torch.tensor(x))
    equal(out, theirs)
    assert winners is not None
    met = winners != -1
    equal(winners[met], torchs[met])


def test_a_window_on_padding_only_has_no_winner() -> None:
    # Taps at -1 and 2 of a map of 2: both miss it.
    problem = parse("max n1 c1x2x2 2x2 s1 p1 d3")
    assert isinstance(problem, Pool)
    out, winners = reference.pool(problem, np.ones((1, 1, 2, 2)))
    assert (out.item(), winners.item()) == (-math.inf, -1)  # type: ignore
    assert not reference.pool_grad(problem, np.ones((1, 1, 1, 1)), winners).any()


def test_the_mean_of_a_nan_is_nan() -> None:
    problem = Pool.of(pooling("mean", 2), 1, 1, 2, 4)
    out, _ = reference.pool(problem, np.array([[[[math.nan, 1, 1, 2], [1, 1, 3, 4]]]]))
    equal(out, np.array([[[[math.nan, 2.5]]]]))


def test_the_gradient_of_a_maximum_needs_the_winners() -> None:
    problem = Pool.of(pooling("max", 2), 1, 1, 2, 2)
    with pytest.raises(InvalidProblem, match="max n1 c1x2x2 .* needs the winners"):
        reference.pool_grad(problem, np.ones((1, 1, 1, 1)))
