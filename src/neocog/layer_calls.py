"""PyTorch's functions that neocog compiles, each as an operation of a network.

Every function here takes ``name`` (the name of a parameter tensor), then the arguments of the
PyTorch function it stands for, and returns a :class:`Call`, or one of its arguments where the
function does nothing at inference. InvalidProblem and Unsupported say why not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import network as net
from .activations import ACTIVATIONS
from .errors import Unsupported
from .geometry import Window
from .maps import too_far
from .problem import Act, Pool, Pooling, check_shapes, conv2d_problem, pooling

Name = Callable[[Tensor | None], str | None]
Pair = int | Sequence[int]


@dataclass(frozen=True)
class Call:
    """One operation: what it reads and the shape of its result."""

    op: net.Op
    inputs: tuple[Tensor, ...]
    shape: tuple[int, ...]
    name: str
    in_place: bool = False
    """Whether the result takes the place of its first input."""
    view: bool = False
    """Whether the result shares its first input's memory."""


def _maps(what: str, *tensors: Tensor) -> None:
    for t in tensors:
        if t.dim() != 4:
            raise Unsupported(f"{what} of an input with {t.dim()} dimensions, 4 are covered")


def conv2d(
    name: Name, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pair = 1,
    padding: Pair | str = 0, dilation: Pair = 1, groups: int = 1,
) -> Call:  # fmt: skip
    """torch.nn.functional.conv2d."""
    _maps("convolution", input)
    check_shapes(tuple(input.shape), tuple(weight.shape), groups)
    conv = conv2d_problem(
        tuple(input.shape), tuple(weight.shape), stride, padding, dilation, groups
    )
    reason = too_far(conv)
    if reason:
        raise Unsupported(reason)
    op = net.Convolution(conv, _known(name, weight), name(bias))
    return Call(op, (input,), conv.out_shape, "conv2d")


def _known(name: Name, tensor: Tensor) -> str:
    found = name(tensor)
    assert found is not None
    return found


