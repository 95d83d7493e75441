"""PyTorch's functions whose gradients neocog compiles, each as an operation of a network.

A part of :mod:`neocog.layer_calls`, with batch norm as it is while training. What is missing here
runs in PyTorch while gradients are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layer_calls as calls
from . import network as net
from .activations import ACTIVATIONS
from .errors import Unsupported
from .layer_calls import Call, Name


def batch_norm(
    name: Name, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Call:  # fmt: skip
    """torch.nn.functional.batch_norm, with the statistics of the batch where ``training``."""
    if not training:
        return calls.batch_norm(name, input, running_mean, running_var, weight, bias, False,
                                momentum, eps)  # fmt: skip
    batch, channels, height, width = _map(input)
    if batch * height * width < 2:
        raise Unsupported("batch norm of one value per channel")
    if not isinstance(momentum, float) or (running_mean is None) != (running_var is None):
        raise Unsupported(f"batch norm with momentum={momentum!r} or one running statistic")
    norm = net.BatchStatistics(
        name(running_mean), name(running_var), name(weight), name(bias), float(eps), momentum
    )
    return Call(net.BatchNorm(norm), (input,), tuple(input.shape), "batch_norm")


def _map(input: Tensor) -> tuple[int, int, int, int]:
    if input.dim() != 4 or not input.numel():
        raise Unsupported(f"an input of shape {tuple(input.shape)}, maps (N, C, H, W) are covered")
    batch, channels, height, width = input.shape
    return batch, channels, height, width


def _checked(call: Callable[..., Call | Tensor]) -> Callable[..., Call | Tensor]:
    """``call``, Unsupported where no kernel computes the gradient."""

    @functools.wraps(call)
    def checked(name: Name, *args: Any, **kwargs: Any) -> Call | Tensor:
        made = call(name, *args, **kwargs)
        if isinstance(made, Call):
            for t in made.inputs if not isinstance(made.op, net.Linear) else ():
                _map(t)
            _check(made.op, made)
        return made

    return checked


def _check(op: net.Op, made: Call) -> None:
    match op:
        case net.Activation(act) if ACTIVATIONS[act.name].derivative_from_output is None:
            raise Unsupported(f"the gradient of {act}: its result does not tell it")
        case net.Arithmetic(kind) if kind != "add" or made.inputs[0].shape != made.inputs[1].shape:
            raise Unsupported(f"the gradient of {kind} with shapes that differ, or of a product")
        case net.BatchNorm(norm=net.Constants()):
            raise Unsupported("the gradient of arithmetic with a number")
    if 0 in made.shape:
        raise Unsupported(f"a result of shape {made.shape}")


_ADD = (torch.add, Tensor.add, Tensor.__add__, Tensor.add_, Tensor.__iadd__)
_LAYERS = (
    F.conv2d, torch.conv2d, F.leaky_relu, F.hardtanh, F.max_pool2d, torch.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.mean, Tensor.mean, F.dropout, F.dropout2d,
    F.linear,
)  # fmt: skip

TRAINING_CALLS: dict[Any, Callable[..., Call | Tensor]] = {
    f: _checked(call)
    for f, call in {
        **{f: calls.CALLS[f] for f in (*_LAYERS, *_ADD)},
        **{f: calls.CALLS[f] for functions in calls.ELEMENTWISE.values() for f in functions},
        F.batch_norm: batch_norm,
    }.items()
}
"""PyTorch's function -> its operation."""
