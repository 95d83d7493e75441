"""Which nodes of a network run together: native programs, and foreign calls between them.

Nodes are dealt out to stages: all that can be computed without a foreign result come first, in one
program, then the foreign calls that have become possible, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from . import choices
from .network import Input, Layer, Linear, Network, Node
from .stages import Builder, Native, Packed
from .target import Target


@dataclass
class Eager:
    """Foreign calls, in order."""

    nodes: list[Node]

    @property
    def reads(self) -> list[Node]:
        """The nodes it reads, its own results among them."""
        return [source for node in self.nodes for source in node.inputs]


Stage = Native | Eager


def stages(network: Network, target: Target, layout: str, choose: choices.Choice) -> list[Stage]:
    """The stages of a fused network; maps come in and go out in ``layout``.

    ``choose`` picks the algorithm of each layer.
    """
    uses = network.uses()

    def built(nodes: list[Node]) -> Native:
        cut = seam(nodes, target, choose)
        return Builder(nodes, uses, target, layout, choose, cut).build()

    return [built(nodes) if native else Eager(nodes) for native, nodes in deal(network)]


def deal(
    network: Network, is_native: Callable[[Node], bool] = lambda node: node.native
) -> list[tuple[bool, list[Node]]]:
    """(whether they are native, nodes) of each stage, in order."""
    done = {node for node in network.nodes if isinstance(node.op, Input)}
    left = [node for node in network.nodes if node not in done]
    result: list[tuple[bool, list[Node]]] = []
    native = True
    while left:
        chosen = [n for n in left if is_native(n) == native and _ready(n, done, is_native)]
        chosen_set = set(chosen)
        done |= chosen_set
        left = [n for n in left if n not in chosen_set]
        if chosen:
            result.append((native, chosen))
        native = not native
    return result


def _ready(node: Node, done: set[Node], is_native: Callable[[Node], bool]) -> bool:
    """Whether everything before ``node`` is done, or of its own kind and ready itself."""
    native = is_native(node)
    ready: dict[Node, bool] = {}
    stack = [node]
    while stack:
        top = stack[-1]
        missing = [s for s in top.inputs if s not in done]
        if any(is_native(s) != native or ready.get(s) is False for s in missing):
            ready[top] = False
        elif all(s in ready for s in missing):
            ready[top] = True
        else:
            stack += [s for s in missing if s not in ready]
            continue
        stack.pop()
    return ready[node]


CACHE_BYTES = 1 << 20
"""Maps larger than this travel to memory and back between two layers."""


def seam(nodes: list[Node], target: Target, choose: choices.Choice) -> int:
    """How many of the first nodes run image by image, the others on the whole batch.

    Image by image, maps stay in the cache and weights are read for every image; on the whole batch
    it is the other way round. The seam is where the bytes moved are fewest.
    """
    batch = nodes[0].map_shape[0]
    if batch < 2:
        return 0
    alone, together = [], []
    for node in nodes:
        weights = 0
        if isinstance(node.op, Layer):
            key = Packed.of(choose, node.op)
            weights = 4 * choices.packed_elements(target, key.conv, key.algorithm)
        elif isinstance(node.op, Linear):
            weights = 4 * node.inputs[0].shape[1] * node.shape[1]
        maps = 4 * sum(math.prod(n.shape) for n in (node, *node.inputs))
        alone.append(batch * weights)
        together.append(weights + (maps if maps > CACHE_BYTES else 0))
    moved = [sum(alone[:cut]) + sum(together[cut:]) for cut in range(len(nodes) + 1)]
    return moved.index(min(moved))
