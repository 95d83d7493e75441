"""The activation functions: one row each, the only place to add one.

``slope`` is the slope of ``leaky_relu`` for negative values; the others ignore it. NaN passes
through, and the derivatives at 0 and at NaN are PyTorch's.
"""

from __future__ import annotations

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
    it needs ``slope >= 0``, for only then does the result tell the sign of the input.
    ``monotone`` (for ``slope >= 0``): a maximum may be taken before the activation.
    """

    name: str
    formula: str
    monotone: bool
    takes_slope: bool
    forward: Function
    derivative: Function
    derivative_from_output: Function


def _one(v: Array, slope: float) -> Array:
    return np.ones_like(v)


def _relu_step(v: Array, slope: float) -> Array:
    # Not `v > 0`: torch lets the gradient through where the value is NaN.
    return np.where(v <= 0, 0.0, 1.0).astype(v.dtype)


def _leaky_step(v: Array, slope: float) -> Array:
    return np.where(v > 0, 1.0, slope).astype(v.dtype)


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

ACTIVATIONS: dict[str, Activation] = {row.name: row for row in (IDENTITY, RELU, LEAKY_RELU)}
