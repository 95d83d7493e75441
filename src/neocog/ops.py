"""neocog's operators in torch.library: schemas, CPU kernels, fake kernels, autograd.

Four operators, none differentiable twice by itself (double backward is handed back to PyTorch):

- ``neocog::conv_block`` and ``neocog::conv_block_backward``
- ``neocog::pool`` and ``neocog::pool_backward``

``epilogue`` and ``pooling`` are the one-line spellings of :mod:`neocog.problem`; ``padding`` is
(top, bottom, left, right). The forward operators return what their backward needs only where
``save`` is set. Source for the interface: https://docs.pytorch.org/docs/stable/library.html.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import execution, handback
from .aten_calls import FIRST_RESULT
from .cpu import epilogue as ep
from .errors import InvalidProblem
from .geometry import Window
from .maps import NHWC
from .problem import Pooling

LIBRARY = torch.library.Library("neocog", "DEF")
WINDOW = "int[2] stride, int[4] padding, int[2] dilation, int groups, str epilogue"
LIBRARY.define(
    f"conv_block(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {WINDOW}, bool save) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "conv_block_backward(Tensor grad, Tensor x, Tensor weight, Tensor? result, Tensor winners, "
    f"{WINDOW}, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("pool(Tensor x, str pooling, bool save) -> (Tensor, Tensor)")
LIBRARY.define(
    "pool_backward(Tensor grad, Tensor winners, SymInt[] shape, str pooling, bool channels_last) "
    "-> Tensor"
)

# The overloads themselves: resolving them by name costs microseconds a call.
conv_block = torch.ops.neocog.conv_block.default
conv_block_backward = torch.ops.neocog.conv_block_backward.default
pool = torch.ops.neocog.pool.default
pool_backward = torch.ops.neocog.pool_backward.default

GRADIENTS = ("x", "w", "bias", "residual")

engine: Any = execution
"""Who computes: the compiled kernels. The test of the autograd wiring puts the float64 reference
in its place."""


# ------------------------------------------------------------------------------ CPU kernels


def _conv_block(x, weight, bias, residual, stride, padding, dilation, groups, epilogue, save):
    window = (tuple(stride), tuple(padding), tuple(dilation), groups, epilogue)
    block = execution.block_of(tuple(x.shape), tuple(weight.shape), *window)
    return engine.conv_block(x, weight, bias, residual, block, save)


def _conv_block_backward(
    grad, x, weight, result, winners, stride, padding, dilation, groups, epilogue, needs
):
    window = (tuple(stride), tuple(padding), tuple(dilation), groups, epilogue)
    block = execution.block_of(tuple(x.shape), tuple(weight.shape), *window)
    names = tuple(n for n, need in zip(GRADIENTS, needs, strict=True) if need)
    grads = engine.conv_block_backward(grad, x, weight, result, winners, block, names)
    return tuple(grads.get(n, x.new_empty(0)) for n in GRADIENTS)


def _pool(x, pooling, save):
    return engine.pool(x, execution.pool_of(tuple(x.shape), pooling), save)


def _pool_backward(grad, winners, shape, pooling, channels_last):
    problem = execution.pool_of(tuple(shape), pooling)
    return engine.pool_backward(grad, winners, problem, channels_last)


for _name, _function in (
    ("conv_block", _conv_block),
    ("conv_block_backward", _conv_block_backward),
    ("pool", _pool),
    ("pool_backward", _pool_backward),
):
    LIBRARY.impl(_name, _function, "CPU")


# ------------------------------------------------------------------------------ fake kernels


def _check_one_device(x: Tensor, *others: Tensor | None) -> None:
    """As PyTorch's own operators do: a fake kernel would answer for kernels that do not exist."""
    for t in others:
        if t is not None and t.device != x.device:
            raise InvalidProblem(
                f"all tensors must be on one device, got {x.device} and {t.device}"
            )


