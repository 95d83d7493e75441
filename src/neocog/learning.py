"""Running a captured model while training: its stages in order, under PyTorch's autograd.

What is handed back to PyTorch between the stages runs as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .capture import Captured
from .fully_connected import Late, late, linear
from .learned import Learned, parameters_of
from .network import Foreign, Input, Linear, Network, Node
from .partition import Eager, deal
from .target import Target
from .training_fusion import fuse_for_training
from .training_steps import Spec


@dataclass
class LearningPlan:
    """The stages of one captured call while training."""

    captured: Captured
    network: Network
    stages: list[Learned | Eager]
    inputs: list[tuple[Node, Input]]
    leaves: list[Node | Any]

    @classmethod
    def of(cls, captured: Captured, layout: str, target: Target, exact: bool,
           tensors: Mapping[str, Tensor]) -> LearningPlan:  # fmt: skip
        """Fuse and deal out to stages; ``tensors``: arguments and parameters, by name."""
        network = fuse_for_training(captured.network)
        uses = network.uses()
        stages: list[Learned | Eager] = []
        for native, nodes in deal(network, _in_programs):
            if native:
                stages.append(Learned.of(_spec(nodes, uses, tensors, target, layout, exact)))
            else:
                stages.append(Eager(nodes))
        inputs = [(n, n.op) for n in network.nodes if isinstance(n.op, Input)]
        fused = dict(zip(captured.network.outputs, network.outputs, strict=True))
        leaves = [fused[v] if isinstance(v, Node) else v for v in captured.leaves]
        return cls(captured, network, stages, inputs, leaves)

    @functools.cached_property
    def linears(self) -> dict[Node, Linear]:
        """The fully connected layers, in order."""
        nodes = self.network.nodes
        return {node: node.op for node in nodes if isinstance(node.op, Linear)}

    @property
    def natives(self) -> list[Learned]:
        """The stages that are programs."""
        return [stage for stage in self.stages if isinstance(stage, Learned)]

    def run(self, args: Sequence[Any]) -> Any:
        """The model's result for arguments of the captured shapes."""
        values: dict[Any, Any] = {}
        named: dict[str, Tensor] = {}
        own = self.captured.parameters
        for node, op in self.inputs:
            tensor = own[op.name] if op.argument is None else args[op.argument]
            values[node] = named[op.name] = tensor
        weights = late([named[op.weight] for op in self.linears.values()])
        lates = dict(zip(self.linears, weights, strict=True))
        for stage in self.stages:
            if isinstance(stage, Learned):
                stage.run(values, named)
            else:
                for node in stage.nodes:
                    inputs = [values[s] for s in node.inputs]
                    values[node] = _computed(node, inputs, named, lates)
        return self.captured.result(
            [values[v] if isinstance(v, Node) else v for v in self.leaves]
        )  # fmt: skip


def _in_programs(node: Node) -> bool:
    return node.native and not isinstance(node.op, Linear)


def _computed(
    node: Node, inputs: Sequence[Any], named: Mapping[str, Tensor], lates: Mapping[Node, Late]
) -> Any:
    if isinstance(node.op, Linear):
        bias = None if node.op.bias is None else named[node.op.bias]
        return linear(inputs[0], lates[node], bias)
    assert isinstance(node.op, Foreign)
    return node.op.run(*inputs)


def _spec(nodes, uses, tensors: Mapping[str, Tensor], target, layout: str, exact: bool) -> Spec:
    own = set(nodes)
    inputs = tuple(dict.fromkeys(s for n in nodes for s in n.inputs if s not in own))
    outputs = tuple(n for n in nodes if any(u not in own or u is n for u in uses[n]))
    names = dict.fromkeys(name for node in nodes for name in parameters_of(node))
    strides = {name: tuple(tensors[name].stride()) for name in names}
    sizes = {name: tensors[name].numel() for name in names}
    return Spec(tuple(nodes), uses, inputs, outputs, strides, sizes, target, layout, exact)
