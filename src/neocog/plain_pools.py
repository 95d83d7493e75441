"""Pools as other programs know them: every window as large, no rounding up, no divisor of its own.

In ceil mode PyTorch's last window may hang over the end (:meth:`neocog.geometry.Window.out_size`).
ONNX rounds up likewise, but which windows it drops, and by how much an average of a hanging one is
divided, has changed between versions and differs between the checker, shape inference and engines
(https://onnx.ai/onnx/operators/onnx__MaxPool.html). Here the input gets its margin beforehand, so
that whole windows fit exactly; sizes are numbers by then, only the batch is a symbol.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Window

aten = torch.ops.aten

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _windows(
    axes: int, size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[Window, ...]:
    sizes, low, apart = (_each(axes, value) for value in (size, padding, dilation))
    steps = _each(axes, stride) if stride not in ((), [], None) else sizes
    return tuple(
        Window(k, s, d, p, p, ceil=ceil_mode)
        for k, s, d, p in zip(sizes, steps, apart, low, strict=True)
    )


def _each(axes: int, value: int | Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _margins(windows: Sequence[Window], sizes: Sequence[int]) -> list[int]:
    """What :func:`torch.nn.functional.pad` adds so that the windows fit, the last axis first.

    Up to the last window's end, which may lie before the input's: then it is cut.
    """
    found: list[int] = []
    for window, n in zip(reversed(windows), reversed(sizes), strict=True):
        end = (window.out_size(n) - 1) * window.stride + window.span
        found += [window.low, end - window.low - n]
    return found


def _max_pool(axes: int) -> Callable[..., Tensor]:
    def spelled(x, size, stride=(), padding=0, dilation=1, ceil_mode=False):
        windows = _windows(axes, size, stride, padding, dilation, ceil_mode)
        if not ceil_mode or not x.is_floating_point():
            return NotImplemented  # it stays as it is
        padded = F.pad(x, _margins(windows, x.shape[-axes:]), value=-math.inf)
        steps, apart = [w.stride for w in windows], [w.dilation for w in windows]
        return _MAX[axes](padded, [w.size for w in windows], steps, 0, apart)

    return spelled


def _max_pool_with_indices(axes: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def spelled(x, size, stride=(), padding=0, dilation=1, ceil_mode=False):
        windows = _windows(axes, size, stride, padding, dilation, ceil_mode)
        if not ceil_mode or not x.is_floating_point():
            return NotImplemented
        sizes = x.shape[-axes:]
        margins = _margins(windows, sizes)
        padded = F.pad(x, margins, value=-math.inf)
        steps, apart = [w.stride for w in windows], [w.dilation for w in windows]
        kernel = [w.size for w in windows]
        best, places = _MAX[axes](padded, kernel, steps, 0, apart, return_indices=True)
        found, rest = torch.zeros_like(places), places
        weight = 1
        for axis in range(1, axes + 1):  # from places on the padded map to those on the map
            wide = padded.shape[-axis]
            found = found + weight * (rest % wide - margins[2 * (axis - 1)])
            rest = rest // wide
            weight *= sizes[-axis]
        return best, found

    return spelled


def _average_pool(axes: int) -> Callable[..., Tensor]:
    def spelled(x, size, stride=(), padding=0, ceil_mode=False, include=True, divisor=None):
        if divisor is None and not ceil_mode:
            return NotImplemented
        windows = _windows(axes, size, stride, padding, 1, ceil_mode)
        sizes = x.shape[-axes:]
        margins = _margins(windows, sizes)
        kernel, steps = [w.size for w in windows], [w.stride for w in windows]
        # zeros up to the last window's end, so that every window has as many numbers
        mean = _AVERAGE[axes](F.pad(x, margins), kernel, steps)
        if divisor is not None:
            return mean * (math.prod(kernel) / divisor)
        # the share of each window that counts: on the input, or on its own padding too
        ones = x.new_ones([1] * (x.ndim - axes) + list(sizes))
        if include:
            own = [w.low for w in reversed(windows) for _ in range(2)]
            ones = F.pad(ones, own, value=1.0)
            margins = [margin - low for margin, low in zip(margins, own, strict=True)]
        return mean / _AVERAGE[axes](F.pad(ones, margins), kernel, steps)

    return spelled


SPELLED_OUT: dict[Any, Callable[..., Any]] = {
    aten.max_pool1d.default: _max_pool(1),
    aten.max_pool2d.default: _max_pool(2),
    aten.max_pool3d.default: _max_pool(3),
    aten.max_pool1d_with_indices.default: _max_pool_with_indices(1),
    aten.max_pool2d_with_indices.default: _max_pool_with_indices(2),
    aten.max_pool3d_with_indices.default: _max_pool_with_indices(3),
    aten.avg_pool1d.default: _average_pool(1),
    aten.avg_pool2d.default: _average_pool(2),
    aten.avg_pool3d.default: _average_pool(3),
}
"""Pools that PyTorch rounds up or divides in a way of its own, by PyTorch's plain ones."""
