"""What is done to accumulators before they are stored: one row per activation, one per step.

Steps act in the order of the problem's epilogue tuple. A pool is not a pointwise step: it reads
what these wrote (:mod:`neocog.cpu.pool`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

from ..errors import Unsupported
from ..steps import Act, Add, Affine, Bias, Pooling, Step
from . import vector_math as vm
from .lanes import Emitter

Value: TypeAlias = Any  # an ir.Value; llvmlite is untyped


def _relu(e: Emitter, v: Value, slope: float) -> Value:
    # "less" is false for NaN, which therefore passes, as in torch.
    return e.b.select(e.b.fcmp_ordered("<", v, e.zero), e.zero, v)


def _relu_gradient(e: Emitter, out: Value, grad: Value, slope: float) -> Value:
    return e.b.select(e.b.fcmp_ordered("<=", out, e.zero), e.zero, grad)


def _leaky_relu(e: Emitter, v: Value, slope: float) -> Value:
    return e.b.select(e.b.fcmp_ordered(">", v, e.zero), v, e.b.fmul(v, e.constant(slope)))


def _leaky_relu_gradient(e: Emitter, out: Value, grad: Value, slope: float) -> Value:
    scaled = e.b.fmul(grad, e.constant(slope))
    return e.b.select(e.b.fcmp_ordered(">", out, e.zero), grad, scaled)


def _between(e: Emitter, out: Value, low: float, high: float, grad: Value) -> Value:
    above = e.b.fcmp_ordered(">", out, e.constant(low))
    below = e.b.fcmp_ordered("<", out, e.constant(high))
    return e.b.select(e.b.and_(above, below), grad, e.zero)


def _relu6_gradient(e: Emitter, out: Value, grad: Value, slope: float) -> Value:
    return _between(e, out, 0.0, 6.0, grad)


def _hardsigmoid_gradient(e: Emitter, out: Value, grad: Value, slope: float) -> Value:
    return _between(e, out, 0.0, 1.0, e.b.fmul(grad, e.constant(1 / 6)))


def _sigmoid_gradient(e: Emitter, out: Value, grad: Value, slope: float) -> Value:
    return e.b.fmul(grad, e.b.fmul(out, e.b.fsub(e.constant(1.0), out)))


def _tanh_gradient(e: Emitter, out: Value, grad: Value, slope: float) -> Value:
    return e.b.fmul(grad, e.fma(e.b.fneg(out), out, e.constant(1.0)))


def _inline(function: Callable[[Emitter, Value], Value]) -> Callable:
    return lambda e, v, slope: function(e, v)


def _called(function: Callable[[Emitter, Value], Value]) -> Callable:
    return lambda e, v, slope: e.routine(function.__name__, function, v)


ACTIVATIONS: dict[str, tuple[Callable, Callable | None]] = {
    "identity": (lambda e, v, slope: v, lambda e, out, grad, slope: grad),
    "relu": (_relu, _relu_gradient),
    "leaky_relu": (_leaky_relu, _leaky_relu_gradient),
    "relu6": (_inline(vm.relu6), _relu6_gradient),
    "hardsigmoid": (_inline(vm.hardsigmoid), _hardsigmoid_gradient),
    "hardswish": (_inline(vm.hardswish), None),
    "sigmoid": (_called(vm.sigmoid), _sigmoid_gradient),
    "tanh": (_called(vm.tanh), _tanh_gradient),
    "silu": (_called(vm.silu), None),
    "gelu": (_called(vm.gelu), None),
    "gelu_tanh": (_called(vm.gelu_tanh), None),
}
"""name -> (value(e, v, slope), gradient(e, result, grad, slope)); as in neocog.activations.

No gradient: the result does not tell it.
"""


def activate(e: Emitter, act: Act, v: Value) -> Value:
    """The activation of one vector."""
    return ACTIVATIONS[act.name][0](e, v, act.slope)


def has_gradient(act: Act) -> bool:
    """Whether a kernel can tell the derivative from the activation's result."""
    return ACTIVATIONS[act.name][1] is not None


def activation_gradient(e: Emitter, act: Act, out: Value, grad: Value) -> Value:
    """``grad`` times the derivative, told from the activation's result.

    Unsupported where that does not tell it, see :func:`has_gradient`.
    """
    gradient = ACTIVATIONS[act.name][1]
    if gradient is None:
        raise Unsupported(f"the gradient of {act}: the result does not tell it")
    return gradient(e, out, grad, act.slope)


def activation_of(epilogue: Sequence[Step]) -> Act:
    """The epilogue's activation, or the identity."""
    return next((s for s in epilogue if isinstance(s, Act)), Act("identity"))


def pooling_of(epilogue: Sequence[Step]) -> Pooling | None:
    """The epilogue's pool."""
    return next((s for s in epilogue if isinstance(s, Pooling)), None)


def check_supported(epilogue: Sequence[Step]) -> None:
    """Unsupported for what the kernels do not cover."""
    for step in epilogue:
        if isinstance(step, Act) and step.name not in ACTIVATIONS:
            raise Unsupported(f"activation {step.name}: no kernel yet")
        if isinstance(step, Act) and step.slope < 0:
            raise Unsupported(
                f"{step}: a negative slope; the result does not tell the sign of its input"
            )


def parameters(epilogue: Sequence[Step]) -> tuple[str, ...]:
    """The per-channel parameters the steps read, in order."""
    names = {Bias: ("bias",), Affine: ("scale", "shift")}
    return tuple(n for step in epilogue for n in names.get(type(step), ()))


def spelled(epilogue: Sequence[Step]) -> str:
    """The kinds of the steps for a kernel's name: ``+bias+relu``."""
    return "".join("+" + str(step).split()[0].split("(")[0] for step in epilogue)


def adds_residual(epilogue: Sequence[Step]) -> bool:
    """Whether a step adds a residual."""
    return any(isinstance(step, Add) for step in epilogue)


def finish(
    e: Emitter,
    epilogue: Sequence[Step],
    accumulators: list[Value],
    per_channel: dict[str, Value],
    residual: Callable[[int], Value],
) -> list[Value]:
    """All pointwise steps on the accumulators of one vector of channels.

    ``per_channel`` holds the loaded parameter vectors, ``residual(i)`` loads that of pixel i.
    """
    for step in epilogue:
        if isinstance(step, Bias):
            accumulators = [e.b.fadd(v, per_channel["bias"]) for v in accumulators]
        elif isinstance(step, Affine):
            scale, shift = per_channel["scale"], per_channel["shift"]
            accumulators = [e.fma(v, scale, shift) for v in accumulators]
        elif isinstance(step, Add):
            accumulators = [e.b.fadd(v, residual(i)) for i, v in enumerate(accumulators)]
        elif isinstance(step, Act):
            accumulators = [activate(e, step, v) for v in accumulators]
    return accumulators


def load_parameters(
    e: Emitter, epilogue: Sequence[Step], pointers: SimpleNamespace, offset: int, mask
) -> dict[str, Value]:
    """The parameter vectors of the channels from ``offset`` on."""
    return {name: e.vload(getattr(pointers, name), offset, mask) for name in parameters(epilogue)}
