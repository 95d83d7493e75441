"""From problems to programs: which steps, on which memory, in which order.

Every function here takes a problem and the layouts of the tensors around it and returns a
:class:`~neocog.program.Program`. Nothing runs here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

from . import strided
from .convolutions import Weights, convolve
from .cpu import epilogue as ep
from .errors import Unsupported
from .maps import (
    Halo,
    Map,
    clear_halo,
    copy_out,
    deliver,
    read,
    read_rows,
    scratch_map,
    too_far,
    written,
)
from .pools import pool_steps, unpool
from .problem import Act, Add, Affine, Bias, Block, Conv, Pool, Pooling, Step
from .program import Place, Program
from .target import Target, host
from .weight_gradients import weight_gradient_steps

PROGRAMS_KEPT = 256


@functools.lru_cache(PROGRAMS_KEPT)
def forward(
    block: Block,
    x_layout: str,
    w_strides: tuple[int, int, int, int],
    out_layout: str,
    save: bool = False,
    target: Target | None = None,
) -> Program:
    """The program of a block's forward pass.

    Call buffers: x, w, the parameters and residual (NHWC) that the epilogue names, out, and with
    ``save`` what the backward pass needs: winners (max pool) or before (the NHWC map before a mean
    pool, if there is an activation). Unsupported for what no kernel covers.
    """
    _check_computable(block)
    target, conv, pooled = target or host(), block.conv, block.pool
    params = ep.parameters(block.epilogue)
    extras = [*params, *(["residual"] if ep.adds_residual(block.epilogue) else [])]
    p = Program(("x", "w", *extras, "out", *saved_names(block, save)))
    weights = Weights.of(p.buffer("w"), w_strides, conv)
    if strided.prefers(conv, weights):
        x = read(p, target, p.buffer("x"), x_layout, conv.in_shape)
    else:
        x, conv = read_rows(p, target, p.buffer("x"), x_layout, conv)
    out = written(p, p.buffer("out"), out_layout, block.out_shape)
    fields: dict[str, Place | int] = {name: p.buffer(name) for name in params}
    if "residual" in extras:
        fields |= Map.dense(p.buffer("residual"), *block.conv_shape[1:]).fields("residual")
    epilogue, winners = block.epilogue, None
    if pooled is not None and "before" in p.names:
        before = Map.dense(p.buffer("before"), *block.conv_shape[1:])
        convolve(p, target, conv, x, weights, before, epilogue[:-1], extra=fields)
        pool_steps(p, target, pooled, before, out, None)
    else:
        if "winners" in p.names:
            winners = Map.dense(p.buffer("winners"), *block.out_shape[1:])
        _convolve(p, target, conv, x, weights, out, epilogue, winners, fields)
    deliver(p, target, out, p.buffer("out"), out_layout, block.out_shape)
    return p


def saved_names(block: Block, save: bool = True) -> tuple[str, ...]:
    """What a block's forward pass stores for its backward pass besides its output."""
    pooled, act = block.pool, ep.activation_of(block.epilogue)
    if not save or pooled is None:
        return ()
    if pooled.kind == "max":
        return ("winners",)
    return ("before",) if act.name != "identity" else ()


@functools.lru_cache(PROGRAMS_KEPT)
def backward(
    block: Block,
    grad_layout: str,
    x_layout: str,
    w_strides: tuple[int, int, int, int],
    gx_layout: str,
    result_layout: str,
    needs: tuple[str, ...],
    target: Target | None = None,
) -> Program:
    """The program of a block's backward pass.

    ``needs``: which of x, w, bias, residual get a gradient. Call buffers: grad, x, w, result (the
    activation's, see :func:`saved_names`), winners, and gx, gw (contiguous), gbias, gresidual
    (NHWC) as needed.
    """
    check_trainable(block)
    target, conv, pooled = target or host(), block.conv, block.pool
    act = ep.activation_of(block.epilogue)
    names = ["grad", "x", "w", "result", "winners", *(f"g{n}" for n in needs)]
    p = Program(tuple(names))
    adjoint = conv.grad_input() if "x" in needs else None
    weights = Weights.of(p.buffer("w"), w_strides, conv).adjoint()
    halo = strided.halo(adjoint, weights) if adjoint else Halo()
    if pooled is None and act.name == "identity":
        # Its own copy: the weight gradient reads whole vectors, also behind the last channel.
        g = read(p, target, p.buffer("grad"), grad_layout, block.conv_shape, halo, own=True)
    else:
        g = _undo_epilogue(p, target, block, act, (grad_layout, result_layout), halo)
    if adjoint:
        out = written(p, p.buffer("gx"), gx_layout, conv.in_shape)
        _convolve(p, target, adjoint, g, weights, out)
        deliver(p, target, out, p.buffer("gx"), gx_layout, conv.in_shape)
    if "w" in needs or "bias" in needs:
        x, conv = read_rows(p, target, p.buffer("x"), x_layout, conv)
        # Exact, as the forward pass: by kernels that serve every size once they are compiled.
        weight_gradient_steps(p, target, conv, x, g, needs, exact=True)
    if "residual" in needs:
        copy_out(p, target, g, p.buffer("gresidual"), block.conv_shape)
    return p


