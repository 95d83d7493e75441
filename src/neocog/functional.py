"""torch.nn.functional's convolution and pools, computed by neocog's compiled kernels.

Signatures, results, gradients and errors are PyTorch's
(https://docs.pytorch.org/docs/stable/nn.functional.html). What the kernels do not cover (other
dtypes than float32, other devices than the CPU, see :mod:`neocog.handback`) PyTorch computes, and a
warning of the logger ``neocog`` says so once.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import execution, handback, ops
from .errors import InvalidProblem
from .geometry import same_padding
from .problem import Act, Add, Bias, Pooling, Step, pooling
from .steps import check_whole, pair

Size = int | Sequence[int]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d``.

    Input (N, C, H, W) or (C, H, W), weight (K, C/groups, KH, KW) and bias (K,) in float32 on the
    CPU; anything else is handed back to PyTorch. The output is channels_last if input or weight is,
    else contiguous. InvalidProblem (a ValueError and RuntimeError) if the shapes fit no
    convolution.
    """
    return conv_block(input, weight, bias, stride, padding, dilation, groups)


def conv_block(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    activation: str = "identity",
    negative_slope: float = 0.01,
    pool: Pooling | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution, bias, residual addition, activation and pool as one kernel.

    ``pool(activation(conv2d(input, weight, bias, ...) + residual))``. ``activation``: a row of
    ``neocog.activations``, "leaky_relu" with ``negative_slope`` or spelled out: "leaky_relu(0.1)".
    ``pool``: a :class:`neocog.problem.Pooling`, see :func:`neocog.problem.pooling`. ``residual``
    has the convolution's output shape.
    InvalidProblem as :func:`conv2d`.
    """
    if input.dim() not in (3, 4) or weight.dim() != 4:
        raise InvalidProblem(
            "input must have 3 or 4 dimensions and weight 4, got shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    # Only 'same' depends on the kernel, whose sizes may be symbolic.
    kernel = tuple(int(k) for k in weight.shape[2:]) if padding == "same" else ()
    window = _window(_plain(stride), _plain(padding), _plain(dilation), groups, kernel)
    steps, text = _epilogue(
        bias is not None, residual is not None, activation, negative_slope, pool
    )
    reason = handback.reason(input, weight, bias, residual, steps=steps)
    if reason is None and 0 in (*input.shape[-3:], *weight.shape):
        reason = "a size of 0"
    if reason is None and not torch.compiler.is_compiling():
        reason = execution.too_far(input.shape, weight.shape, *window)
    if reason is not None:
        handback.say("conv2d" if steps in ((), (Bias(),)) else "conv_block", reason)
        return handback.conv_block(input, weight, bias, residual, *window, steps)
    batched = input.dim() == 4
    if not batched:
        input = input.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    save = _wants_grad(input, weight, bias, residual)
    out = ops.conv_block(input, weight, bias, residual, *window, text, save)[0]
    return out if batched else out.squeeze(0)


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``torch.nn.functional.max_pool2d``: input (N, C, H, W) or (C, H, W).

    The first of equal values wins, a NaN wins over all; ``return_indices`` is handed back to
    PyTorch. InvalidProblem if the windows do not fit.
    """
    step = _pooling("max", kernel_size, stride, padding, dilation, ceil_mode)
    if return_indices:
        handback.say("max_pool2d", "return_indices")
        return handback.max_pool_with_indices(input, step)
    return _pool(input, step, "max_pool2d")


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``torch.nn.functional.avg_pool2d``: input (N, C, H, W) or (C, H, W).

    InvalidProblem if the windows do not fit.
    """
    step = _pooling(
        "mean", kernel_size, stride, padding, 1, ceil_mode, count_include_pad, divisor_override
    )
    return _pool(input, step, "avg_pool2d")


def _pool(input: Tensor, step: Pooling, name: str) -> Tensor:
    reason = handback.reason(input)
    if reason is None and input.dim() not in (3, 4):
        raise InvalidProblem(f"input must have 3 or 4 dimensions, got shape {tuple(input.shape)}")
    if reason is None and 0 in input.shape[-3:]:
        reason = "a size of 0"
    if reason is not None:
        handback.say(name, reason)
        return handback.pool(input, step)
    batched = input.dim() == 4
    x = input if batched else input.unsqueeze(0)
    out = ops.pool(x, _spelling(step), _wants_grad(input))[0]
    return out if batched else out.squeeze(0)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _plain(value: Any) -> Any:
    """Sequences as tuples, so that they can be keys; NumPy's integers as Python's."""
    if value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, Sequence):
        return tuple(_plain(v) for v in value)
    return operator.index(value) if hasattr(value, "__index__") else value


# Typed: True and 1.0 are no whole numbers, although they equal 1.
@functools.lru_cache(1024, typed=True)
def _window(
    stride: Any, padding: Any, dilation: Any, groups: int, kernel: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]:
    """Checked (stride, (top, bottom, left, right), dilation, groups)."""
    strides, dilations = pair("stride", stride), pair("dilation", dilation)
    check_whole("groups", groups, 1)
    return strides, _padding(padding, kernel, strides, dilations), dilations, groups


def _padding(
    padding: Any, kernel: tuple[int, ...], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) for each of PyTorch's ways to say it."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if stride != (1, 1):
            raise InvalidProblem(
                f"padding='same' keeps the size, which needs stride 1, got stride={stride}"
            )
        rows, cols = (same_padding(k, d) for k, d in zip(kernel, dilation, strict=True))
        return *rows, *cols
    if isinstance(padding, str):
        raise InvalidProblem(
            f"padding must be a number, a pair, 'same' or 'valid', got {padding!r}"
        )
    top, left = pair("padding", padding)
    check_whole("padding", min(top, left), 0)
    return top, top, left, left


@functools.lru_cache(1024)
def _epilogue(
    bias: bool, residual: bool, activation: str, slope: float, pool: Pooling | None
) -> tuple[tuple[Step, ...], str]:
    """The steps after the convolution, and their spelling."""
    if "(" in activation:
        act = execution.parse_activation(activation)
    else:
        act = Act(activation, slope if activation == "leaky_relu" else 0.0)
    candidates = (
        (bias, Bias()),
        (residual, Add()),
        (activation != "identity", act),
        (pool is not None, pool),
    )
    steps: tuple[Step, ...] = tuple(step for present, step in candidates if present and step)
    return steps, execution.spell_steps(steps)


def _pooling(kind: str, kernel_size: Size, stride: Size | None, *rest: Any) -> Pooling:
    # An empty stride means the kernel size, as None does.
    steps = _plain(stride)
    steps = None if steps == () else steps
    return _cached_pooling(kind, _plain(kernel_size), steps, *map(_plain, rest))


_cached_pooling = functools.lru_cache(256, typed=True)(pooling)


@functools.lru_cache(256)
def _spelling(step: Pooling) -> str:
    return str(step)