def _like(shape: Sequence[Any], x: Tensor, *others: Tensor) -> Tensor:
    layout = execution.output_layout(x, *others)
    return torch.empty(
        tuple(shape), dtype=x.dtype, device=x.device, memory_format=execution.FORMATS[layout]
    )


def _dense(shape: Sequence[Any], x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        tuple(shape), dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _conv_sizes(x: Tensor, weight: Tensor, stride, padding, dilation) -> tuple[Any, Any]:
    top, bottom, left, right = padding
    rows = Window(weight.shape[2], stride[0], dilation[0], top, bottom)
    cols = Window(weight.shape[3], stride[1], dilation[1], left, right)
    return rows.out_size(x.shape[2]), cols.out_size(x.shape[3])


def _pooled(pooling: Pooling | None, height: Any, width: Any) -> tuple[Any, Any]:
    if pooling is None:
        return height, width
    return pooling.rows.out_size(height), pooling.cols.out_size(width)


@torch.library.register_fake("neocog::conv_block", lib=LIBRARY)
def _(x, weight, bias, residual, stride, padding, dilation, groups, epilogue, save):
    _check_one_device(x, weight, bias, residual)
    steps = execution.parse_steps(epilogue)
    pooling = ep.pooling_of(steps)
    height, width = _conv_sizes(x, weight, stride, padding, dilation)
    batch, channels = x.shape[0], weight.shape[0]
    shape = (batch, channels, *_pooled(pooling, height, width))
    winners, before = x.new_empty(0, dtype=torch.uint8), x.new_empty(0)
    if save and pooling is not None:
        if pooling.kind == "max":
            winners = _dense(shape, x, execution.winner_dtype(pooling))
        elif ep.activation_of(steps).name != "identity":
            before = _dense((batch, channels, height, width), x)
    return _like(shape, x, weight), winners, before


@torch.library.register_fake("neocog::conv_block_backward", lib=LIBRARY)
def _(grad, x, weight, result, winners, stride, padding, dilation, groups, epilogue, needs):
    _check_one_device(x, grad, weight, result, winners)
    sizes = _conv_sizes(x, weight, stride, padding, dilation)
    made = (
        lambda: _like(x.shape, x),
        lambda: weight.new_empty(weight.shape),
        lambda: weight.new_empty(weight.shape[0]),
        lambda: _dense((x.shape[0], weight.shape[0], *sizes), x),
    )
    return tuple(m() if need else x.new_empty(0) for m, need in zip(made, needs, strict=True))


@torch.library.register_fake("neocog::pool", lib=LIBRARY)
def _(x, pooling, save):
    step = execution.parse_pooling(pooling)
    shape = (x.shape[0], x.shape[1], *_pooled(step, x.shape[2], x.shape[3]))
    winners = x.new_empty(0, dtype=torch.uint8)
    if save and step.kind == "max":
        winners = _dense(shape, x, execution.winner_dtype(step))
    return _like(shape, x), winners


@torch.library.register_fake("neocog::pool_backward", lib=LIBRARY)
def _(grad, winners, shape, pooling, channels_last):
    _check_one_device(grad, winners)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=grad.dtype, device=grad.device, memory_format=layout)


# ---------------------------------------------------------------------------------- autograd


_UNSAVED = (
    "save=False: the forward pass kept nothing for a gradient; expected save=True (a graph traced "
    "without gradients has to be traced again)"
)


def _save_block(ctx, inputs, output) -> None:
    x, weight, bias, residual, *window, ctx.saved = inputs
    out, winners, before = output
    ctx.mark_non_differentiable(winners, before)
    ctx.window = window
    steps = execution.parse_steps(window[-1])
    result = None
    if ep.activation_of(steps).name != "identity":
        result = before if before.numel() else out
    ctx.has = (bias is not None, residual is not None, result is not None)
    kept = [x, weight, winners] + [t for t in (bias, residual, result) if t is not None]
    ctx.save_for_backward(*kept)


