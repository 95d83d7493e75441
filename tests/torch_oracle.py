"""The same problems as torch computes them, the numbers to feed both, and how to compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from neocog.problem import Act, Add, Affine, Bias, Block, Conv, Pool

Array = NDArray[Any]


def integers(shape: tuple[int, ...], seed: int) -> Array:
    """Small whole numbers, ties and zeros among them: sums of their products are exact."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float64)


def normals(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def tensor(array: Array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


# What torch is asked to compute the same.


def torch_conv(problem: Conv, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    rows, cols = problem.rows, problem.cols
    if (rows.base_dilation, cols.base_dilation) != (1, 1):
        height = (problem.height - 1) * rows.base_dilation + 1
        width = (problem.width - 1) * cols.base_dilation + 1
        spread = torch.zeros(*problem.in_shape[:2], height, width, dtype=x.dtype)
        spread[:, :, :: rows.base_dilation, :: cols.base_dilation] = x
        x = spread
    frame = (cols.low, cols.high, rows.low, rows.high)
    # In two steps: torch refuses to cut off more than there was before padding.
    x = F.pad(x, [max(p, 0) for p in frame])
    x = F.pad(x, [min(p, 0) for p in frame])
    return F.conv2d(
        x,
        w,
        stride=(rows.stride, cols.stride),
        dilation=(rows.dilation, cols.dilation),
        groups=problem.groups,
    )


def torch_max(problem: Pool, x: torch.Tensor) -> tuple[torch.Tensor, Array]:
    """The maxima and, from torch's indices into the map, the winners as taps."""
    rows, cols = problem.rows, problem.cols
    padding = (rows.low, cols.low)
    if (rows.high, cols.high) != padding:
        assert not rows.ceil, "torch's ceil mode depends on the padding being its own"
        x = F.pad(x, (cols.low, cols.high, rows.low, rows.high), value=-math.inf)
        padding = (0, 0)
    out, indices = F.max_pool2d(
        x,
        kernel_size=(rows.size, cols.size),
        stride=(rows.stride, cols.stride),
        padding=padding,
        dilation=(rows.dilation, cols.dilation),
        ceil_mode=rows.ceil,
        return_indices=True,
    )
    ih, iw = np.divmod(indices.numpy(), x.shape[3])
    oh = np.arange(out.shape[2])[:, None]
    ow = np.arange(out.shape[3])
    kh = (ih + padding[0] - oh * rows.stride) // rows.dilation
    kw = (iw + padding[1] - ow * cols.stride) // cols.dilation
    return out, kh * cols.size + kw


def torch_mean(problem: Pool, x: torch.Tensor) -> torch.Tensor:
    rows, cols = problem.rows, problem.cols
    padding = (rows.low, cols.low)
    if (rows.high, cols.high) != padding:
        assert not rows.ceil and problem.count_include_pad
        x = F.pad(x, (cols.low, cols.high, rows.low, rows.high))
        padding = (0, 0)
    return F.avg_pool2d(
        x,
        kernel_size=(rows.size, cols.size),
        stride=(rows.stride, cols.stride),
        padding=padding,
        ceil_mode=rows.ceil,
        count_include_pad=problem.count_include_pad,
        divisor_override=problem.divisor_override,
    )


def torch_activation(act: Act, x: torch.Tensor) -> torch.Tensor:
    """An activation in PyTorch's own operators."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "identity": lambda v: v * 1,
        "relu": F.relu,
        "leaky_relu": lambda v: F.leaky_relu(v, act.slope),
        "relu6": F.relu6,
        # F.hardsigmoid's gradient is the 1 / 6 of float32, also for float64.
        "hardsigmoid": lambda v: F.relu6(v + 3) / 6,
        "hardswish": F.hardswish,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    }
    return functions[act.name](x)


def torch_block(problem: Block, given: dict[str, torch.Tensor]) -> torch.Tensor:
    value = torch_conv(problem.conv, given["x"], given["w"])
    for step in problem.epilogue:
        if isinstance(step, Bias):
            value = value + given["bias"][:, None, None]
        elif isinstance(step, Affine):
            value = value * given["scale"][:, None, None] + given["shift"][:, None, None]
        elif isinstance(step, Add):
            value = value + given["residual"]
        elif isinstance(step, Act):
            value = torch_activation(step, value)
        else:
            assert problem.pool is not None
            kind = problem.pool.kind
            value = (
                torch_max(problem.pool, value)[0]
                if kind == "max"
                else torch_mean(problem.pool, value)
            )
    return value


def torch_grads(out: torch.Tensor, g: Array, *inputs: torch.Tensor) -> list[Array]:
    return [grad.numpy() for grad in torch.autograd.grad(out, inputs, torch.tensor(g))]


def close(ours: Array, theirs: Array | torch.Tensor) -> None:
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def equal(ours: Array, theirs: Array | torch.Tensor) -> None:
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    np.testing.assert_array_equal(ours, theirs, strict=True)
