"""Batch norm while training: statistics and gradients inside programs, against float64 NumPy.

Where sums of small whole numbers are exact, and divided by powers of two, results are compared with
``==``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import kernel_tools as kt
import numpy as np
import pytest
import torch
from batch_norms import (
    DENSE,
    GAPS,
    PIECEWISE,
    Problem,
    Wanted,
    act_of,
    our_gradients,
    our_statistics,
    statistics,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_oracle import torch_activation

from neocog.activations import ACTIVATIONS
from neocog.cpu import batch_norm as bn
from neocog.dtypes import FLOAT64
from neocog.maps import Halo
from neocog.problem import Act
from neocog.target import Target

LEARNED = [row.name for row in ACTIVATIONS.values() if row.derivative_from_output]

every_target = pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("batch", [True, False])
def test_the_definitions_are_pytorchs(name: str, batch: bool) -> None:
    shape, eps, act = (3, 4, 5, 6), 1e-3, act_of(name)
    y, g, residual = (torch.tensor(kt.normals(shape, i)) for i in range(3))
    weight, bias, mean = (torch.tensor(kt.normals(shape[1:2], i)) for i in range(3, 6))
    var, batch_mean, batch_var = mean**2 + 0.5, torch.zeros(4), torch.zeros(4)
    given = [t.clone().requires_grad_() for t in (y, weight, bias, residual)]
    moved = (batch_mean.double(), batch_var.double()) if batch else (mean, var)
    z = torch.nn.functional.batch_norm(given[0], *moved, *given[1:3], batch, 1.0, eps)
    z = torch_activation(act, z + given[3])
    theirs = torch.autograd.grad(z, given, g)
    moments = None if batch else (mean.numpy(), var.numpy())
    found = statistics(y.numpy(), weight.numpy(), bias.numpy(), eps, moments)
    problem = Problem(y.numpy(), g.numpy(), found, act, batch, residual.numpy())
    np.testing.assert_allclose(problem.z, z.detach(), rtol=1e-12, atol=1e-12)
    for key, grad in zip(("out", "gweight", "gbias", "residual"), theirs, strict=True):
        np.testing.assert_allclose(problem.gradients()[key], grad, rtol=1e-11, atol=1e-11)
    for row, value in zip((bn.MEAN, bn.VARIANCE), moved, strict=True):
        np.testing.assert_allclose(found[row], value, rtol=1e-12)


# ----------------------------------------------------------------------------------- statistics

SHAPES = (
    (2, 1, 3, 5), (2, 3, 4, 8), (1, 16, 1, 1), (3, 19, 1, 2), (1, 33, 65, 1), (2, 64, 8, 8),
    (3, 67, 7, 11), (1, 5, 3, 130), (2, 18, 53, 61), (70, 4, 3, 2),
)  # fmt: skip
"""Channels that fill no vector, lines of one pixel and of many, more lines than work items."""


@every_target
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_a_batch(target: Target, shape: tuple[int, ...]) -> None:
    """Sums of whole numbers are exact: one division, one root, and one rounding are left."""
    y = kt.integers(shape, 0)
    weight, bias = (kt.integers(shape[1:2], i) for i in (1, 2))
    for lies in (DENSE, GAPS, (Halo(), 5)):
        for w, b in ((weight, bias), (None, bias), (weight, None), (None, None)):
            with np.errstate(invalid="ignore"):
                expected = statistics(y, w, b, 1e-3)
            ours = our_statistics(target, y, w, b, lies=lies)
            np.testing.assert_allclose(ours, expected, rtol=2.0**-23, atol=1e-12)


def test_one_value_per_channel() -> None:
    """It is its own mean; of its variance among others nothing is known."""
    y = kt.normals((1, 19, 1, 1), 0)
    ours = our_statistics(kt.host(), y)
    np.testing.assert_array_equal(ours[bn.MEAN], y.reshape(-1))
    np.testing.assert_allclose(ours[bn.RECIPROCAL], 1e-3**-0.5, rtol=2.0**-23)
    assert np.isnan(ours[bn.VARIANCE]).all()


@every_target
@pytest.mark.parametrize("channels", [1, 3, 16, 19, 67])
def test_statistics_from_given_moments(target: Target, channels: int) -> None:
    mean, weight, bias = (kt.normals((channels,), i) for i in range(3))
    moments = mean, np.float32(mean**2).astype(np.float64)
    y = np.zeros((1, channels, 1, 1))
    for w, b in ((weight, bias), (None, bias), (weight, None), (None, None)):
        expected = statistics(y, w, b, 1e-3, moments)
        ours = our_statistics(target, y, w, b, moments=moments)
        np.testing.assert_allclose(ours, expected, rtol=2.0**-23, atol=1e-12)


@pytest.mark.parametrize("centre", [0.0, 1e3, -1e6])
@pytest.mark.parametrize("spread", [1e-6, 1.0])
def test_a_large_mean_and_a_small_variance(centre: float, spread: float) -> None:
    """The variance is as good as that of the distances, however far from 0 the values are."""
    shape = (3, 19, 20, 31)
    y = np.float32(centre + spread * kt.normals(shape, 0)).astype(np.float64)
    expected = statistics(y, None, None, 1e-12)
    ours = our_statistics(kt.host(), y, eps=1e-12)
    distance = y - y[:1, :, :1, :1]
    pixels = y.size // shape[1]
    squares = FLOAT64.error_bound(pixels + 2, (distance**2).sum((0, 2, 3)) / pixels)
    sums = FLOAT64.error_bound(pixels, np.abs(distance).sum((0, 2, 3)) / pixels)
    wrong = np.abs(ours - expected)
    moved = np.abs(distance.mean((0, 2, 3)))
    bound = 1.01 * (squares + 2 * moved * sums) + 2.0**-24 * expected[bn.VARIANCE]
    assert (wrong[bn.VARIANCE] <= bound).all()
    assert (wrong[bn.MEAN] <= sums + 2.0**-24 * np.abs(expected[bn.MEAN])).all()


def test_a_channel_whose_values_are_all_alike() -> None:
    """Its variance is 0, not the rounding of a difference."""
    values = np.float32([0.1, -3e7, 1e-30, 0.0, 1 / 3]).astype(np.float64)
    y = np.broadcast_to(values[:, None, None], (3, 5, 23, 29))
    ours = our_statistics(kt.host(), y)
    np.testing.assert_array_equal(ours[bn.MEAN], values)
    np.testing.assert_array_equal(ours[bn.VARIANCE], 0)


def hostile(name: str) -> kt.Array:
    """(N, C, H, W) on which sums in float32, or around a badly chosen value, cancel."""
    y = np.random.default_rng(0).standard_normal((4, 5, 32, 64))
    bright = 251 + np.tanh(y)
    match name:
        case "outlier first":
            y[0, :, 0, 0] = 1e4, -1e6, 1e8, 1e15, 1e18
        case "outlier elsewhere":
            y[2, :, 3, 5] = 1e4, -1e6, 1e8, 1e15, 1e18
        case "outliers that cancel":
            y[0, :, 0, 0] = 1e4, -1e6, 1e8, 1e15, 1e18
            y[3, :, 1, 7] = -y[0, :, 0, 0]
        case "one of each line":
            y[..., ::16] += 1e6
        case "black first":
            y = bright
            y[0, :, 0, 0] = 0
        case "black rows":
            y = bright
            y[0, :, :2] = 0
        case "a few black":
            y = bright
            y[1, :, 5, ::9] = 0
        case "one value, and one other":
            y = np.full_like(y, 1 / 3)
            y[0, :, 0, 0] = 1e4, -1e5, 1 / 3 + 2.0**-20, 0, 1e18
        case "nearly alike":
            y = 1e4 + 2.0**-9 * np.sign(y)
        case "tiny":
            y *= 1e-30
        case "large":
            y *= 1e17
    return np.float32(y).astype(np.float64)


HOSTILE = (
    "outlier first", "outlier elsewhere", "outliers that cancel", "one of each line", "black first",
    "black rows", "a few black", "one value, and one other", "nearly alike", "tiny", "large",
)  # fmt: skip


@every_target
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("lies", [DENSE, GAPS], ids=["dense", "gaps"])
def test_no_values_make_sums_cancel(target: Target, name: str, lies: tuple[Halo, int]) -> None:
    """Means and variances are the true ones, rounded once.

    In float64 the variance is off by about (distance of the first value / standard deviation)^2
    roundings of each term, that is N at most: N^2 * 2^-53 is 2^-27 here. The mean is off by N
    roundings of sums of distances, of which the largest is N of float64's.
    """
    y = hostile(name)
    ours, expected = our_statistics(target, y, lies=lies), statistics(y, None, None, 1e-3)
    np.testing.assert_allclose(ours[bn.VARIANCE], expected[bn.VARIANCE], rtol=2.0**-23, atol=2e-45)
    pixels = y.size // y.shape[1]
    first = np.abs(y[0, :, 0, 0]) + np.abs(y).max((0, 2, 3))
    lost = FLOAT64.error_bound(pixels, first)
    assert (np.abs(ours - expected)[bn.MEAN] <= 2.0**-24 * np.abs(expected[bn.MEAN]) + lost).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 1, 0, 0), (1, 1, 2, 3)], ids=["first", "later"])
def test_what_is_not_finite_is_so_in_its_channel_alone(value: float, place: tuple) -> None:
    y = kt.integers((2, 19, 4, 5), 0)
    y[place] = value
    norm = torch.nn.BatchNorm2d(19, 1e-3, momentum=1.0)
    norm(kt.tensor(y))
    ours = our_statistics(kt.host(), y)
    for row, theirs in ((bn.MEAN, norm.running_mean), (bn.VARIANCE, norm.running_var)):
        np.testing.assert_allclose(ours[row], theirs, rtol=1e-6, atol=1e-7)
        assert not np.isfinite(ours[row, 1])
    assert np.isfinite(np.delete(ours, 1, axis=1)).all()
    assert np.isnan(ours[[bn.RECIPROCAL, bn.SCALE, bn.SHIFT], 1]).all()


# ------------------------------------------------------------------------------------ gradients


def whole_numbers(shape: tuple[int, ...], act: Act, batch: bool) -> Problem:
    """Everything is exact: means of 0 and scales of powers of two."""
    channels = shape[1]
    rows = np.zeros((bn.STATISTICS, channels))
    rows[bn.RECIPROCAL] = 1.0
    rows[bn.SCALE] = np.resize([1.0, -2.0, 0.0, 2.0], channels)
    rows[bn.SHIFT] = np.resize([0.0, 2.0, -1.0], channels)
    rows[bn.VARIANCE] = math.nan  # nothing of a gradient
    return Problem(kt.integers(shape, 0), kt.integers(shape, 1), rows, act, batch,
                   start=kt.integers(shape, 2))  # fmt: skip


def check_exactly(target: Target, problem: Problem, wanted: Wanted) -> None:
    start = problem.start if wanted.residual == "add" else None
    expected = replace(problem, start=start).gradients()
    for name, ours in our_gradients(target, problem, wanted).items():
        np.testing.assert_array_equal(ours, expected[name], f"{name} {wanted}")


POWERS = (
    (1, 1, 1, 1), (2, 3, 4, 8), (4, 19, 1, 16), (1, 16, 2, 64), (8, 67, 8, 4), (2, 6, 64, 64),
    (128, 4, 2, 1), (2, 34, 1, 128),
)  # fmt: skip
"""Powers of two pixels: their means are exact."""


@every_target
@pytest.mark.parametrize("name", PIECEWISE)
@pytest.mark.parametrize("shape", POWERS, ids=str)
def test_gradients(target: Target, name: str, shape: tuple[int, ...]) -> None:
    """Of y, weight, bias and residual at once, in maps that lie in every way."""
    for lies, reads_z in ((DENSE, False), (GAPS, True)):
        problem = whole_numbers(shape, act_of(name), batch=True)
        modes = ("write", "add") if reads_z else ("",)
        if reads_z:
            problem.residual = kt.integers(shape, 3)
        for mode in modes:
            places = dict.fromkeys(("g", "y", "z", "out", "residual"), lies)
            check_exactly(target, problem, Wanted(residual=mode, reads_z=reads_z, lies=places))


@every_target
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_where_statistics_were_given(target: Target, shape: tuple[int, ...]) -> None:
    """Nothing is taken off the gradient, which is exact for any number of pixels."""
    problem = whole_numbers(shape, act_of("relu6"), batch=False)
    for lies in (DENSE, GAPS, (Halo(), 5)):
        check_exactly(target, problem, Wanted(lies=dict.fromkeys(("g", "y", "out"), lies)))


@pytest.mark.parametrize("odd", ["g", "y", "z", "out", "residual"])
def test_one_map_lies_in_another_way(odd: str) -> None:
    for shape in ((2, 19, 4, 8), (1, 6, 2, 128)):
        problem = whole_numbers(shape, act_of("relu"), batch=True)
        problem.residual = kt.integers(shape, 3)
        for lies in (GAPS, (Halo(), 5), (Halo(0, 1, 0, 0), 0), (Halo(0, 0, 0, 2), 0)):
            wanted = Wanted(residual="add", reads_z=True, lies={odd: lies})
            check_exactly(kt.host(), problem, wanted)


@every_target
@pytest.mark.parametrize("channels", [3, 19, 64, 67])
def test_gradients_in_place(target: Target, channels: int) -> None:
    """The gradient of y may be written over that of z."""
    for lies in (DENSE, GAPS):
        for residual in ("", "write", "add"):
            problem = whole_numbers((2, channels, 4, 8), act_of("relu"), batch=True)
            if residual:
                problem.residual = kt.integers(problem.y.shape, 3)
            wanted = Wanted(residual=residual, reads_z=bool(residual), in_place=True)
            wanted.lies["g"] = lies
            check_exactly(target, problem, wanted)


@every_target
@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize("vectors", [(), ("gweight",), ("gbias",), ("gweight", "gbias")], ids=str)
def test_only_what_is_wanted(target: Target, out: bool, vectors: tuple[str, ...]) -> None:
    for channels in (3, 32):
        problem = whole_numbers((2, channels, 4, 8), act_of("relu"), batch=True)
        check_exactly(target, problem, Wanted(out, vectors))


def test_the_result_is_not_read_where_there_is_no_activation() -> None:
    problem = whole_numbers((2, 19, 4, 8), act_of("identity"), batch=True)
    wanted = Wanted(reads_z=True)
    problem = replace(problem, residual=np.full(problem.y.shape, math.nan))
    expected = replace(problem, residual=None).gradients()
    for name, ours in our_gradients(kt.host(), problem, wanted).items():
        np.testing.assert_array_equal(ours, expected[name])


def away_from_kinks(problem: Problem) -> Problem:
    """No gradient where rounding decides on which side of a kink a value is."""
    before = problem.before[..., None]
    near = (np.abs(before - np.array([0.0, 6.0, -3.0, 3.0])) < 1e-3).any(-1)
    return replace(problem, g=np.where(near, 0.0, problem.g))


def realistic(shape: tuple[int, ...], act: Act, seed: int = 0, centre: float = 0.5) -> Problem:
    """Random numbers, and the statistics of their batch in float32."""
    y = np.float32(kt.normals(shape, seed) + centre).astype(np.float64)
    weight, bias = (kt.normals(shape[1:2], seed + i) for i in (1, 2))
    rows = np.float32(statistics(y, weight, bias, 1e-3)).astype(np.float64)
    return away_from_kinks(Problem(y, kt.normals(shape, seed + 3), rows, act))


def check_within_bounds(target: Target, problem: Problem, wanted: Wanted) -> None:
    start = problem.start if wanted.residual == "add" else None
    truth = replace(problem, start=start)
    expected, bounds = truth.gradients(), truth.bounds()
    for name, ours in our_gradients(target, problem, wanted).items():
        wrong = np.abs(ours - expected[name])
        assert (wrong <= bounds[name]).all(), (name, wanted, (wrong / bounds[name]).max())


@every_target
@pytest.mark.parametrize("name", LEARNED)
def test_gradients_of_random_numbers(target: Target, name: str) -> None:
    for shape in ((3, 19, 7, 11), (2, 18, 53, 61)):
        problem = realistic(shape, act_of(name))
        check_within_bounds(target, problem, Wanted())
        problem.residual, problem.start = kt.normals(shape, 7), kt.normals(shape, 8)
        problem = away_from_kinks(problem)
        lies = dict.fromkeys(("y", "out"), GAPS)
        check_within_bounds(target, problem, Wanted(residual="add", reads_z=True, lies=lies))


@settings(max_examples=60)
@given(
    st.tuples(
        st.integers(1, 4), st.sampled_from([1, 3, 16, 19, 33, 70]), st.integers(1, 12),
        st.integers(1, 80),
    ).filter(lambda shape: shape[0] * shape[2] * shape[3] > 1),
    st.sampled_from(["identity", "relu", "hardsigmoid", "tanh"]),
    st.sampled_from(["", "write", "add"]),
    st.booleans(),
    st.dictionaries(
        st.sampled_from(["g", "y", "z", "out", "residual"]),
        st.tuples(st.builds(Halo, *[st.integers(0, 2)] * 4), st.integers(0, 3)),
    ),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(shape, name, residual, batch, lies, seed) -> None:
    problem = replace(realistic(shape, act_of(name), seed), batch=batch)
    if residual:
        problem.residual, problem.start = kt.normals(shape, seed + 7), kt.normals(shape, seed + 8)
        problem = away_from_kinks(problem)
    wanted = Wanted(residual=residual, reads_z=bool(residual), lies=lies)
    check_within_bounds(kt.host(), problem, wanted)


def test_gradients_far_from_zero() -> None:
    check_within_bounds(kt.host(), realistic((3, 19, 7, 11), act_of("identity"), centre=1e3),
                        Wanted())  # fmt: skip


@every_target
def test_gradients_that_cancel(target: Target) -> None:
    """What is left of large gradients of opposite signs is exact: sums are taken in float64."""
    problem = whole_numbers((2, 19, 16, 64), act_of("identity"), batch=True)
    problem.g[0, :, 0, ::8] = 2.0**40
    problem.g[1, :, 3, ::8] = -(2.0**40)
    problem.y[1, :, 3] = problem.y[0, :, 0]
    for lies in (DENSE, GAPS):
        wanted = Wanted(out=False, lies=dict.fromkeys(("g", "y"), lies))
        check_exactly(target, problem, wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["y", "g"])
@pytest.mark.parametrize("name", ["identity", "relu", "leaky_relu", "sigmoid"])
def test_what_is_not_finite_spreads_as_in_pytorch(value: float, where: str, name: str) -> None:
    shape, act = (2, 19, 4, 5), act_of(name)
    maps = {"y": kt.normals(shape, 0), "g": kt.normals(shape, 1)}
    maps[where][1, 1, 2, 3] = value
    y, norm = kt.tensor(maps["y"]).requires_grad_(), torch.nn.BatchNorm2d(19, 1e-3)
    torch_activation(act, norm(y)).backward(kt.tensor(maps["g"]))
    theirs = {"out": y.grad, "gweight": norm.weight.grad, "gbias": norm.bias.grad}
    ones, zeros = np.ones(19), np.zeros(19)
    rows = our_statistics(kt.host(), maps["y"], ones, zeros)
    problem = Problem(**maps, statistics=rows, act=act)
    for key, ours in our_gradients(kt.host(), problem, Wanted()).items():
        np.testing.assert_allclose(ours, theirs[key], rtol=1e-4, atol=1e-5, err_msg=key)


# -------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("lies", [DENSE, GAPS], ids=["dense", "gaps"])
def test_any_number_of_threads_gives_the_same_bits(lies: tuple[Halo, int]) -> None:
    shape = (2, 18, 53, 61)
    problem = realistic(shape, act_of("relu"))
    places = dict.fromkeys(("g", "y", "out"), lies)
    first = our_gradients(kt.host(), problem, Wanted(lies=places))
    first["statistics"] = our_statistics(kt.host(), problem.y, lies=lies)
    for threads in (2, 3, 5):
        again = our_gradients(kt.host(), problem, Wanted(lies=places, threads=threads))
        again["statistics"] = our_statistics(kt.host(), problem.y, lies=lies, threads=threads)
        for name, values in first.items():
            np.testing.assert_array_equal(values, again[name], name)
