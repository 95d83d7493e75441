"""Fusion for training: what may be one node if gradients have to come back through it.

A convolution takes bias, activation and max pool into its block: the pooled result and the winners
tell the gradient. Batch norms stand apart, for their statistics need the whole map first; what
follows them (a residual, an activation) is theirs. A mean pool behind an activation stays alone,
as its result does not tell which way the activation went.
"""

from __future__ import annotations

from dataclasses import replace

from .fusion import merged
from .network import Activation, Arithmetic, Layer, Network, Node, Op, Pointwise, Pooling
from .problem import Act, Add, Affine, Block


def fuse_for_training(network: Network) -> Network:
    """The same function in fewer nodes, each with a gradient."""
    return merged(network, _merge)


def _merge(producer: Node, node: Node, others: tuple[Node, ...]) -> Op | None:
    match producer.op, node.op:
        case Layer(block=Block(pool=None) as block), Activation(act) if not _acts(block.epilogue):
            return replace(producer.op, block=Block(block.conv, (*block.epilogue, act)))
        case Layer(block=Block(pool=None) as block), Pooling(pool) if pool.kind == "max":
            return replace(producer.op, block=Block(block.conv, (*block.epilogue, pool.step)))
        case Pointwise(steps=steps), Activation(act) if not _acts(steps):
            return replace(producer.op, steps=(*steps, act))
        case Pointwise(kind="copy", steps=(Affine(),)), Arithmetic("add"):
            # The two read maps of one shape: see training_calls.
            return replace(producer.op, steps=(Affine(), Add())) if others else None
    return None


def _acts(steps: tuple) -> bool:
    return any(isinstance(step, Act) for step in steps)
