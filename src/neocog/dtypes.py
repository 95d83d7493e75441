"""The number formats: one row each, the only place to add one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DType:
    """A storage format, the format its sums are kept in, and how exact they are.

    ``unit_roundoff`` u is the largest relative error of one operation of the accumulator;
    integers up to ``exact_integers`` are exact, so that small-integer tests compare with ``==``.
    """

    name: str
    storage: np.dtype
    accumulator: np.dtype
    unit_roundoff: float
    exact_integers: int

    def error_bound(self, terms: int, magnitude: NDArray[np.floating]) -> NDArray[np.floating]:
        """How far a sum of ``terms`` products, added in any order, can be from the true one.

        ``magnitude`` is the same sum over absolute values. The bound is ``gamma*magnitude`` with
        ``gamma = t*u/(1 - t*u)`` and t roundings on the way of each product: one for the product,
        ``terms - 1`` for the additions and one for storing (Higham, Accuracy and Stability of
        Numerical Algorithms, chapter 3).
        """
        roundings = (terms + 1) * self.unit_roundoff
        return roundings / (1 - roundings) * np.asarray(magnitude)


FLOAT32 = DType("float32", np.dtype(np.float32), np.dtype(np.float32), 2.0**-24, 2**24)
FLOAT64 = DType("float64", np.dtype(np.float64), np.dtype(np.float64), 2.0**-53, 2**53)

DTYPES: dict[str, DType] = {row.name: row for row in (FLOAT32, FLOAT64)}
