"""The float64 reference in the place of the kernels: the four functions of ``neocog.ops.engine``.

With it gradcheck tests the wiring of autograd alone: what is saved, which gradients are asked for
and where they go. The backward functions know no more than the kernels do, so that a gradient must
follow from what the forward pass saved.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from neocog import compiler, execution, reference
from neocog.activations import ACTIVATIONS
from neocog.maps import NCHW, NHWC
from neocog.problem import Act, Block, Pool

LAST = torch.channels_last


def _numbers(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.detach().numpy()


def _winners(winners: np.ndarray, problem: Pool) -> Tensor:
    kind = execution.winner_dtype(problem.step)
    return torch.from_numpy(winners).to(kind).contiguous(memory_format=LAST)


def _to(array: np.ndarray, layout: str) -> Tensor:
    return torch.from_numpy(array).contiguous(memory_format=execution.FORMATS[layout])


def _slope(act: Act, result: Tensor) -> np.ndarray:
    return ACTIVATIONS[act.name].derivative_from_output(result.numpy(), act.slope)


def conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    block: Block,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, winners, before) as ``execution.conv_block`` gives them."""
    result = reference.block(
        block, _numbers(x), _numbers(weight), _numbers(bias), residual=_numbers(residual)
    )
    winners, before = x.new_empty(0, dtype=torch.uint8), x.new_empty(0)
    names = compiler.saved_names(block, save)
    if "winners" in names:
        winners = _winners(result.winners, block.pool)
    if "before" in names:
        before = _to(result.before_pool, NHWC)
    return _to(result.out, execution.output_layout(x, weight)), winners, before


def conv_block_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    result: Tensor | None,
    winners: Tensor,
    block: Block,
    needs: tuple[str, ...],
) -> dict[str, Tensor]:
    """The gradients named in ``needs``, from what the forward pass saved."""
    act = next((step for step in block.epilogue if isinstance(step, Act)), Act("identity"))
    slope = 1.0 if result is None else _slope(act, result)
    g, pool = grad.numpy(), block.pool
    if pool is not None and pool.kind == "max":  # only winners get a share: their value came out
        g = reference.pool_grad(pool, g * slope, winners.numpy().astype(np.int64))
    elif pool is not None:
        g = reference.pool_grad(pool, g) * slope
    else:
        g = g * slope
    made = {
        "x": lambda: reference.convolution_grad_input(block.conv, g, weight.numpy()),
        "w": lambda: reference.convolution_grad_weight(block.conv, g, x.numpy()),
        "bias": lambda: g.sum(axis=(0, 2, 3)),
        "residual": lambda: g.copy(),
    }
    grads = {name: torch.from_numpy(made[name]()) for name in needs}
    formats = {"x": execution.FORMATS[execution.output_layout(x)], "residual": LAST}
    for name in formats.keys() & grads.keys():
        grads[name] = grads[name].contiguous(memory_format=formats[name])
    return grads


def pool(x: Tensor, problem: Pool, save: bool) -> tuple[Tensor, Tensor]:
    """(out, winners)."""
    out, winners = reference.pool(problem, x.detach().numpy())
    kept = x.new_empty(0, dtype=torch.uint8)
    if save and winners is not None:
        kept = _winners(winners, problem)
    return _to(out, execution.output_layout(x)), kept


def pool_backward(grad: Tensor, winners: Tensor, problem: Pool, channels_last: bool) -> Tensor:
    """The gradient of a pool's input."""
    taps = winners.numpy().astype(np.int64) if winners.numel() else None
    gx = reference.pool_grad(problem, grad.numpy(), taps)
    return _to(gx, NHWC if channels_last else NCHW)
