"""What a stage of a network keeps between its forward and its backward pass, and what it does not.

A value is needed afterwards by a convolution that reads it (for the gradient of its weights), by an
activation (for the sign of its result) and by a batch norm (for the distance from the mean). Of
these, results of batch norms and of pools are computed again from what they read, which one pass
over memory does; what convolutions give is kept. Max pools keep which tap won, one byte each.

All of it stands in one tensor, fresh in every call.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from . import norm_steps
from .cpu import epilogue as ep
from .cpu.pool import winner_type
from .maps import Halo, elements_with_halo, halo_of
from .network import Layer, Node, Pointwise
from .network import Pooling as PoolNode
from .problem import Act, Add, Pooling
from .program import SLACK, whole_lines
from .target import Target


@dataclass
class Kept:
    """Where everything stands, in float32 elements from the start of the tensor."""

    values: dict[Node, tuple[int, Halo]] = field(default_factory=dict)
    winners: dict[Node, int] = field(default_factory=dict)
    statistics: dict[Node, int] = field(default_factory=dict)
    read: set[Node] = field(default_factory=set)
    """The values that the backward pass reads: kept here, computed again, or a stage's inputs."""
    parts: dict[int, int] = field(default_factory=dict)
    """The size of each, by where it starts."""
    size: int = 0

    def take(self, elements: int) -> int:
        """Room for some elements, from the start of a cache line."""
        start, size = self.size, whole_lines(elements)
        self.parts[start] = size
        self.size += size
        return start


def halo_for(node: Node, uses: Mapping[Node, Sequence[Node]]) -> Halo:
    """What convolutions that read a map reach beyond it."""
    halos = [
        halo_of(u.op.block.conv) for u in uses[node] if isinstance(u.op, Layer) and u is not node
    ]
    sides = [(h.top, h.bottom, h.left, h.right) for h in halos]
    return Halo(*(max(side) for side in zip(*sides, strict=True))) if sides else Halo()


def computed_again(node: Node) -> bool:
    """Whether the backward pass computes the value of a node again rather than have it kept."""
    match node.op:
        case Pointwise():
            return is_norm(node)
        case PoolNode():
            return True
    return False


def keep(
    nodes: Sequence[Node],
    uses: Mapping[Node, Sequence[Node]],
    wanted: Collection[Node],
    graded: Collection[str],
    target: Target,
) -> Kept:
    """What the forward pass of ``nodes`` has to keep.

    ``wanted``: the nodes whose gradient is needed; ``graded``: the parameters with one.
    """
    kept = Kept()
    needed: set[Node] = set()
    for node in nodes:
        if node in wanted:
            needed |= set(_needs(node, graded))
    for node in reversed(nodes):
        if node in needed and computed_again(node):
            needed |= set(node.inputs)
    for node in nodes:
        if node in needed and not computed_again(node):
            halo = halo_for(node, uses)
            kept.values[node] = (kept.take(elements_with_halo(node.map_shape, halo)), halo)
        if is_norm(node):
            elements = norm_steps.statistics_elements(target, node.map_shape[1])
            kept.statistics[node] = kept.take(elements)
        pool = pool_of(node)
        if pool is not None and pool.kind == "max" and node in wanted:
            taps = winner_type(pool).width // 8 * math.prod(node.map_shape)
            kept.winners[node] = kept.take(-(-taps // 4))
    kept.size += SLACK
    kept.read = needed
    return kept


def pool_of(node: Node) -> Pooling | None:
    """The pool of a node, fused or by itself, without its sizes."""
    if isinstance(node.op, PoolNode):
        return node.op.pool.step
    return ep.pooling_of(node.op.block.epilogue) if isinstance(node.op, Layer) else None


def activation_of(node: Node) -> Act:
    """The activation of a node, or the identity."""
    match node.op:
        case Layer(block=block):
            return ep.activation_of(block.epilogue)
        case Pointwise(steps=steps):
            return ep.activation_of(steps)
    return ep.activation_of(())


def undone_by_result(node: Node) -> bool:
    """Whether the backward pass reads the node's own result, to undo its activation."""
    if activation_of(node).name == "identity":
        return False
    if isinstance(node.op, Pointwise) and is_norm(node):
        # Without a residual, the pass that reads y computes the result again by the way.
        return any(isinstance(step, Add) for step in node.op.steps)
    return True


def _needs(node: Node, graded: Collection[str]) -> list[Node]:
    """The values that the backward pass of a node reads."""
    found = [node] if undone_by_result(node) else []
    match node.op:
        case Layer(weight=weight, bias=bias) if weight in graded or bias in graded:
            found.append(node.inputs[0])
        case Pointwise() if is_norm(node):
            found.append(node.inputs[0])
    return found


def is_norm(node: Node) -> bool:
    """Whether a node is a batch norm with what follows it."""
    return isinstance(node.op, Pointwise) and node.op.norm is not None
