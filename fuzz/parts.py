"""What generated programs import: custom functions, hooks, results, scripted functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight


class StraightThrough(torch.autograd.Function):
    """ReLU whose gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Reversed(torch.autograd.Function):
    """The identity with its gradient times -3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -3 * g


class Scaled(torch.autograd.Function):
    """A product that saves its factors, and whose second factor gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return 2 * g * factor, None


class Convolved(torch.autograd.Function):
    """A convolution with a backward of its own that halves every gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return nn.functional.conv2d(x, w, padding=1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        back = conv2d_input(x.shape, w, g, padding=1)
        return back * 0.5, conv2d_weight(x, w.shape, g, padding=1) * 0.5


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    """Scripted."""
    return x * torch.sigmoid(x)


@torch.jit.script
def padded(x: Tensor, n: int) -> Tensor:
    """Scripted, with control flow."""
    y = x
    for _ in range(n):
        y = torch.nn.functional.pad(y, [1, 0, 0, 1])
    return torch.relu(y) if n > 1 else y


class Pair(NamedTuple):
    """A result with names."""

    first: Any
    second: Any


@dataclass
class Answer:
    """A result with fields."""

    first: Any
    second: Any


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised in every call (scaled, with a gain)."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.7))
        self.scale = 0.2

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        weight = nn.functional.batch_norm(
            flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6
        )
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int, inplace: bool):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace)
        self.b = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.b(self.act(self.norm(self.a(x)))) + x)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        return w * 2 - 0.1


# Hooks are functions of this module, so that models with hooks can be copied and compared.


def scale_result(module: nn.Module, args: Any, result: Tensor) -> Tensor:
    """A forward hook that replaces the result."""
    return result * 1.5


def look_at_result(module: Any, args: Any, result: Tensor) -> None:
    """A forward hook that keeps something."""
    module.seen = result.shape[1]


def count_calls(module: Any, args: Any, result: Tensor) -> None:
    """A forward hook that counts."""
    module.calls = getattr(module, "calls", 0) + 1


def shift_argument(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A pre-hook that replaces the argument."""
    return (args[0] + 0.25,)


def turn_gradient(module: nn.Module, into: Any, out: Any) -> Any:
    """A full backward hook that replaces the gradients of a module's inputs."""
    return tuple(None if g is None else -0.5 * g for g in into)


def keep(parameter: nn.Parameter) -> None:
    """A hook of a parameter, after its gradient is there."""
    if parameter.grad is not None:
        parameter.grad.mul_(3)


@torch.compiler.disable
def uncompiled(x: Tensor) -> Tensor:
    """A function that Dynamo leaves alone."""
    return torch.relu(x) * 2


def double(gradient: Tensor) -> Tensor:
    """A hook of a tensor."""
    return gradient * 2
