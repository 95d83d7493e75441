"""exp, tanh, sigmoid and what is made of them, on vectors: no call of the C library.

Every function takes an :class:`~neocog.cpu.lanes.Emitter` and a vector of float32 and returns one.
NaN stays NaN, no argument is out of range, and nothing relies on a multiply-add being fused.
Errors against float64 are at most 2 units in the last place (exp) and 4e-7 of the value. Below -4,
where the values of GELU fade, the rounding of the exponent shows: up to 2e-5 of a value, and never
more than 1e-8 in all.

The polynomials are minimax fits (Lawson's iteratively reweighted least squares, in float64, on
Chebyshev nodes) of the functions that the comments name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from ..activations import GELU_CUBIC, GELU_SCALE
from .lanes import Emitter

Value: TypeAlias = Any  # an ir.Value; llvmlite is untyped

LOG2_E = 1 / math.log(2)

# log(2) in two parts (Cody & Waite, Software Manual for the Elementary Functions, 1980): the first
# has 9 bits, so that its product with a whole number below 2^15 is exact in float32.
LOG2_HIGH = 355 / 512
LOG2_LOW = math.log(2) - LOG2_HIGH

# (exp(r) - 1 - r) / r^2 for |r| <= log(2)/2, ascending powers; 3e-9 of exp(r).
EXP = (0.4999999403953552, 0.1666651964187622, 0.041668400168418884,
       0.00836885068565607, 0.0013814320554956794)  # fmt: skip
EXP_LOWEST, EXP_HIGHEST = -104.0, 89.0  # beyond them the result is 0, and infinity

# The normal distribution's tail, P(t) = exp(-t^2/2) * R(t): (t + TAIL_CENTRE) * R(t) in powers of
# (t - TAIL_CENTRE) / (t + TAIL_CENTRE), nearly constant; 6e-9 of R(t) at 0, 3e-7 at TAIL_END.
TAIL = (0.7290836572647095, -0.5093319416046143, 0.23001892864704132, -0.04726303368806839,
        -0.010479218326508999, 0.006956120021641254, 0.0010887992102652788,
        -0.0009458089480176568, -0.0002968139306176454)  # fmt: skip
TAIL_CENTRE = 3.0
TAIL_END = 14.5  # exp(-t^2/2) is 0 in float32

ROUNDER = 1.5 * 2.0**23
"""Adding it leaves no bits behind the point: the sum's last bits are the rounded number."""
ROUNDER_BITS = 0x4B400000
MANTISSA_BITS, EXPONENT_BIAS = 23, 127


def at_least(e: Emitter, v: Value, bound: float) -> Value:
    """max(v, bound); NaN stays."""
    limit = e.constant(bound)
    return e.b.select(e.b.fcmp_ordered("<", v, limit), limit, v)


def at_most(e: Emitter, v: Value, bound: float) -> Value:
    """min(v, bound); NaN stays."""
    limit = e.constant(bound)
    return e.b.select(e.b.fcmp_ordered(">", v, limit), limit, v)


def absolute(e: Emitter, v: Value) -> Value:
    """|v|."""
    return e.b.call(e.intrinsic(f"llvm.fabs.v{e.lanes}f32", e.vector, [e.vector]), [v])


def with_sign(e: Emitter, v: Value, sign: Value) -> Value:
    """v with the sign of ``sign``."""
    fn = e.intrinsic(f"llvm.copysign.v{e.lanes}f32", e.vector, [e.vector] * 2)
    return e.b.call(fn, [v, sign])


