"""Tensors in, tensors out: checks a call by building its problem, then runs the program.

Layouts follow PyTorch: a channels_last input or weight gives a channels_last output, anything else
a contiguous one. Inputs that are neither are copied into a contiguous tensor first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import compiler, guard, maps
from .cpu import epilogue as ep
from .cpu import forks
from .cpu import pool as pool_kernels
from .errors import InvalidProblem, Unsupported
from .geometry import Window
from .maps import NCHW, NHWC
from .problem import (
    Act,
    Add,
    Affine,
    Bias,
    Block,
    Conv,
    Pool,
    Pooling,
    Step,
    check_shapes,
)
from .steps import read_step

forks.open_in_child(Block)

FORMATS = {NCHW: torch.contiguous_format, NHWC: torch.channels_last}


@functools.lru_cache(256)
def parse_steps(text: str) -> tuple[Step, ...]:
    """The epilogue that ``text`` spells: steps between bars, in order."""
    return tuple(read_step(part.strip()) for part in text.split("|") if part.strip())


def parse_pooling(text: str) -> Pooling:
    """The pool that ``text`` spells."""
    (step,) = parse_steps(text)
    if not isinstance(step, Pooling):
        raise InvalidProblem(f"a pool was expected, got {text!r}")
    return step


def parse_activation(text: str) -> Act:
    """The activation that ``text`` spells, such as ``leaky_relu(0.1)``."""
    step = read_step(text)
    if not isinstance(step, Act):
        raise InvalidProblem(f"an activation was expected, got {text!r}")
    return step


def spell_steps(steps: Sequence[Step]) -> str:
    """The way back of :func:`parse_steps`."""
    return " | ".join(str(s) for s in steps)


@functools.lru_cache(1024)
def block_of(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    epilogue: str,
) -> Block:
    """The checked problem of a call; InvalidProblem if its shapes fit no convolution."""
    top, bottom, left, right = padding
    check_shapes(x_shape, w_shape, groups)
    batch, channels, height, width = x_shape
    rows = Window(w_shape[2], stride[0], dilation[0], top, bottom)
    cols = Window(w_shape[3], stride[1], dilation[1], left, right)
    conv = Conv(batch, channels, height, width, w_shape[0], rows, cols, groups)
    return Block(conv, parse_steps(epilogue))


NEAR = 64
"""Padding that no halo is out of proportion with."""


def too_far(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> str | None:
    """Why the taps of a call reach too far for the kernels, if they do: ``maps.too_far``."""
    if max(padding) <= NEAR:
        return None
    x_shape = (1,) * (4 - len(x_shape)) + tuple(x_shape)
    return maps.too_far(
        block_of(x_shape, tuple(w_shape), stride, padding, dilation, groups, "").conv
    )


@functools.lru_cache(1024)
def pool_of(x_shape: tuple[int, ...], pooling: str) -> Pool:
    """The checked problem of a pooling call."""
    if len(x_shape) != 4:
        raise InvalidProblem(f"input must have 3 or 4 dimensions, got shape {x_shape}")
    return Pool.of(parse_pooling(pooling), *x_shape)


def prefers_channels_last(t: Tensor) -> bool:
    """Whether PyTorch takes ``t`` for channels_last: from its strides alone, as c10 does."""
    return strides_prefer_channels_last(t.shape, t.stride())


def strides_prefer_channels_last(shape: Sequence[Any], strides: Sequence[Any]) -> bool:
    """From the innermost to the outermost axis of NHWC strides must not fall.

    Ties, as of sizes of 1, go to the contiguous layout.
    """
    if len(shape) != 4 or strides[1] == 0:
        return False
    least: Any = 0
    for axis in (1, 3, 2, 0):
        size, stride = shape[axis], strides[axis]
        if size == 0 or stride < least or (axis == 0 and least == strides[1]):
            return False
        least = stride * size if size > 1 else stride
    return True


def output_layout(*tensors: Tensor) -> str:
    """The layout of a result computed from these."""
    return NHWC if any(prefers_channels_last(t) for t in tensors) else NCHW


def _layout(t: Tensor) -> tuple[Tensor, str]:
    """``t``, copied if need be, and the layout to read it in."""
    if t.is_contiguous(memory_format=torch.channels_last):
        return t, NHWC
    return t.contiguous(), NCHW


def _empty(shape: Sequence[int], layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a result, whatever PyTorch's default data type and device are."""
    return torch.empty(tuple(shape), dtype=dtype, device="cpu", memory_format=FORMATS[layout])


def _check_parameters(block: Block, bias: Tensor | None, residual: Tensor | None) -> None:
    for step in block.epilogue:
        if isinstance(step, Affine):
            raise Unsupported(f"{step}: the operator takes no scale and shift")
    for name, given, kind in (("bias", bias, Bias), ("residual", residual, Add)):
        expected = any(isinstance(step, kind) for step in block.epilogue)
        if expected != (given is not None):
            raise InvalidProblem(
                f"{name}: {'given' if given is not None else 'missing'}, but the epilogue "
                f"{spell_steps(block.epilogue)!r} {'has' if expected else 'has no'} "
                f"{kind.__name__} step"
            )
    per_channel = (block.conv.out_channels,)
    _check_shape("bias", bias, per_channel, "one value per output channel")
    _check_shape("residual", residual, block.conv_shape, "the convolution's output shape")