def _convolve(
    p: Program, target: Target, conv: Conv, x: Map, weights: Weights, out: Map,
    epilogue: tuple[Step, ...] = (), winners: Map | None = None,
    extra: Mapping[str, Place | int] = MappingProxyType({}),
) -> None:  # fmt: skip
    if strided.prefers(conv, weights):
        strided.convolve(p, target, conv, x, weights, out, epilogue, extra)
    else:
        convolve(p, target, conv, x, weights, out, epilogue, winners, extra)


def _check_computable(block: Block) -> None:
    """Unsupported for blocks that no kernel computes."""
    reason = None if _is_spread(block) else too_far(block.conv)
    if reason:
        raise Unsupported(reason)
    ep.check_supported(block.epilogue)
    whole = [s for s in block.epilogue if isinstance(s, Add | Pooling)]
    if whole and _is_spread(block):
        raise Unsupported(f"base dilation with {whole[0]}: outputs are computed phase by phase")


def _is_spread(block: Block) -> bool:
    return any(w.base_dilation != 1 for w in (block.conv.rows, block.conv.cols))


def check_trainable(block: Block) -> None:
    """Unsupported for blocks whose gradients no kernel computes."""
    _check_computable(block)
    if _is_spread(block):
        raise Unsupported("the gradient of a base dilation: no kernel yet")
    kinds = [type(step) for step in block.epilogue]
    act = ep.activation_of(block.epilogue)
    if not ep.has_gradient(act):
        raise Unsupported(f"the gradient of {act}: the activation's result does not tell it")
    if Affine in kinds:
        raise Unsupported("the gradient of an affine step: no kernel yet")
    if Act in kinds and Bias in kinds[kinds.index(Act) :]:
        raise Unsupported("the gradient of a bias added after the activation: no kernel yet")
    if Act in kinds and Add in kinds[kinds.index(Act) :]:
        raise Unsupported("the gradient of a residual added after the activation: no kernel yet")


def _undo_epilogue(p, target: Target, block: Block, act: Act, layouts, halo: Halo) -> Map:
    """The gradient of the convolution's output, with a halo, from the block's."""
    pooled = block.pool
    grad = read(p, target, p.buffer("grad"), layouts[0], block.out_shape)
    g, corner = scratch_map(p, block.conv_shape, halo)
    clear_halo(p, target, g, corner, block.conv_shape, halo)
    pooling, result = (pooled.step if pooled else None), None
    if act.name != "identity":
        selects = pooled is not None and pooled.kind == "max"
        shape = block.out_shape if selects else block.conv_shape
        result = read(p, target, p.buffer("result"), layouts[1], shape)
    shapes = (block.conv_shape, block.out_shape)
    unpool(p, target, pooling, act, *shapes, grad, g, result, p.buffer("winners"))
    return g


@functools.lru_cache(PROGRAMS_KEPT)
def pool_forward(
    problem: Pool, x_layout: str, out_layout: str, save: bool, target: Target | None = None
) -> Program:
    """The program of a pooling layer. Call buffers: x, out, and winners if ``save`` (max)."""
    target = target or host()
    keeps = save and problem.kind == "max"
    p = Program(("x", "out", *(("winners",) if keeps else ())))
    x = read(p, target, p.buffer("x"), x_layout, problem.in_shape)
    out = written(p, p.buffer("out"), out_layout, problem.out_shape)
    pool_steps(p, target, problem, x, out, p.buffer("winners") if keeps else None)
    deliver(p, target, out, p.buffer("out"), out_layout, problem.out_shape)
    return p


@functools.lru_cache(PROGRAMS_KEPT)
def pool_backward_program(
    problem: Pool, grad_layout: str, gx_layout: str, target: Target | None = None
) -> Program:
    """The program of a pooling layer's gradient. Call buffers: grad, winners, gx."""
    target = target or host()
    p = Program(("grad", "winners", "gx"))
    grad = read(p, target, p.buffer("grad"), grad_layout, problem.out_shape)
    out = written(p, p.buffer("gx"), gx_layout, problem.in_shape)
    act = Act("identity")
    shapes = (problem.in_shape, problem.out_shape)
    unpool(p, target, problem.step, act, *shapes, grad, out, None, p.buffer("winners"))
    deliver(p, target, out, p.buffer("gx"), gx_layout, problem.in_shape)
    return p