def polynomial(e: Emitter, x: Value, coefficients: Sequence[float]) -> Value:
    """The sum of ``coefficients[i] * x^i``, by Horner's rule."""
    value = e.constant(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = e.fma(value, x, e.constant(c))
    return value


def _reduced(e: Emitter, x: Value) -> tuple[Value, Value]:
    """(n, p), n a vector of i32, with exp(x) = 2^n * (1 + p) and |p| < 0.42; for |x| < 2^14.

    p is relatively accurate where n is 0: it is exp(x) - 1 there.
    """
    rounder = e.constant(ROUNDER)
    shifted = e.fma(x, e.constant(LOG2_E), rounder)
    n = e.b.sub(e.b.bitcast(shifted, e.ints), e.integers(ROUNDER_BITS))
    minus_n = e.b.fsub(rounder, shifted)
    r = e.fma(minus_n, e.constant(LOG2_HIGH), x)
    r = e.fma(minus_n, e.constant(LOG2_LOW), r)
    return n, e.fma(e.b.fmul(r, r), polynomial(e, r, EXP), r)


def _power_of_two(e: Emitter, n: Value) -> Value:
    """2^n for -127 < n < 128."""
    exponent = e.b.add(n, e.integers(EXPONENT_BIAS))
    return e.b.bitcast(e.b.shl(exponent, e.integers(MANTISSA_BITS)), e.vector)


def exp(e: Emitter, x: Value) -> Value:
    """e^x, with denormal results."""
    n, p = _reduced(e, at_most(e, at_least(e, x, EXP_LOWEST), EXP_HIGHEST))
    # In two factors: n alone reaches beyond the exponents of float32 at both ends.
    half = e.b.ashr(n, e.integers(1))
    value = e.b.fmul(e.b.fadd(e.constant(1.0), p), _power_of_two(e, half))
    return e.b.fmul(value, _power_of_two(e, e.b.sub(n, half)))


def sigmoid(e: Emitter, x: Value) -> Value:
    """1 / (1 + e^-x), relatively accurate at both ends."""
    one = e.constant(1.0)
    small = exp(e, e.b.fneg(absolute(e, x)))
    above = e.b.select(e.b.fcmp_ordered(">=", x, e.zero), one, small)
    return e.b.fdiv(above, e.b.fadd(one, small))


def tanh(e: Emitter, x: Value) -> Value:
    """-m / (2 + m) with m = e^(-2|x|) - 1, and the sign of x: nothing cancels near 0."""
    size = at_most(e, absolute(e, x), 10.0)  # tanh is 1 from there on
    n, p = _reduced(e, e.b.fmul(size, e.constant(-2.0)))
    power = _power_of_two(e, n)
    m = e.fma(power, p, e.b.fsub(power, e.constant(1.0)))
    return with_sign(e, e.b.fdiv(m, e.b.fadd(e.constant(2.0), m)), x)


def relu6(e: Emitter, x: Value) -> Value:
    """min(max(x, 0), 6)."""
    return at_most(e, at_least(e, x, 0.0), 6.0)


def hardsigmoid(e: Emitter, x: Value) -> Value:
    """min(max(x + 3, 0), 6) / 6; exactly 1 from 3 on (float32: 6 times 1/6 is 1)."""
    return e.b.fmul(relu6(e, e.b.fadd(x, e.constant(3.0))), e.constant(1 / 6))


def hardswish(e: Emitter, x: Value) -> Value:
    """x * hardsigmoid(x)."""
    return e.b.fmul(x, hardsigmoid(e, x))


def silu(e: Emitter, x: Value) -> Value:
    """x * sigmoid(x)."""
    return e.b.fmul(x, sigmoid(e, x))


def gelu(e: Emitter, x: Value) -> Value:
    """x times the normal distribution at x, which is its tail at |x| or 1 minus that."""
    t = at_most(e, absolute(e, x), TAIL_END)
    one = e.constant(1.0)
    s = e.b.fdiv(one, e.b.fadd(t, e.constant(TAIL_CENTRE)))
    y = e.fma(s, e.constant(-2 * TAIL_CENTRE), one)
    ratio = e.b.fmul(s, polynomial(e, y, TAIL))
    tail = e.b.fmul(exp(e, e.b.fmul(t, e.b.fmul(t, e.constant(-0.5)))), ratio)
    below = e.b.select(e.b.fcmp_ordered(">=", x, e.zero), e.b.fsub(one, tail), tail)
    return e.b.fmul(x, below)


def gelu_tanh(e: Emitter, x: Value) -> Value:
    """x * sigmoid(2u), which is x * (1 + tanh(u)) / 2; u as in neocog.activations."""
    factor = e.fma(e.b.fmul(x, x), e.constant(GELU_SCALE * GELU_CUBIC), e.constant(GELU_SCALE))
    return e.b.fmul(x, sigmoid(e, e.b.fmul(x, factor)))
