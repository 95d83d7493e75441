"""Convolution and pooling modules computed by neocog's kernels.

Drop-in for their ``torch.nn`` namesakes: the same constructors, the same state dict keys.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as torch_functional
from torch import Tensor, nn

from . import functional as F
from .errors import InvalidProblem
from .problem import Act, Pooling, pooling


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d``; https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html.

    A ``padding_mode`` other than zeros pads in PyTorch first, as torch.nn does.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d``."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Input (N, C, H, W) or (C, H, W)."""
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class AvgPool2d(nn.AvgPool2d):
    """``torch.nn.AvgPool2d``."""

    def forward(self, input: Tensor) -> Tensor:
        """Input (N, C, H, W) or (C, H, W)."""
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class ConvBlock(nn.Conv2d):
    """Convolution, activation and pool as one kernel; its state dict is that of its Conv2d.

    ``activation``: a row of ``neocog.activations``, such as "relu", "silu", or "leaky_relu" with
    ``negative_slope``. ``pool``: a
    :class:`MaxPool2d` or :class:`AvgPool2d` (torch.nn's do as well), or None. ``forward`` takes a
    residual of the convolution's output shape, added before the activation. InvalidProblem for
    anything else.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        activation: str = "relu",
        negative_slope: float = 0.01,
        pool: nn.MaxPool2d | nn.AvgPool2d | None = None,
        **options: Any,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            **options,
        )
        act = Act(activation, negative_slope if activation == "leaky_relu" else 0.0)
        # As text, for torch.compile would make a float attribute symbolic.
        self._act = str(act)
        self.activation, self.negative_slope, self.pool = activation, negative_slope, pool
        self.pooling = pooling_of(pool)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Input (N, C, H, W) or (C, H, W)."""
        input, padding = _padded(self, input)
        return F.conv_block(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self._act,
            pool=self.pooling,
            residual=residual,
        )

    def extra_repr(self) -> str:
        """The convolution's, and the activation."""
        return f"{super().extra_repr()}, activation={self.activation}"


def pooling_of(module: nn.Module | None) -> Pooling | None:
    """What a pooling module does, as a step of an epilogue; InvalidProblem for other modules."""
    if module is None:
        return None
    if isinstance(module, nn.MaxPool2d) and not module.return_indices:
        return pooling(
            "max",
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.ceil_mode,
        )
    if isinstance(module, nn.AvgPool2d):
        return pooling(
            "mean",
            module.kernel_size,
            module.stride,
            module.padding,
            ceil_mode=module.ceil_mode,
            count_include_pad=module.count_include_pad,
            divisor_override=module.divisor_override,
        )
    raise InvalidProblem(
        f"pool must be a MaxPool2d without return_indices, an AvgPool2d or None, got {module!r}"
    )


def _padded(conv: nn.Conv2d, input: Tensor) -> tuple[Tensor, Any]:
    """The input and the zero padding left to do; other modes pad in PyTorch, as torch.nn does."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    sides = conv._reversed_padding_repeated_twice
    return torch_functional.pad(input, sides, mode=conv.padding_mode), 0
