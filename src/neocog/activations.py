"""The activation functions: one row each, the only place to add one.

``slope`` is the slope of ``leaky_relu`` for negative values; the others ignore it. NaN passes
through, and the derivatives at 0 and at NaN are PyTorch's. Where a formula multiplies infinity by
0 (SiLU, GELU and hard-swish of minus infinity), NaN is the result, as in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = Callable[[Array, float], Array]


@dataclass(frozen=True)
class Activation:
    """One row: ``forward(x, slope)`` and its derivative, element by element on NumPy arrays.

    ``derivative`` takes the input of the function and is its definition.
    ``derivative_from_output`` takes the result instead, so that a kernel need not keep the input;
    it needs ``slope >= 0``, for only then does the result tell the sign of the input. None: two
    inputs of different derivatives have the same result.
    ``monotone`` (for ``slope >= 0``): a maximum may be taken before the activation.
    """

    name: str
    formula: str
    monotone: bool
    takes_slope: bool
    forward: Function
    derivative: Function
    derivative_from_output: Function | None


def _one(v: Array, slope: float) -> Array:
    return np.ones_like(v)


def _relu_step(v: Array, slope: float) -> Array:
    # Not `v > 0`: torch lets the gradient through where the value is NaN.
    return np.where(v <= 0, 0.0, 1.0).astype(v.dtype)


def _leaky_step(v: Array, slope: float) -> Array:
    return np.where(v > 0, 1.0, slope).astype(v.dtype)


def _within(low: float, high: float, inside: float) -> Function:
    """``inside`` between the bounds, else 0, as at the bounds themselves and at NaN."""
    return lambda v, slope: np.where((v > low) & (v < high), inside, 0.0).astype(v.dtype)


def _hardsigmoid(x: Array, slope: float) -> Array:
    return np.clip(x + 3, 0, 6) / 6


def _hardswish_derivative(x: Array, slope: float) -> Array:
    inside = x / 3 + 0.5  # NaN where x is
    return np.where(x <= -3, 0.0, np.where(x >= 3, 1.0, inside))


def _sigmoid(x: Array, slope: float = 0.0) -> Array:
    small = np.exp(-np.abs(x))  # at most 1: nothing overflows
    return np.where(x >= 0, 1.0, small) / (1 + small)


def _silu_derivative(x: Array, slope: float) -> Array:
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _normal_below(x: Array) -> Array:
    """The probability that a standard normal variable is less than x."""
    return _erfc(-x / math.sqrt(2)) / 2


def _gelu_derivative(x: Array, slope: float) -> Array:
    return _normal_below(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


GELU_CUBIC = 0.044715
GELU_SCALE = 2 * math.sqrt(2 / math.pi)


def _gelu_tanh(x: Array, slope: float) -> Array:
    # (1 + tanh(u)) / 2 is sigmoid(2u), which stays accurate where the sum would cancel.
    return x * _sigmoid(GELU_SCALE * (x + GELU_CUBIC * x**3))


def _gelu_tanh_derivative(x: Array, slope: float) -> Array:
    s = _sigmoid(GELU_SCALE * (x + GELU_CUBIC * x**3))
    return s + x * s * (1 - s) * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)


IDENTITY = Activation(
    name="identity",
    formula="x",
    monotone=True,
    takes_slope=False,
    forward=lambda x, slope: x,
    derivative=_one,
    derivative_from_output=_one,
)
RELU = Activation(
    name="relu",
    formula="max(x, 0)",
    monotone=True,
    takes_slope=False,
    forward=lambda x, slope: np.maximum(x, 0),
    derivative=_relu_step,
    derivative_from_output=_relu_step,
)
LEAKY_RELU = Activation(
    name="leaky_relu",
    formula="x if x > 0 else slope*x",
    monotone=True,
    takes_slope=True,
    forward=lambda x, slope: np.where(x > 0, x, x * slope),
    derivative=_leaky_step,
    derivative_from_output=_leaky_step,
)
RELU6 = Activation(
    name="relu6",
    formula="min(max(x, 0), 6)",
    monotone=True,
    takes_slope=False,
    forward=lambda x, slope: np.clip(x, 0, 6),
    derivative=_within(0, 6, 1.0),
    derivative_from_output=_within(0, 6, 1.0),
)
HARDSIGMOID = Activation(
    name="hardsigmoid",
    formula="min(max(x + 3, 0), 6) / 6",
    monotone=True,
    takes_slope=False,
    forward=_hardsigmoid,
    derivative=_within(-3, 3, 1 / 6),
    derivative_from_output=_within(0, 1, 1 / 6),
)
HARDSWISH = Activation(
    name="hardswish",
    formula="x * min(max(x + 3, 0), 6) / 6",
    monotone=False,
    takes_slope=False,
    forward=lambda x, slope: x * _hardsigmoid(x, slope),
    derivative=_hardswish_derivative,
    derivative_from_output=None,
)
SIGMOID = Activation(
    name="sigmoid",
    formula="1 / (1 + exp(-x))",
    monotone=True,
    takes_slope=False,
    forward=_sigmoid,
    derivative=lambda x, slope: _sigmoid(x) * _sigmoid(-x),
    derivative_from_output=lambda y, slope: y * (1 - y),
)
TANH = Activation(
    name="tanh",
    formula="tanh(x)",
    monotone=True,
    takes_slope=False,
    forward=lambda x, slope: np.tanh(x),
    derivative=lambda x, slope: 1 - np.tanh(x) ** 2,
    derivative_from_output=lambda y, slope: 1 - y * y,
)
SILU = Activation(
    name="silu",
    formula="x * sigmoid(x)",
    monotone=False,
    takes_slope=False,
    forward=lambda x, slope: x * _sigmoid(x),
    derivative=_silu_derivative,
    derivative_from_output=None,
)
GELU = Activation(
    name="gelu",
    formula="x * (1 + erf(x / sqrt(2))) / 2",
    monotone=False,
    takes_slope=False,
    forward=lambda x, slope: x * _normal_below(x),
    derivative=_gelu_derivative,
    derivative_from_output=None,
)
GELU_TANH = Activation(
    name="gelu_tanh",
    formula="x * (1 + tanh(sqrt(2/pi) * (x + 0.044715*x^3))) / 2",
    monotone=False,
    takes_slope=False,
    forward=_gelu_tanh,
    derivative=_gelu_tanh_derivative,
    derivative_from_output=None,
)

_ROWS = (
    *(IDENTITY, RELU, LEAKY_RELU, RELU6, HARDSIGMOID, HARDSWISH),
    *(SIGMOID, TANH, SILU, GELU, GELU_TANH),
)
ACTIVATIONS: dict[str, Activation] = {row.name: row for row in _ROWS}