def batch_norm(
    name: Name, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Call:  # fmt: skip
    """torch.nn.functional.batch_norm at inference."""
    _maps("batch norm", input)
    if training or running_mean is None or running_var is None:
        raise Unsupported("batch norm with the statistics of the batch")
    norm = net.Norm(_known(name, running_mean), _known(name, running_var), name(weight),
                    name(bias), float(eps))  # fmt: skip
    return Call(net.BatchNorm(norm), (input,), tuple(input.shape), "batch_norm")


def _activation(function: str, input: Tensor, slope: float = 0.0, in_place: bool = False) -> Call:
    if function not in ACTIVATIONS:
        raise Unsupported(f"{function}: no kernel")
    if input.dim() not in (2, 4):
        raise Unsupported(f"{function} of an input with {input.dim()} dimensions")
    act = Act(function, slope)
    return Call(net.Activation(act), (input,), tuple(input.shape), function, in_place)


def _plain(function: str) -> Callable[..., Call]:
    def call(name: Name, input: Tensor, inplace: bool = False) -> Call:
        return _activation(function, input, in_place=inplace)

    return call


def _in_place(function: str) -> Callable[..., Call]:
    return lambda name, input: _activation(function, input, in_place=True)


def leaky_relu(
    name: Name, input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Call:
    """torch.nn.functional.leaky_relu."""
    if not negative_slope >= 0:
        raise Unsupported("leaky_relu with a negative slope")
    return _activation("leaky_relu", input, float(negative_slope), inplace)


def hardtanh(
    name: Name, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Call:
    """torch.nn.functional.hardtanh where it is ReLU6."""
    if (min_val, max_val) != (0.0, 6.0):
        raise Unsupported(f"hardtanh from {min_val} to {max_val}; 0 to 6 (ReLU6) is covered")
    return _activation("relu6", input, in_place=inplace)


def gelu(name: Name, input: Tensor, approximate: str = "none") -> Call:
    """torch.nn.functional.gelu."""
    return _activation("gelu_tanh" if approximate == "tanh" else "gelu", input)


def _pool(input: Tensor, step: Pooling) -> Call:
    _maps("pooling", input)
    pool = Pool.of(step, *input.shape)
    return Call(net.Pooling(pool), (input,), pool.out_shape, f"{step.kind}_pool2d")


def max_pool2d(
    name: Name, input: Tensor, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0,
    dilation: Pair = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> Call:  # fmt: skip
    """torch.nn.functional.max_pool2d."""
    if return_indices:
        raise Unsupported("max_pool2d with return_indices")
    return _pool(input, pooling("max", kernel_size, stride or None, padding, dilation, ceil_mode))


def avg_pool2d(
    name: Name, input: Tensor, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Call:  # fmt: skip
    """torch.nn.functional.avg_pool2d."""
    step = pooling("mean", kernel_size, stride or None, padding, 1, ceil_mode,
                   count_include_pad, divisor_override)  # fmt: skip
    return _pool(input, step)


def pad(
    name: Name, input: Tensor, pad: Sequence[int], mode: str = "constant",
    value: float | None = None,
) -> Call:  # fmt: skip
    """torch.nn.functional.pad with zeros around maps."""
    _maps("padding", input)
    if mode != "constant" or value or len(pad) not in (2, 4) or min(pad) < 0:
        raise Unsupported(f"padding {tuple(pad)}, mode {mode}; zeros around maps are covered")
    left, right, top, bottom = (*pad, 0, 0)[:4]
    batch, channels, height, width = input.shape
    shape = (batch, channels, height + top + bottom, width + left + right)
    return Call(net.Padding(top, bottom, left, right), (input,), shape, "pad")


def _adaptive(kind: str, input: Tensor, output_size: Any) -> Call:
    _maps("adaptive pooling", input)
    sizes = output_size if isinstance(output_size, Sequence) else (output_size,) * 2
    windows = []
    for n, wanted in zip(input.shape[2:], sizes, strict=True):
        out = n if wanted is None else wanted
        if not 0 < out <= n or n % out:
            raise Unsupported(f"adaptive pooling of {n} to {out}: windows of several sizes")
        windows.append(Window(n // out, n // out))
    rows, cols = windows
    return _pool(input, Pooling(kind, rows, cols))


def adaptive_avg_pool2d(name: Name, input: Tensor, output_size: Any) -> Call:
    """torch.nn.functional.adaptive_avg_pool2d where all windows are of one size."""
    return _adaptive("mean", input, output_size)


def adaptive_max_pool2d(
    name: Name, input: Tensor, output_size: Any, return_indices: bool = False
) -> Call:
    """torch.nn.functional.adaptive_max_pool2d where all windows are of one size."""
    if return_indices:
        raise Unsupported("adaptive_max_pool2d with return_indices")
    return _adaptive("max", input, output_size)


def mean(
    name: Name, input: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Call:
    """torch.mean over height and width."""
    axes = sorted(d % input.dim() for d in dim) if isinstance(dim, Sequence) else dim
    if input.dim() != 4 or axes != [2, 3] or dtype is not None or not input.numel():
        raise Unsupported("mean over other axes than height and width of a map")
    rows, cols = (Window(n, n) for n in input.shape[2:])
    pool = Pool.of(Pooling("mean", rows, cols), *input.shape)
    shape = pool.out_shape if keepdim else pool.out_shape[:2]
    return Call(net.Pooling(pool), (input,), shape, "mean")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _affine(kind: str, input: Tensor, scale: float, shift: float, in_place: bool) -> Call:
    _maps(kind, input)
    if not max(abs(scale), abs(shift)) <= torch.finfo(torch.float32).max or shift != shift:
        raise Unsupported(f"{kind} of a number beyond float32")
    op = net.BatchNorm(net.Constants(input.shape[1], float(scale), float(shift)))
    return Call(op, (input,), tuple(input.shape), kind, in_place)


def _arithmetic(kind: str, in_place: bool = False) -> Callable[..., Call]:
    def call(name: Name, input: Any, other: Any, *, alpha: float = 1, out: Any = None) -> Call:
        if _is_number(other) and isinstance(input, Tensor) and out is None:
            scale, shift = (1, other * alpha) if kind == "add" else (other, 0)
            return _affine(kind, input, scale, shift, in_place)
        if out is not None or alpha != 1:
            raise Unsupported(f"{kind} with alpha={alpha} or out=")
        a, b = input, other
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            raise Unsupported(f"{kind} of {type(a).__name__} and {type(b).__name__}")
        if not in_place and a.shape != b.shape and tuple(a.shape[2:]) == (1, 1):
            a, b = b, a  # the one that is broadcast comes second
        _maps(kind, a, b)
        if a.shape != b.shape and tuple(b.shape) != (*a.shape[:2], 1, 1):
            raise Unsupported(f"{kind} of shapes {tuple(a.shape)} and {tuple(b.shape)}")
        return Call(net.Arithmetic(kind), (a, b), tuple(a.shape), kind, in_place)

    return call


def _number(kind: str, in_place: bool = False) -> Callable[..., Call]:
    """Difference and quotient of a tensor and a number."""

    def call(name: Name, input: Tensor, other: Any, *, alpha: float = 1, **more: Any) -> Call:
        if more or not _is_number(other) or not isinstance(input, Tensor):
            raise Unsupported(f"{kind} of other things than a tensor and a number")
        if kind == "div" and not other:
            raise Unsupported("division by 0")
        scale, shift = (1, -alpha * other) if kind == "sub" else (1 / other, 0)
        return _affine(kind, input, scale, shift, in_place)

    return call


def cat(name: Name, tensors: Sequence[Tensor], dim: int = 0, *, out: Any = None) -> Call:
    """torch.cat of channels."""
    _maps("concatenation", *tensors)
    if dim % 4 != 1 or out is not None or not tensors:
        raise Unsupported(f"concatenation along dim={dim}; channels (dim=1) are covered")
    batch, _, height, width = tensors[0].shape
    if any((t.shape[0], *t.shape[2:]) != (batch, height, width) for t in tensors):
        raise Unsupported("concatenation of maps of several sizes")
    shape = (batch, sum(t.shape[1] for t in tensors), height, width)
    return Call(net.Concat(), tuple(tensors), shape, "cat")


def _flat(input: Tensor) -> Call | Tensor:
    if input.dim() == 2:
        return input
    _maps("flatten", input)
    batch, *rest = input.shape
    size = rest[0] * rest[1] * rest[2]
    return Call(net.Flatten(), (input,), (batch, size), "flatten", view=True)


def flatten(name: Name, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Call | Tensor:
    """torch.flatten of all axes but the batch."""
    if start_dim % input.dim() != 1 or end_dim % input.dim() != input.dim() - 1:
        raise Unsupported(f"flatten from {start_dim} to {end_dim}; from 1 to the last is covered")
    return _flat(input)


def view(name: Name, input: Tensor, *shape: Any) -> Call | Tensor:
    """torch.Tensor.view and reshape to (N, everything else)."""
    sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape)
    if len(sizes) != 2 or not all(isinstance(n, int) for n in sizes) or input.dim() != 4:
        raise Unsupported("a view other than (N, C*H*W)")
    batch, size = input.shape[0], input.shape[1:].numel()
    if sizes not in ([batch, size], [batch, -1], [-1, size]) or not batch * size:
        raise Unsupported(f"a view of {tuple(input.shape)} as {tuple(sizes)}")
    return _flat(input)


def linear(name: Name, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    """torch.nn.functional.linear."""
    if input.dim() != 2 or input.shape[1] != weight.shape[1]:
        raise Unsupported(f"linear of shapes {tuple(input.shape)} and {tuple(weight.shape)}")
    shape = (input.shape[0], weight.shape[0])
    return Call(net.Linear(_known(name, weight), name(bias)), (input,), shape, "linear")


def dropout(
    name: Name, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """torch.nn.functional.dropout where it drops nothing."""
    if training and p != 0:
        raise Unsupported("dropout while training")
    return input


ELEMENTWISE = {
    "relu": (F.relu, torch.relu, Tensor.relu, F.relu_, torch.relu_, Tensor.relu_),
    "relu6": (F.relu6,),
    "silu": (F.silu,),
    "hardswish": (F.hardswish,),
    "hardsigmoid": (F.hardsigmoid,),
    "sigmoid": (F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.sigmoid_, Tensor.sigmoid_),
    "tanh": (F.tanh, torch.tanh, Tensor.tanh, torch.tanh_, Tensor.tanh_),
}
"""An activation's name and PyTorch's functions for it; those ending in _ work in place."""

CALLS: dict[Any, Callable[..., Call | Tensor]] = {
    **dict.fromkeys((F.conv2d, torch.conv2d), conv2d),
    F.batch_norm: batch_norm,
    **{
        f: (_in_place if f.__name__.endswith("_") else _plain)(name)
        for name, functions in ELEMENTWISE.items()
        for f in functions
    },
    F.leaky_relu: leaky_relu,
    F.hardtanh: hardtanh,
    F.gelu: gelu,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), max_pool2d),
    F.avg_pool2d: avg_pool2d,
    **dict.fromkeys((F.pad, torch._C._nn.pad), pad),
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    F.adaptive_max_pool2d: adaptive_max_pool2d,
    **dict.fromkeys((torch.mean, Tensor.mean), mean),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, operator.add), _arithmetic("add")),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _arithmetic("add", in_place=True)),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__), _arithmetic("mul")),
    **dict.fromkeys((Tensor.mul_, Tensor.__imul__), _arithmetic("mul", in_place=True)),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _number("sub")),
    **dict.fromkeys((Tensor.sub_, Tensor.__isub__), _number("sub", in_place=True)),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _number("div")),
    **dict.fromkeys((Tensor.div_, Tensor.__itruediv__), _number("div", in_place=True)),
    **dict.fromkeys((torch.cat, torch.concat), cat),
    **dict.fromkeys((torch.flatten, Tensor.flatten), flatten),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), view),
    F.linear: linear,
    F.dropout: dropout,
    F.dropout2d: dropout,
}
"""PyTorch's function -> its operation."""
