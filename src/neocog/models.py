"""Networks from one line, in the shorthand of the field.

It names the layers from the input to the output, joined by ``-``:

    32C3   32 kernels of 3x3, zero padding that keeps the size, ReLU
    32C3p1 likewise, with a zero padding of 1 on every side; p0: none
    P2     max pool: 2x2 windows side by side
    A2     average pool, likewise
    120    fully connected to 120 units, ReLU
    10     the last one: fully connected to 10 classes, no activation

``32C3-P2-64C3-P2-10`` is the network of ``neocog train``, ``64-10`` a multilayer perceptron. A
pool right behind a convolution is fused with it into one :class:`neocog.nn.ConvBlock`.

Well-known networks in plain torch.nn are here as well, from :mod:`neocog.architectures`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from . import nn as neocog_nn
from .architectures import (
    ARCHITECTURES,
    digits,
    mobilenet_v2,
    resnet18,
    resnet50,
    squeezenet,
    vgg11,
    vgg16,
)
from .errors import InvalidModel, InvalidProblem
from .geometry import Window

__all__ = [
    "ARCHITECTURES", "class_count", "digits", "has_convolution", "layers", "mlp_beside",
    "mobilenet_v2", "parse", "plain", "resnet18", "resnet50", "squeezenet", "vgg11", "vgg16",
    "weight_count",
]  # fmt: skip

Shape = tuple[int, int, int]
"""(channels, height, width)."""

WEIGHT_LIMIT = 2**30
"""Weights of one layer, 4 GiB in float32: more is a slip of the finger, not a network to train."""


@dataclass(frozen=True)
class Convolution:
    """``<kernels>C<size>``: that many square kernels, ReLU.

    ``p<padding>`` behind it pads every side by so much; None is 'same' padding.
    """

    kernels: int
    size: int
    padding: int | None = None


@dataclass(frozen=True)
class Pool:
    """``P<size>`` (kind max) or ``A<size>`` (kind mean): windows side by side."""

    kind: str
    size: int


@dataclass(frozen=True)
class Dense:
    """``<units>``: fully connected."""

    units: int


Layer = Convolution | Pool | Dense

_TOKEN = re.compile(
    r"(?P<kernels>[0-9]{1,9})C(?P<conv>[0-9]{1,9})(p(?P<padding>[0-9]{1,9}))?"
    r"|(?P<kind>[PA])(?P<pool>[0-9]{1,9})|(?P<units>[0-9]{1,9})"
)


def layers(architecture: str, *, headless: bool = False) -> tuple[Layer, ...]:
    """The layers that a shorthand names; ``headless``: it need not end with the classes.

    Raises:
        InvalidModel: naming the token that is wrong and what was expected.
    """
    tokens = architecture.strip().split("-")
    found = tuple(
        _layer(token.strip(), position, architecture) for position, token in enumerate(tokens, 1)
    )
    for token, layer, above in zip(tokens, found, found[1:], strict=False):
        if isinstance(layer, Dense) and not isinstance(above, Dense):
            raise InvalidModel(
                f"architecture {architecture!r}: {token!r} is fully connected and leaves no rows "
                "and columns for the convolution or pool behind it"
            )
    if not headless and not isinstance(found[-1], Dense):
        raise InvalidModel(
            f"architecture {architecture!r}: ends with {tokens[-1]!r}, expected the number of "
            "classes, as in 32C3-P2-10"
        )
    return found


def class_count(architecture: str) -> int:
    """The number of classes a shorthand ends with; errors as :func:`layers`."""
    last = layers(architecture)[-1]
    assert isinstance(last, Dense)
    return last.units


def has_convolution(architecture: str) -> bool:
    """Whether a shorthand names a convolution; errors as :func:`layers`."""
    return any(isinstance(layer, Convolution) for layer in layers(architecture))


def parse(
    architecture: str, in_shape: Shape = (1, 28, 28), *, headless: bool = False
) -> nn.Sequential:
    """The network a shorthand stands for, with PyTorch's default initialisation.

    Args:
        architecture: see the module's docstring.
        in_shape: (C, H, W) of one picture.
        headless: it may end with a convolution or a pool: layers to look at, not to train.

    Returns:
        A module from float32 [N, C, H, W] to logits float32 [N, classes], or to the maps that the
        last convolution or pool gives.

    Raises:
        InvalidModel: a token that means nothing, naming it.
        InvalidProblem: a kernel or pool larger than what reaches it, with the formula and its
            numbers, or a layer too large to hold.
    """
    if len(in_shape) != 3 or any(size < 1 for size in in_shape):
        raise InvalidProblem(
            f"in_shape {tuple(in_shape)}: expected (channels, height, width), each at least 1"
        )
    # First all sizes, so that no weight is allocated for a network that cannot be.
    plan = list(_sized(layers(architecture, headless=headless), in_shape, architecture))
    return nn.Sequential(*_modules(plan))


def plain(model: nn.Sequential) -> nn.Sequential:
    """The same network in torch.nn's own layers, which share the weights of ``model``.

    For ``model`` as :func:`parse` makes it; a fused block becomes its convolution, ReLU and pool.
    This is what ``torch.compile`` sees best, and what PyTorch would compute by itself.
    """
    return nn.Sequential(*(layer for module in model for layer in _plain_layers(module)))


def weight_count(model: nn.Module) -> int:
    """The numbers a model learns, biases included."""
    return sum(parameter.numel() for parameter in model.parameters())


def mlp_beside(cnn: nn.Module, in_shape: Shape, classes: int) -> str:
    """The shorthand of the smallest one-hidden-layer perceptron with at least as many weights.

    With I inputs, h hidden units and K classes it has ``h*(I+1) + K*(h+1)`` weights; h is the
    smallest for which that reaches ``weight_count(cnn)``.
    """
    inputs = math.prod(in_shape)
    missing = weight_count(cnn) - classes
    hidden = max(1, -(-missing // (inputs + 1 + classes)))
    return f"{hidden}-{classes}"


def _layer(token: str, position: int, architecture: str) -> Layer:
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise InvalidModel(
            f"architecture {architecture!r}: token {position}, {token!r}, means nothing; expected "
            "32C3 (32 kernels of 3x3; 32C3p0: padding 0), P2 (max pool 2), A2 (average pool 2) or "
            "a number of units"
        )
    groups = match.groupdict()
    if any(groups[key] and int(groups[key]) == 0 for key in ("kernels", "conv", "pool", "units")):
        raise InvalidModel(
            f"architecture {architecture!r}: token {position}, {token!r}: expected numbers of at "
            "least 1"
        )
    if groups["kernels"]:
        padding = None if groups["padding"] is None else int(groups["padding"])
        return Convolution(int(groups["kernels"]), int(groups["conv"]), padding)
    if groups["kind"]:
        return Pool({"P": "max", "A": "mean"}[groups["kind"]], int(groups["pool"]))
    return Dense(int(groups["units"]))


def _sized(
    found: tuple[Layer, ...], in_shape: Shape, architecture: str
) -> Iterator[tuple[Layer, Shape]]:
    """Each layer with the (C, H, W) that reaches it; what is fully connected counts as 1x1."""
    channels, height, width = in_shape
    for position, layer in enumerate(found, 1):
        yield layer, (channels, height, width)
        where = f"architecture {architecture!r}, layer {position}"
        if isinstance(layer, Convolution):
            _check_weights(layer.kernels * channels * layer.size**2, where)
            channels = layer.kernels
            if layer.padding is not None:
                window = Window(layer.size, low=layer.padding, high=layer.padding)
                height, width = _through(window, height, width, f"{where}: kernel")
        elif isinstance(layer, Pool):
            window = Window(layer.size, stride=layer.size)
            height, width = _through(window, height, width, f"{where}: pool")
        else:
            _check_weights(layer.units * channels * height * width, where)
            channels, height, width = layer.units, 1, 1


def _through(window: Window, height: int, width: int, what: str) -> tuple[int, int]:
    """The size behind a square window; InvalidProblem if it is larger than what reaches it."""
    for axis, n in (("height", height), ("width", width)):
        if window.out_size(n) < 1:
            padded = f", padded by {window.low}" if window.low else ""
            raise InvalidProblem(
                f"{what} {window.size}x{window.size} is larger than the {height}x{width} that "
                f"reach it{padded}: {axis} {window.formula(n)}, expected at least 1"
            )
    return window.out_size(height), window.out_size(width)


def _check_weights(count: int, where: str) -> None:
    if count > WEIGHT_LIMIT:
        raise InvalidProblem(
            f"{where}: {count:,} weights ({4 * count / 2**30:,.0f} GiB), expected at most "
            f"{WEIGHT_LIMIT:,}"
        )


def _modules(plan: list[tuple[Layer, Shape]]) -> Iterator[nn.Module]:
    flat = False
    for position, (layer, (channels, height, width)) in enumerate(plan):
        before = plan[position - 1][0] if position else None
        above = plan[position + 1][0] if position + 1 < len(plan) else None
        if isinstance(layer, Convolution):
            pool = _pool(above) if isinstance(above, Pool) else None
            yield neocog_nn.ConvBlock(
                channels,
                layer.kernels,
                layer.size,
                padding="same" if layer.padding is None else layer.padding,
                activation="relu",
                pool=pool,
            )
        elif isinstance(layer, Pool):
            if not isinstance(before, Convolution):  # else it is part of the block
                yield _pool(layer)
        else:
            if not flat:
                yield nn.Flatten()
                flat = True
            yield nn.Linear(channels * height * width, layer.units)
            if above is not None:
                yield nn.ReLU()


def _plain_layers(module: nn.Module | None) -> Iterator[nn.Module]:
    if isinstance(module, neocog_nn.ConvBlock):
        with torch.device("meta"):  # its weights are the block's
            conv = nn.Conv2d(
                module.in_channels,
                module.out_channels,
                tuple(module.kernel_size),  # type: ignore[arg-type]
                padding=module.padding,  # type: ignore[arg-type]
            )
        conv.weight, conv.bias = module.weight, module.bias
        yield from (conv, nn.ReLU(), *_plain_layers(module.pool))
    elif isinstance(module, nn.MaxPool2d):
        yield nn.MaxPool2d(module.kernel_size)
    elif isinstance(module, nn.AvgPool2d):
        yield nn.AvgPool2d(module.kernel_size)
    elif module is not None:
        yield module


def _pool(layer: Pool) -> neocog_nn.MaxPool2d | neocog_nn.AvgPool2d:
    if layer.kind == "max":
        return neocog_nn.MaxPool2d(layer.size)
    return neocog_nn.AvgPool2d(layer.size)
