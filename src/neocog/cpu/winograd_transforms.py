"""The matrices of Winograd's convolution F(m, 3), and the IR that applies them.

F(m, 3) computes m outputs of a correlation with 3 taps from m+2 inputs with m+2 products:

    y = A^T [(G g) * (B^T d)]          y_i = sum_k g_k d_(i+k)

and nested with itself an m x m tile of a 3x3 convolution: Y = A^T [(G g G^T) * (B^T d B)] A
(Lavin and Gray, 2015). It is the Toom-Cook product of polynomials, transposed: evaluate at m+1
points and at infinity, multiply, interpolate. The points decide the rounding error: with
{0, +-3/4, +-3/2} it is 2 to 5 times smaller than with {0, +-1, +-2}, and the entries of A and B
remain exact in float32. Points that come in pairs +-p make halves of the sums common to two rows
or columns, which :func:`apply` uses.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

from llvmlite import ir

from .lanes import Emitter

Matrix = tuple[tuple[Fraction, ...], ...]

TAPS = 3

POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
}
"""m -> the finite interpolation points; the last one is infinity."""


@functools.cache
def output_matrix(m: int) -> Matrix:
    """A^T, m rows of m+2: row i evaluates x^i at the points."""
    return tuple((*(p**i for p in POINTS[m]), Fraction(i == m - 1)) for i in range(m))


@functools.cache
def weight_matrix(m: int) -> Matrix:
    """G, m+2 rows of 3: row i evaluates the kernel at point i, over the product of differences."""
    points = POINTS[m]
    rows = []
    for p in points:
        scale = Fraction(1)
        for q in points:
            scale *= p - q if q != p else 1
        rows.append(tuple(p**j / scale for j in range(TAPS)))
    return (*rows, (Fraction(0), Fraction(0), Fraction(1)))


@functools.cache
def input_matrix(m: int) -> Matrix:
    """B^T, m+2 rows of m+2: row i holds the polynomial that is 0 at all points but point i."""
    points = POINTS[m]
    rows = [_monic([q for q in points if q != p]) for p in points] + [_monic(points)]
    return tuple((*row, *[Fraction(0)] * (m + 2 - len(row))) for row in rows)


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
