"""Fusion: layers that follow a convolution move into its epilogue, in the order they stand in.

A node is merged into its producer if nobody else reads the producer and the merged operation has a
kernel. The merged node stands where the later one stood: a residual is then computed already. The
order of the steps is the model's; nothing is folded into weights, so that conv -> batch norm and
conv -> activation -> batch norm are both an affine step, each in its place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

from .network import (
    Activation,
    Arithmetic,
    BatchNorm,
    Constants,
    Convolution,
    Layer,
    Linear,
    Network,
    Node,
    Norm,
    Op,
    Padding,
    Pointwise,
    Pooling,
)
from .problem import Act, Add, Affine, Bias, Block, Conv, Pool, Step
from .problem import Pooling as PoolStep

LARGEST_FUSED_WINDOW = 3
"""Rows of a pool's window beyond which recomputing at the seams of threads costs too much."""

PoolChoice = Callable[[Block, Pool], bool]

Merge = Callable[[Node, Node, tuple[Node, ...]], Op | None]
"""(producer, node that reads it, the node's other inputs) -> the operation of both, if any."""


def fuse(network: Network, fuses_pool: PoolChoice) -> Network:
    """The same function in fewer nodes. ``fuses_pool`` may refuse to fuse a pool into a block."""
    fused = merged(network, functools.partial(_merge, fuses_pool=fuses_pool))
    _count_averaged(fused)
    return fused


def merged(network: Network, merge: Merge) -> Network:
    """The same function, nodes merged into their producers wherever ``merge`` can."""
    uses = network.uses()
    made: dict[Node, Node] = {}
    nodes: list[Node] = []
    for node in network.nodes:
        inputs = tuple(made[source] for source in node.inputs)
        op, both = alone(node.op), None
        for k in reversed(range(len(inputs))):  # the later input is usually the longer branch
            if len(uses[node.inputs[k]]) != 1:
                continue
            both = merge(inputs[k], node, inputs[:k] + inputs[k + 1 :])
            if both is not None:
                nodes.remove(inputs[k])
                op, inputs = both, (*inputs[k].inputs, *inputs[:k], *inputs[k + 1 :])
                break
        name = node.name if both is None else _name(op)
        made[node] = replace(node, op=op, inputs=inputs, name=name)
        nodes.append(made[node])
    return Network(nodes, [made[node] for node in network.outputs])


def _count_averaged(network: Network) -> None:
    """Tell layers in what sums their values are returned, see :attr:`Layer.averaged`."""
    uses = network.uses()
    terms: dict[Node, int] = {}

    def within(u: Node) -> int:
        """Terms of the sums of ``u``, or of what is behind it; 0 if these make a map returned."""
        vector = math.prod(u.shape[2:]) == 1
        return _terms(u) or terms[u] if vector or terms[u] else 0

    for node in reversed(network.nodes):
        found = [0 if u is node else within(u) for u in uses[node]]
        # What is added as a residual is one term of what the layer returns, not of its sums.
        found += [terms[u] for u in uses[node] if u is not node and node in u.inputs[1:]]
        terms[node] = min(found, default=0)
        if isinstance(node.op, Layer):
            node.op = replace(node.op, averaged=terms[node])


def _terms(node: Node) -> int:
    """Products in a sum of a layer; 0 for what sums nothing."""
    match node.op:
        case Layer(block=Block(conv=conv)):
            return conv.in_channels // conv.groups * conv.rows.size * conv.cols.size
        case Linear():
            return node.inputs[0].shape[1]
    return 0


def _name(op: Op) -> str:
    return type(op).__name__.lower()


def alone(op: Op) -> Op:
    """The fused form of an operation by itself."""
    match op:
        case Convolution(conv, weight, bias):
            return Layer(Block(conv, (Bias(),) if bias else ()), weight, bias)
        case BatchNorm(norm):
            return Pointwise("copy", (Affine(),), norm)
        case Activation(act):
            return Pointwise("copy", (act,))
        case Arithmetic(kind):
            return Pointwise(kind, ())
    return op


def _merge(
    producer: Node, node: Node, others: tuple[Node, ...], fuses_pool: PoolChoice
) -> Op | None:
    """The producer's operation with that of ``node`` behind it, if there is a kernel for it."""
    match producer.op, node.op:
        case Padding() as padding, Convolution(conv, weight, bias):
            return alone(Convolution(_padded(conv, padding), weight, bias))
        case Layer(block=Block(pool=None)), _:
            return _merge_layer(producer, node, others, fuses_pool)
        case Linear(act=None), Activation(act):
            return replace(producer.op, act=act)
        case Pointwise(steps=steps), BatchNorm(norm) if not _has(steps, Affine):
            return replace(producer.op, steps=(*steps, Affine()), norm=norm)
        case Pointwise(steps=steps), Activation(act) if not _has(steps, Act):
            return replace(producer.op, steps=(*steps, act))
    return None


def _padded(conv: Conv, padding: Padding) -> Conv:
    """``conv`` with the padding of its input as its own."""
    rows, cols = conv.rows, conv.cols
    return replace(
        conv,
        height=conv.height - padding.top - padding.bottom,
        width=conv.width - padding.left - padding.right,
        rows=replace(rows, low=rows.low + padding.top, high=rows.high + padding.bottom),
        cols=replace(cols, low=cols.low + padding.left, high=cols.high + padding.right),
    )


def _merge_layer(producer: Node, node: Node, others: tuple[Node, ...], fuses_pool) -> Op | None:
    layer = producer.op
    assert isinstance(layer, Layer)
    steps = layer.block.epilogue
    step: Step
    norm: Norm | Constants | None = layer.norm
    match node.op:
        case BatchNorm(norm=Norm() | Constants() as own) if not _has(steps, Affine):
            step, norm = Affine(), own
        case Activation(act) if not _has(steps, Act):
            step = act
        case Arithmetic("add") if not _has(steps, Add) and others[0].shape == producer.shape:
            step = Add()
        case Pooling(pool) if _fits(pool.step) and fuses_pool(layer.block, pool):
            step = pool.step
        case _:
            return None
    return replace(layer, block=Block(layer.block.conv, (*steps, step)), norm=norm)


def _has(steps: tuple[Step, ...], kind: type) -> bool:
    return any(isinstance(step, kind) for step in steps)


def _fits(step: PoolStep) -> bool:
    return step.rows.span <= LARGEST_FUSED_WINDOW
