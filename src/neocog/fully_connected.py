"""Fully connected layers while training: PyTorch's products, and the largest gradients last.

The gradient of a weight may be the largest tensor of a whole step (VGG: 411 MB of 531), and nothing
but the optimiser waits for it. So it is computed when the gradients of all layers before have been,
and what was kept for those is gone: the peak of memory is that much lower. Autograd runs functions
that are ready in the opposite order of their making (its sequence numbers): a function made before
all others, which the weight passes on its way to its layer, comes last.

https://docs.pytorch.org/docs/stable/notes/extending.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import POOL


@dataclass
class Late:
    """A weight (K, C) whose gradient is computed last."""

    weight: Tensor
    """For its layer to read."""
    factors: tuple[Tensor, Tensor] | None = None
    """Gradient of the layer's result (N, K) and its input (N, C), from its backward pass on."""


def late(weights: Sequence[Tensor]) -> list[Late]:
    """One for each weight, in the order of their layers; before anything else is computed.

    Their gradients come in that order: the last layers' at the very end.
    """
    made = [Late(weight) for weight in weights]
    for one in reversed(made):
        one.weight = _Late.apply(one.weight, one)
    return made


def linear(x: Tensor, weight: Late, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` of (N, C)."""
    return _Linear.apply(x, weight.weight, bias, weight)


class _Late(torch.autograd.Function):
    """(weight, where its gradient comes from) -> weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, one: Late) -> Tensor:
        ctx.one = one
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (given,), factors, ctx.one.factors = grads, ctx.one.factors, None
        if factors is None:
            return given, None
        grad, x = factors
        product = torch.mm(grad.t(), x, out=POOL.empty(given.shape))
        alone = not any(given.stride())  # else a gradient of another way has been added
        return product if alone else product.add_(given), None


class _Linear(torch.autograd.Function):
    """(x, weight, bias or None, the late weight) -> x weight^T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, one: Late) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.one = one
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        gw, ctx.one.factors = None, None
        if for_weight and torch.is_grad_enabled():  # to be differentiated again
            gw = grad.t() @ x
        elif for_weight:
            ctx.one.factors = grad, x
            gw = grad.new_zeros(1).expand(weight.shape)  # stands for the gradient: has its shape
        return grad @ weight if for_x else None, gw, grad.sum(0) if for_bias else None, None