def _block_gradients(ctx, grad, *_):
    x, weight, winners, *rest = ctx.saved_tensors
    optional = iter(rest)
    bias, residual, result = (next(optional) if has else None for has in ctx.has)
    nothing = (None,) * 6
    if grad is None:
        return None, None, None, None, *nothing
    if not ctx.saved:
        raise InvalidProblem(_UNSAVED)
    needs = list(ctx.needs_input_grad[:4])
    if torch.is_grad_enabled():
        inputs = (x, weight, bias, residual)
        return *_differentiable(grad, inputs, needs, ctx.window), *nothing
    grads = conv_block_backward(grad, x, weight, result, winners, *ctx.window, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing


def _differentiable(grad, inputs, needs, window) -> list[Tensor | None]:
    """Gradients that can be differentiated again: recomputed in PyTorch's own operators."""
    handback.say("conv_block", "double backward")
    stride, padding, dilation, groups, epilogue = window
    sides, steps = tuple(padding), execution.parse_steps(epilogue)
    # Views of their own: a tensor that comes in at two places gets two gradients.
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    x, weight, bias, residual = inputs
    y = handback.conv_block(
        x, weight, bias, residual, tuple(stride), sides, tuple(dilation), groups, steps
    )
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _save_pool(ctx, inputs, output) -> None:
    x, ctx.pooling, ctx.saved = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.shape, ctx.channels_last = x.shape, execution.output_layout(x) == NHWC
    ctx.save_for_backward(x, output[1])


def _pool_gradients(ctx, grad, _):
    if grad is None:
        return None, None, None
    if not ctx.saved:
        raise InvalidProblem(_UNSAVED)
    x, winners = ctx.saved_tensors
    if torch.is_grad_enabled():
        handback.say("pool", "double backward")
        step = execution.parse_pooling(ctx.pooling)
        (gx,) = torch.autograd.grad(handback.pool(x, step), x, grad, create_graph=True)
    else:
        gx = pool_backward(grad, winners, ctx.shape, ctx.pooling, ctx.channels_last)
    return gx, None, None


torch.library.register_autograd(
    "neocog::conv_block", _block_gradients, setup_context=_save_block, lib=LIBRARY
)
torch.library.register_autograd(
    "neocog::pool", _pool_gradients, setup_context=_save_pool, lib=LIBRARY
)


# ------------------------------------------------------------------------ for those who know none


def _conv_block_in_pytorch(
    x, weight, bias, residual, stride, padding, dilation, groups, epilogue, save
) -> Tensor:
    steps = execution.parse_steps(epilogue)
    window = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return handback.conv_block(x, weight, bias, residual, *window, steps)


def _pool_in_pytorch(x, pooling, save) -> Tensor:
    return handback.pool(x, execution.parse_pooling(pooling))


SPELLED_OUT: dict[Any, Callable[..., Tensor | None]] = {
    conv_block: _conv_block_in_pytorch,
    pool: _pool_in_pytorch,
    **FIRST_RESULT,
}
"""Operator -> its first result in PyTorch's own functions; None if there is no way to say it."""


def spell_out(gm: fx.GraphModule) -> None:
    """Put PyTorch's own functions where a graph asks only for the first result of such an operator.

    So they can be fused like anybody's.
    """
    tracer = fx.proxy.GraphAppendingTracer(gm.graph)

    def proxied(node: fx.Node) -> Any:
        return fx.Proxy(node, tracer)

    for node in list(gm.graph.nodes):
        spelled = SPELLED_OUT.get(node.target) if node.op == "call_function" else None
        parts = [u for u in node.users if u.users]
        firsts = [u for u in parts if u.target is operator.getitem and u.args[1] == 0]
        if spelled is None or len(firsts) != len(parts):
            continue
        with gm.graph.inserting_before(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), proxied)
            made = spelled(*args, **kwargs)
        if not isinstance(made, fx.Proxy):
            continue
        for first in firsts:
            first.replace_all_uses_with(made.node)
        for user in (*node.users, node):
            gm.graph.erase_node(user)
    gm.recompile()
