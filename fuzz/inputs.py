"""The tensors that programs are called with, in every layout that PyTorch knows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .program import Input

LAYOUTS = (
    "dense", "channels_last", "permuted", "sliced", "expanded", "transposed", "offset", "stepped",
    "negative",
)  # fmt: skip
DATA = ("normal", "whole", "positive", "far", "mixed", "stain")

NUMBER = "number"
"""The layout of an argument that is a Python number."""


def _numbers(spec: Input, shape: tuple[int, ...], seed: int) -> Tensor:
    """float32 numbers, so that float64 programs get the same."""
    source = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=source, dtype=torch.float32)
    match spec.data:
        case "whole":
            return (normal * 2).round()
        case "positive":
            return normal.abs() + 0.1
        case "far":
            return normal + 20
        case "stain":  # one black pixel on top of a bright picture
            normal += 250
            normal.flatten()[0] = 0
            return normal
        case "mixed":
            return torch.where(normal > 0.5, normal.new_zeros(()), normal)
    return normal


def tensor(spec: Input, seed: int, dtype: torch.dtype) -> Tensor:
    """The tensor, a leaf."""
    shape = spec.shape

    def made(*wanted: int) -> Tensor:
        return _numbers(spec, wanted, seed).to(dtype)

    match spec.layout if len(shape) == 4 else "dense":
        case "channels_last":
            result = made(*shape).contiguous(memory_format=torch.channels_last)
        case "permuted":
            n, c, h, w = shape
            result = made(h, n, w, c).permute(1, 3, 0, 2)
        case "sliced":
            n, c, h, w = shape
            result = made(n, c + 1, h + 2, w)[:, 1:, 1:-1]
        case "expanded":
            result = made(1, *shape[1:]).expand(shape)
        case "transposed":
            n, c, h, w = shape
            result = made(n, c, w, h).transpose(2, 3)
        case "offset":
            n, *rest = shape
            result = made(n + 1, *rest)[1:]
        case "stepped":
            n, c, h, w = shape
            result = made(n, c, h, 2 * w)[..., ::2]
        case "negative":
            flat = made(*shape)
            result = torch.complex(flat, flat * -2).conj().imag
        case _:
            result = made(*shape)
    return result.detach().requires_grad_(spec.grad)


def resized(spec: Input, how: str) -> Input:
    """The same input in another call: ``batch`` or ``size`` has grown, or neither."""
    if spec.layout == NUMBER:
        return spec
    n, *rest = spec.shape
    if how == "batch":
        return replace(spec, shape=(n + 1, *rest))
    if how == "none":
        return replace(spec, shape=(0, *rest))
    if how == "size" and len(rest) == 3:
        return replace(spec, shape=(n, rest[0], rest[1] + 2, rest[2] + 1))
    return spec


def arguments(
    inputs: tuple[Input, ...], call: int, how: str, seed: int, dtype: torch.dtype
) -> list[Any]:
    """All arguments of one call."""
    return [
        0.5 + 0.25 * call
        if spec.layout == NUMBER
        else tensor(resized(spec, how), seed + 100 * call + i, dtype)
        for i, spec in enumerate(inputs)
    ]
