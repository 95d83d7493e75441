"""ATen's operators that neocog compiles: how torch.export and make_fx spell their graphs.

The same operations as in :mod:`neocog.layer_calls`; where ATen orders the arguments otherwise, they
are put into order here. https://docs.pytorch.org/docs/stable/torch.compiler_ir.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import Unsupported
from .layer_calls import Call, Name

aten = torch.ops.aten

Table = Mapping[Any, Callable[..., Call | Tensor]]


def spelled_in_aten(table: Table) -> dict[Any, Callable[..., Call | Tensor]]:
    """The rows of ``table`` (PyTorch's function -> its operation) under their names in ATen."""
    return {
        operator: convert(table[function])
        for operator, (function, convert) in _SPELLINGS.items()
        if function in table
    }


def _same(call: Callable[..., Call | Tensor]) -> Callable[..., Call | Tensor]:
    return call


def _batch_norm(call: Callable[..., Call | Tensor]) -> Callable[..., Call | Tensor]:
    def batch_norm(
        name: Name, input: Tensor, weight: Tensor | None, bias: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, training: bool,
        momentum: float, eps: float, cudnn_enabled: bool = False,
    ) -> Call | Tensor:  # fmt: skip
        return call(name, input, running_mean, running_var, weight, bias, training, momentum, eps)

    return batch_norm


def _convolution(call: Callable[..., Call | Tensor]) -> Callable[..., Call | Tensor]:
    def convolution(
        name: Name, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
        padding: Sequence[int], dilation: Sequence[int], transposed: bool,
        output_padding: Sequence[int], groups: int,
    ) -> Call | Tensor:  # fmt: skip
        if transposed or input.dim() != 4:
            raise Unsupported("a transposed convolution, or one of other than 2 dimensions")
        return call(name, input, weight, bias, stride, padding, dilation, groups)

    return convolution


def _dropout(call: Callable[..., Call | Tensor]) -> Callable[..., Call | Tensor]:
    return lambda name, input, p, train: call(name, input, p, train)


def _constant_pad(call: Callable[..., Call | Tensor]) -> Callable[..., Call | Tensor]:
    return lambda name, input, pad, value=0: call(name, input, pad, "constant", value)


def _in_place(call: Callable[..., Call | Tensor]) -> Callable[..., Call | Tensor]:
    return lambda name, *args: call(name, *args, inplace=True)


_SPELLINGS: dict[Any, tuple[Any, Callable[..., Any]]] = {
    aten.conv2d.default: (F.conv2d, _same),
    aten.conv2d.padding: (F.conv2d, _same),
    aten.convolution.default: (F.conv2d, _convolution),
    torch.batch_norm: (F.batch_norm, _batch_norm),
    aten.batch_norm.default: (F.batch_norm, _batch_norm),
    aten.relu.default: (torch.relu, _same),
    aten.relu_.default: (torch.relu_, _same),
    aten.sigmoid.default: (torch.sigmoid, _same),
    aten.sigmoid_.default: (torch.sigmoid_, _same),
    aten.tanh.default: (torch.tanh, _same),
    aten.tanh_.default: (torch.tanh_, _same),
    aten.relu6.default: (F.relu6, _same),
    aten.relu6_.default: (F.relu6, _in_place),
    aten.silu.default: (F.silu, _same),
    aten.silu_.default: (F.silu, _in_place),
    aten.hardswish.default: (F.hardswish, _same),
    aten.hardswish_.default: (F.hardswish, _in_place),
    aten.hardsigmoid.default: (F.hardsigmoid, _same),
    aten.hardsigmoid_.default: (F.hardsigmoid, _in_place),
    aten.hardtanh.default: (F.hardtanh, _same),
    aten.hardtanh_.default: (F.hardtanh, _in_place),
    aten.leaky_relu.default: (F.leaky_relu, _same),
    aten.leaky_relu_.default: (F.leaky_relu, _in_place),
    aten.gelu.default: (F.gelu, _same),
    aten.max_pool2d.default: (F.max_pool2d, _same),
    aten.avg_pool2d.default: (F.avg_pool2d, _same),
    aten.adaptive_avg_pool2d.default: (F.adaptive_avg_pool2d, _same),
    aten._adaptive_avg_pool2d.default: (F.adaptive_avg_pool2d, _same),
    aten.mean.dim: (torch.mean, _same),
    aten.pad.default: (F.pad, _same),
    aten.constant_pad_nd.default: (F.pad, _constant_pad),
    aten.add.Tensor: (torch.add, _same),
    aten.add_.Tensor: (Tensor.add_, _same),
    aten.mul.Tensor: (torch.mul, _same),
    aten.mul_.Tensor: (Tensor.mul_, _same),
    aten.sub.Tensor: (torch.sub, _same),
    aten.sub_.Tensor: (Tensor.sub_, _same),
    aten.div.Tensor: (torch.div, _same),
    aten.div_.Tensor: (Tensor.div_, _same),
    aten.cat.default: (torch.cat, _same),
    aten.flatten.using_ints: (torch.flatten, _same),
    aten.view.default: (Tensor.view, _same),
    aten.reshape.default: (torch.reshape, _same),
    aten.linear.default: (F.linear, _same),
    aten.dropout.default: (F.dropout, _dropout),
}
"""ATen's operator -> PyTorch's function, and how its arguments are put into the other's order."""


def _batch_norm_at_inference(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)


def _native_batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    training: bool, momentum: float, eps: float,
) -> Tensor | None:  # fmt: skip
    return None if training else F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)


FIRST_RESULT: dict[Any, Callable[..., Tensor | None]] = {
    aten.max_pool2d_with_indices.default: F.max_pool2d,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_at_inference,
    aten.native_batch_norm.default: _native_batch_norm,
}
"""Operators with several results -> their first one in PyTorch's own functions; None if there is no
way to say it."""
