"""The one path back to PyTorch: what neocog's kernels do not cover, PyTorch computes, visibly.

Every reason is logged once per process as a warning of the logger ``neocog``; ``neocog doctor``
lists what is covered.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from . import guard
from .activations import ACTIVATIONS
from .problem import Act, Pooling, Step

log = logging.getLogger("neocog")

COVERED = (
    ("device", "CPU"),
    ("dtype", "float32"),
    ("layers", "conv2d, max_pool2d, avg_pool2d, conv + bias + residual + activation + pool"),
    ("conv2d", "any stride, padding, dilation, groups; forward and backward"),
    ("max_pool2d", "any kernel, stride, padding, dilation, ceil_mode; forward and backward"),
    ("avg_pool2d", "ceil_mode, count_include_pad, divisor_override; forward and backward"),
    (
        "activations",
        "identity, relu, leaky_relu (slope >= 0), relu6, hardsigmoid, sigmoid, tanh; "
        "forward only: hardswish, silu, gelu, gelu_tanh",
    ),
    ("layouts", "contiguous and channels_last; others are copied first"),
)
"""What the kernels do; for ``neocog doctor``."""

HANDED_BACK = (
    ("other devices and dtypes", "computed by PyTorch"),
    ("autocast", "computed by PyTorch in the lower precision it asks for"),
    ("leaky_relu with a negative slope", "computed by PyTorch"),
    ("gradients of blocks with hardswish, silu, gelu, gelu_tanh", "computed by PyTorch"),
    ("channels, kernels or images of size 0", "PyTorch decides what they mean"),
    ("max_pool2d with return_indices", "computed by PyTorch"),
    ("transforms of torch.func, forward-mode differentiation", "computed by PyTorch"),
    ("dispatch and function modes, tracing by torch.jit", "see and run PyTorch's operators"),
    ("tensor subclasses, negative bits, fake and other odd tensors", "computed by PyTorch"),
    ("double backward", "recomputed and differentiated by PyTorch"),
)
"""What goes to PyTorch, and why; for ``neocog doctor``."""


# A graph need not break for it: it is said while the graph is traced.
@torch.compiler.assume_constant_result
def say(what: str, reason: str) -> None:
    """Log, once for each pair, that ``what`` went to PyTorch.

    Not where neocog itself captures or records a model: there it was asked for.
    """
    if torch.compiler.is_compiling() or not guard.own_mode():
        warn_once(what, reason)


@functools.lru_cache(256)
def warn_once(what: str, reason: str) -> None:
    """The warning itself."""
    log.warning("%s handed back to PyTorch: %s", what, reason)


def reason(*tensors: Tensor | None, steps: tuple[Step, ...] = ()) -> str | None:
    """Why PyTorch must compute on these tensors, or None if the kernels can."""
    # While torch.compile or torch.export traces, the operators stand for their kernels.
    traced = torch.compiler.is_compiling()
    for t in tensors:
        if t is None:
            continue
        if t.dtype != torch.float32:
            return f"dtype {t.dtype} (kernels exist for torch.float32)"
        if traced and t.device.type != "cpu":
            return f"device {t.device} (kernels exist for cpu)"
        if traced and t.layout != torch.strided:
            return f"layout {t.layout}"
        if not traced and not guard.plain(t):
            return guard.why_not(t)
    if (state := _traced_state() if traced else guard.interrupted()) is not None:
        return state
    acts = [step for step in steps if isinstance(step, Act)]
    for act in acts:
        if act.slope < 0:
            return f"{act}: a negative slope"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        for act in acts:
            if ACTIVATIONS[act.name].derivative_from_output is None:
                return f"the gradient of {act} (without one, kernels exist for it)"
    return None


def _traced_state() -> str | None:
    """Why PyTorch must compute what is traced now."""
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    # torch.onnx reads graphs of PyTorch's operators; those of torch.export keep neocog's.
    return "torch.onnx exports" if torch.onnx.is_in_onnx_export() else guard.transformed()


def conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    steps: tuple[Step, ...],
) -> Tensor:
    """A block in PyTorch's own operators; padding is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    if (top, left) == (bottom, right):
        y = F.conv2d(x, weight, bias, stride, (top, left), dilation, groups)
    else:
        padded = F.pad(x, (left, right, top, bottom))
        y = F.conv2d(padded, weight, bias, stride, 0, dilation, groups)
    if residual is not None:
        y = y + residual
    for step in steps:
        if isinstance(step, Act):
            y = activation(y, step)
        elif isinstance(step, Pooling):
            y = pool(y, step)
    return y


def activation(x: Tensor, act: Act) -> Tensor:
    """An activation in PyTorch's own operators."""
    if act.name == "leaky_relu":
        return F.leaky_relu(x, act.slope)
    if act.name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return x if act.name == "identity" else getattr(F, act.name)(x)


def pool(x: Tensor, pooling: Pooling) -> Tensor:
    """A pool in PyTorch's own operators."""
    rows, cols = pooling.rows, pooling.cols
    window = ((rows.size, cols.size), (rows.stride, cols.stride), (rows.low, cols.low))
    if pooling.kind == "max":
        return F.max_pool2d(x, *window, (rows.dilation, cols.dilation), rows.ceil)
    include, divisor = pooling.count_include_pad, pooling.divisor_override
    return F.avg_pool2d(x, *window, rows.ceil, include, divisor)


def max_pool_with_indices(x: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """A max pool and the flat indices of its winners, in PyTorch's own operators."""
    rows, cols = pooling.rows, pooling.cols
    return F.max_pool2d_with_indices(
        x,
        (rows.size, cols.size),
        (rows.stride, cols.stride),
        (rows.low, cols.low),
        (rows.dilation, cols.dilation),
        rows.ceil,
    )
