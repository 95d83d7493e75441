"""The pooling kinds: one row each, the only place to add one.

A window is reduced from its first tap to its last, row by row:

    total = init;  for each value: total = total (+) value;  result = finish(total, divisor)

``improves(total, value)`` says where the value becomes the winner, the one input that receives
the gradient; ``None`` if every input shares in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Reduction:
    """One row, element by element on NumPy arrays.

    ``selects``: the result is one of the values (max), so padding never takes part, there is no
    divisor, and a winner is kept. Otherwise ``finish`` divides by the size of the window.
    """

    name: str
    formula: str
    selects: bool
    init: float
    combine: Callable[[Array, Array], Array]
    finish: Callable[[Array, float], Array]
    improves: Callable[[Array, Array], NDArray[np.bool_]] | None = None


def _greater_or_nan(total: Array, value: Array) -> NDArray[np.bool_]:
    """The rule of torch's max_pool2d: the first of equals wins, and a NaN beats what came before.

    Nothing is greater than a NaN, so that only a later NaN takes over from it.
    """
    return (value > total) | np.isnan(value)


MAX = Reduction(
    name="max",
    formula="max over the window",
    selects=True,
    init=-np.inf,
    combine=lambda total, value: np.where(_greater_or_nan(total, value), value, total),
    finish=lambda total, divisor: total,
    improves=_greater_or_nan,
)
MEAN = Reduction(
    name="mean",
    formula="sum over the window / divisor",
    selects=False,
    init=0.0,
    combine=lambda total, value: total + value,
    finish=lambda total, divisor: total / divisor,
)

REDUCTIONS: dict[str, Reduction] = {row.name: row for row in (MAX, MEAN)}