def _check_shape(name: str, t: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if t is not None and tuple(t.shape) != shape:
        raise InvalidProblem(f"{name} must have shape {shape}, {meaning}, got {tuple(t.shape)}")


def _check_winners(winners: Tensor, shape: tuple[int, ...], pooling: Pooling) -> None:
    """What the forward pass of a max pool stores, as it stores it."""
    dtype = winner_dtype(pooling)
    dense = winners.dim() == 4 and winners.is_contiguous(memory_format=torch.channels_last)
    same = tuple(winners.shape) == shape and winners.dtype == dtype
    if not same or not dense or not guard.plain(winners):
        raise InvalidProblem(
            f"winners must be what the forward pass with save=True stored: {dtype} of shape "
            f"{shape}, channels_last, got {winners.dtype} of shape {tuple(winners.shape)} and "
            f"strides {winners.stride()}"
        )


def check_readable(**tensors: Tensor | None) -> None:
    """InvalidProblem unless all tensors are plain float32 memory, as kernels read it."""
    for name, t in tensors.items():
        if t is None or (t.dtype == torch.float32 and guard.plain(t)):
            continue
        odd = guard.why_not(t) or f"dtype {t.dtype}"
        raise InvalidProblem(
            f"{name}: neocog's kernels take float32 on cpu, got {odd}; "
            "neocog.functional hands such tensors back to PyTorch"
        )


def winner_dtype(pooling: Pooling) -> torch.dtype:
    """The element type of stored winners."""
    return torch.uint8 if pool_kernels.winner_type(pooling).width == 8 else torch.int32


def conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    block: Block,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, winners, before): the block's result and, with ``save``, what backward needs of it."""
    check_readable(x=x, weight=weight, bias=bias, residual=residual)
    _check_parameters(block, bias, residual)
    layout = output_layout(x, weight)
    out = _empty(block.out_shape, layout)
    x, x_layout = _layout(x)
    program = compiler.forward(block, x_layout, weight.stride(), layout, save)
    pooling = ep.pooling_of(block.epilogue)
    saved = {}
    if pooling is not None and "winners" in program.names:
        saved["winners"] = _empty(block.out_shape, NHWC, winner_dtype(pooling))
    if "before" in program.names:
        saved["before"] = _empty(block.conv_shape, NHWC)
    buffers = [x, weight]
    if bias is not None:
        buffers.append(bias.contiguous())
    if residual is not None:
        buffers.append(residual.contiguous(memory_format=torch.channels_last))
    buffers += [out, *saved.values()]
    program.run(*(t.data_ptr() for t in buffers))
    winners, before = saved.get("winners"), saved.get("before")
    return (
        out,
        x.new_empty(0, dtype=torch.uint8) if winners is None else winners,
        x.new_empty(0) if before is None else before,
    )


def conv_block_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    result: Tensor | None,
    winners: Tensor,
    block: Block,
    needs: tuple[str, ...],
) -> dict[str, Tensor]:
    """Gradients of the inputs named in ``needs`` (of x, w, bias, residual).

    ``result``: the activation's result (see :func:`neocog.compiler.saved_names`).
    """
    check_readable(grad=grad, x=x, weight=weight, result=result)
    _check_shape("grad", grad, block.out_shape, "the shape of the block's output")
    pooled = block.pool
    selects = pooled is not None and pooled.kind == "max"
    if ep.activation_of(block.epilogue).name != "identity":
        if result is None:
            raise InvalidProblem(
                f"result: missing, but the epilogue {spell_steps(block.epilogue)!r} has an "
                "activation, whose result tells its gradient"
            )
        shape = block.out_shape if selects else block.conv_shape
        _check_shape("result", result, shape, "the shape of the activation's result")
    if pooled is not None and selects:
        _check_winners(winners, block.out_shape, pooled.step)
    grad, grad_layout = _layout(grad)
    gx_layout = output_layout(x)
    x, x_layout = _layout(x)
    result, result_layout = (grad, NHWC) if result is None else _layout(result)
    made = {
        "x": lambda: _empty(block.in_shape, gx_layout),
        "w": lambda: _empty(block.conv.weight_shape, NCHW),
        "bias": lambda: _empty((block.conv.out_channels,), NCHW),
        "residual": lambda: _empty(block.conv_shape, NHWC),
    }
    grads = {name: made[name]() for name in needs}
    program = compiler.backward(
        block, grad_layout, x_layout, weight.stride(), gx_layout, result_layout, needs
    )
    buffers = [grad, x, weight, result, winners, *grads.values()]
    program.run(*(t.data_ptr() for t in buffers))
    return grads


def pool(x: Tensor, problem: Pool, save: bool) -> tuple[Tensor, Tensor]:
    """(out, winners); winners are empty without ``save`` and for averages."""
    check_readable(x=x)
    layout = output_layout(x)
    out = _empty(problem.out_shape, layout)
    winners = x.new_empty(0, dtype=torch.uint8)
    keeps = save and problem.kind == "max"
    if keeps:
        winners = _empty(problem.out_shape, NHWC, winner_dtype(problem.step))
    x, x_layout = _layout(x)
    program = compiler.pool_forward(problem, x_layout, layout, save)
    buffers = [x, out, winners] if keeps else [x, out]
    program.run(*(t.data_ptr() for t in buffers))
    return out, winners


def pool_backward(grad: Tensor, winners: Tensor, problem: Pool, channels_last: bool) -> Tensor:
    """The gradient of a pooling layer's input."""
    check_readable(grad=grad)
    _check_shape("grad", grad, problem.out_shape, "the shape of the pool's output")
    if problem.kind == "max":
        _check_winners(winners, problem.out_shape, problem.step)
    layout = NHWC if channels_last else NCHW
    gx = _empty(problem.in_shape, layout)
    grad, grad_layout = _layout(grad)
    program = compiler.pool_backward_program(problem, grad_layout, layout)
    program.run(grad.data_ptr(), winners.data_ptr(), gx.data_ptr())
    return gx
