"""The matrices of Winograd's convolution F(m, r), and the IR that applies them.

F(m, r) computes m outputs of a correlation with r taps from m+r-1 inputs with m+r-1 products:

    y = A^T [(G g) * (B^T d)]          y_i = sum_k g_k d_(i+k)

and nested with itself an m x m tile of an r x r convolution: Y = A^T [(G g G^T) * (B^T d B)] A
(Lavin and Gray, 2015). It is the Toom-Cook product of polynomials, transposed: evaluate at m+r-2
points and at infinity, multiply, interpolate. The points decide the rounding error: with
{0, +-3/4, +-3/2} that of F(4, 3) is 2 to 5 times smaller than with {0, +-1, +-2}, and the entries
of A and B remain exact in float32. Points that come in pairs +-p make halves of the sums common to
two rows or columns, which :func:`apply` uses.

A tile at the edge of a map has fewer outputs, ``outputs`` below, and needs fewer points. It takes
the first ones and infinity, so that it shares the transformed weights of whole tiles: what their
rows of G are divided by for the points it leaves out is multiplied into its rows of B^T.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

from llvmlite import ir

from .lanes import Emitter

Matrix = tuple[tuple[Fraction, ...], ...]

POINTS = {
    2: tuple(map(Fraction, (0, 1))),
    3: tuple(map(Fraction, (0, 1, -1))),
    4: tuple(map(Fraction, ("0", "3/2", "-3/2", "1/2"))),
    5: tuple(map(Fraction, ("0", "3/4", "-3/4", "3/2", "-3/2"))),
    7: tuple(map(Fraction, ("0", "1", "-1", "2", "-2", "1/2", "-1/2"))),
    6: tuple(map(Fraction, ("0", "1", "-1", "2", "-2", "1/4"))),
}
"""The finite interpolation points, by their number, m+r-2; the last one is infinity."""


def points_of(m: int, taps: int, outputs: int | None = None) -> tuple[Fraction, ...]:
    """The finite points of F(m, taps), or those that a tile of ``outputs`` <= m uses."""
    return POINTS[m + taps - 2][: (m if outputs is None else outputs) + taps - 2]


def indices(m: int, taps: int, outputs: int) -> tuple[int, ...]:
    """Which of the m+r-1 points a tile of ``outputs`` uses."""
    return (*range(outputs + taps - 2), m + taps - 2)


@functools.cache
def output_matrix(m: int, taps: int, outputs: int) -> Matrix:
    """A^T, a row for each output, a column for each point used: row i evaluates x^i there."""
    points = points_of(m, taps, outputs)
    return tuple((*(p**i for p in points), Fraction(i == outputs - 1)) for i in range(outputs))


@functools.cache
def weight_matrix(m: int, taps: int) -> Matrix:
    """G, m+r-1 rows of r: row i evaluates the kernel at point i, over the product of differences.

    With one tap there is nothing to evaluate at infinity but that tap.
    """
    points = points_of(m, taps)
    rows = [tuple(p**j / _differences(p, points) for j in range(taps)) for p in points]
    return (*rows, tuple(Fraction(j == taps - 1) for j in range(taps)))


@functools.cache
def input_matrix(m: int, taps: int, outputs: int) -> Matrix:
    """B^T, a row for each point used, a column for each of outputs+r-1 inputs.

    Row i holds the polynomial that is 0 at all points but point i.
    """
    points, whole = points_of(m, taps, outputs), points_of(m, taps)
    rows = []
    for p in points:
        factor = _differences(p, whole) / _differences(p, points)
        rows.append([factor * c for c in _monic([q for q in points if q != p])])
    rows.append(_monic(points))
    size = outputs + taps - 1
    return tuple((*row, *[Fraction(0)] * (size - len(row))) for row in rows)


def _differences(p: Fraction, points: Sequence[Fraction]) -> Fraction:
    return math.prod((p - q for q in points if q != p), start=Fraction(1))


def _monic(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients, lowest first, of the product of (x - root)."""
    result = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *result], [*(-root * c for c in result), Fraction(0)]
        result = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return result


def apply(e: Emitter, matrix: Matrix, values: Sequence[ir.Value]) -> list[ir.Value]:
    """The vectors ``matrix @ values`` in few operations.

    Two neighbouring columns that agree up to signs are replaced by the sum and the difference of
    their values; of two neighbouring rows that do, the common parts are summed once.
    """
    matrix, values = _fold_columns(e, matrix, values)
    results: list[ir.Value] = []
    while len(results) < len(matrix):
        row, *following = matrix[len(results) : len(results) + 2]
        if following and _mirrored(row, following[0]):
            results += _row_pair(e, row, following[0], values)
        else:
            results.append(_combine(e, row, values))
    return results


def _mirrored(a: Sequence[Fraction], b: Sequence[Fraction]) -> bool:
    """Whether a and b agree up to signs, and neither a = b nor a = -b."""
    same = any(x == y != 0 for x, y in zip(a, b, strict=True))
    opposite = any(x == -y != 0 for x, y in zip(a, b, strict=True))
    return same and opposite and all(abs(x) == abs(y) for x, y in zip(a, b, strict=True))


def _fold_columns(e: Emitter, matrix: Matrix, values: Sequence[ir.Value]):
    columns, folded, at = list(zip(*matrix, strict=True)), list(values), 0
    while at + 1 < len(columns):
        left, right = columns[at], columns[at + 1]
        if not _mirrored(left, right):
            at += 1
            continue
        a, b = folded[at], folded[at + 1]
        folded[at : at + 2] = [e.b.fadd(a, b), e.b.fsub(a, b)]
        pairs = list(zip(left, right, strict=True))
        columns[at] = tuple((x + y) / 2 for x, y in pairs)
        columns[at + 1] = tuple((x - y) / 2 for x, y in pairs)
        at += 2
    return tuple(zip(*columns, strict=True)), folded


def _row_pair(e: Emitter, row: Sequence[Fraction], other: Sequence[Fraction], values):
    even = [x if x == y else Fraction(0) for x, y in zip(row, other, strict=True)]
    odd = [x - y for x, y in zip(row, even, strict=True)]
    factor = next(c for c in reversed(odd) if c)
    common = _combine(e, even, values)
    rest = _combine(e, [c / factor for c in odd], values)
    if abs(factor) == 1:
        pair = [e.b.fadd(common, rest), e.b.fsub(common, rest)]
        return pair if factor == 1 else pair[::-1]
    return [e.fma(e.constant(float(f)), rest, common) for f in (factor, -factor)]


def _combine(e: Emitter, row: Sequence[Fraction], values: Sequence[ir.Value]) -> ir.Value:
    """The sum of coefficient times value; a term with coefficient 1 comes first, if there is one.

    At least one coefficient is not 0.
    """
    terms = [(c, v) for c, v in zip(row, values, strict=True) if c]
    terms.sort(key=lambda term: term[0] != 1)
    (factor, total), *others = terms
    if factor != 1:
        total = e.b.fmul(total, e.constant(float(factor)))
    for factor, value in others:
        if factor == 1:
            total = e.b.fadd(total, value)
        elif factor == -1:
            total = e.b.fsub(total, value)
        else:
            total = e.fma(e.constant(float(factor)), value, total)
    return total
