"""Running a captured model while training: its stages as functions that PyTorch's autograd knows.

Each native stage is one ``torch.autograd.Function`` with a program forward and one backward; what
is handed back to PyTorch in between runs under autograd as ever.

https://docs.pytorch.org/docs/stable/notes/extending.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import kept, norm_steps
from .capture import Captured
from .execution import FORMATS
from .maps import NHWC
from .network import BatchStatistics, Input, Layer, Network, Node, Norm, Pointwise
from .partition import Eager, deal
from .program import Program
from .target import Target
from .training_backward import Backward, backward_program
from .training_forward import forward_program
from .training_fusion import fuse_for_training
from .training_steps import Spec


@dataclass
class Programs:
    """A stage for one choice of what has gradients."""

    forward: Program
    kept: kept.Kept
    wanted: frozenset[Node]
    graded: frozenset[str]
    backward: Backward | None = None
    """Written when it is first needed."""


@dataclass
class Learned:
    """A native stage."""

    spec: Spec
    running: list[tuple[Node, BatchStatistics]]
    made: dict[tuple[bool, ...], Programs] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: Spec) -> Learned:
        """Nothing is compiled before it is needed."""
        running = [
            (node, node.op.norm)
            for node in spec.nodes
            if isinstance(node.op, Pointwise) and isinstance(node.op.norm, BatchStatistics)
        ]
        return cls(spec, [(node, norm) for node, norm in running if norm.mean is not None])

    def programs(self, graded: tuple[bool, ...]) -> Programs:
        """The programs where these of the inputs and parameters have gradients."""
        if graded not in self.made:
            spec, n = self.spec, len(self.spec.inputs)
            names = frozenset(
                name for name, has in zip(spec.strides, graded[n:], strict=True) if has
            )
            wanted = _wanted(spec, dict(zip(spec.inputs, graded, strict=False)), names)
            found = kept.keep(spec.nodes, spec.uses, wanted, names, spec.target)
            self.made[graded] = Programs(forward_program(spec, found), found, wanted, names)
        return self.made[graded]

    def run(self, values: dict[Any, Any], parameters: Mapping[str, Tensor]) -> None:
        """Compute its outputs from its inputs, both in ``values``."""
        spec = self.spec
        tensors = [_ready(values[node], spec.layout) for node in spec.inputs]
        tensors += [parameters[name] for name in spec.strides]
        results = _Stage.apply(self, *tensors)
        values.update(zip(spec.outputs, results, strict=True))

    def update_running(self, found: kept.Kept, saved: Tensor, named: Mapping[str, Tensor]) -> None:
        """Move the running statistics of batch norms towards the batch's."""
        target = self.spec.target
        moved: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for node, norm in self.running:
            channels = node.map_shape[1]
            row = norm_steps.statistics_elements(target, channels) // norm_steps.STATISTICS
            olds, news = moved.setdefault(norm.momentum, ([], []))
            for name, number in ((norm.mean, norm_steps.MEAN), (norm.var, norm_steps.VARIANCE)):
                start = found.statistics[node] + number * row
                olds.append(named[str(name)])
                news.append(saved[start : start + channels])
        for momentum, (olds, news) in moved.items():
            torch._foreach_lerp_(olds, news, momentum)


def _wanted(spec: Spec, inputs: Mapping[Node, bool], names: frozenset[str]) -> frozenset[Node]:
    """The nodes that a gradient reaches, and that lead to something with one."""
    reached: set[Node] = set(spec.outputs)
    for node in reversed(spec.nodes):
        if node in reached:
            reached |= set(node.inputs)
    wanted = {node for node, has in inputs.items() if has and node in reached}
    for node in spec.nodes:
        learned = any(name in names for name in parameters_of(node))
        if node in reached and (learned or any(source in wanted for source in node.inputs)):
            wanted.add(node)
    return frozenset(wanted)


def parameters_of(node: Node) -> list[str]:
    """The tensors that a node reads besides maps."""
    match node.op:
        case Layer(weight=weight, bias=bias):
            names = [weight, bias]
        case Pointwise(norm=Norm() | BatchStatistics() as norm):
            names = [norm.weight, norm.bias]
            # Running statistics are read where they stand for the batch's; else only moved.
            names += [norm.mean, norm.var]
        case _:
            names = []
    return [name for name in names if name is not None]


class _Stage(torch.autograd.Function):
    """(stage, inputs.., parameters..) -> outputs."""

    @staticmethod
    def forward(ctx: Any, stage: Learned, *tensors: Tensor) -> tuple[Tensor, ...]:
        spec = stage.spec
        graded = tuple(ctx.needs_input_grad[1:])
        programs = stage.programs(graded)
        saved = torch.empty(programs.kept.size)
        outs = [
            torch.empty(node.shape, memory_format=_format(node, spec.layout))
            for node in spec.outputs
        ]
        dense = [t.contiguous() if t.dim() == 1 else t for t in tensors]
        programs.forward.run(*(t.data_ptr() for t in (*dense, saved, *outs)))
        named = dict(zip(spec.strides, tensors[len(spec.inputs) :], strict=True))
        stage.update_running(programs.kept, saved, named)
        ctx.stage, ctx.programs = stage, programs
        ctx.save_for_backward(*tensors, saved)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        spec, programs = ctx.stage.spec, ctx.programs
        *tensors, saved = ctx.saved_tensors
        if programs.backward is None:
            programs.backward = backward_program(
                spec, programs.kept, programs.wanted, programs.graded
            )
        plan = programs.backward
        given = [_ready(g, spec.layout) for g in grads]
        inputs = [torch.empty_like(tensors[i]) for i in plan.gin]
        named = dict(zip(spec.strides, tensors[len(spec.inputs) :], strict=True))
        uses = [torch.empty(named[name].shape) for name in plan.uses]
        dense = [t.contiguous() if t.dim() == 1 else t for t in tensors]
        buffers = (*dense, saved, *given, *inputs, *uses)
        plan.program.run(*(t.data_ptr() for t in buffers))
        found: dict[str, Tensor] = {}
        for name, grad in zip(plan.uses, uses, strict=True):
            found[name] = found[name] + grad if name in found else grad
        arrived = dict(zip(plan.gin, inputs, strict=True))
        return (
            None,
            *(arrived.get(i) for i in range(len(spec.inputs))),
            *(found.get(name) for name in spec.strides),
        )


def _format(node: Node, layout: str) -> torch.memory_format:
    return FORMATS[layout] if len(node.shape) == 4 else torch.contiguous_format


def _ready(tensor: Tensor, layout: str) -> Tensor:
    format = FORMATS[layout] if tensor.dim() == 4 else torch.contiguous_format
    return tensor.contiguous(memory_format=format)


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
        for native, nodes in deal(network):
            if native:
                stages.append(Learned.of(_spec(nodes, uses, tensors, target, layout, exact)))
            else:
                stages.append(Eager(nodes))
        inputs = [(n, n.op) for n in network.nodes if isinstance(n.op, Input)]
        fused = dict(zip(captured.network.outputs, network.outputs, strict=True))
        leaves = [fused[v] if isinstance(v, Node) else v for v in captured.leaves]
        return cls(captured, network, stages, inputs, leaves)

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
        for stage in self.stages:
            if isinstance(stage, Learned):
                stage.run(values, named)
            else:
                for node in stage.nodes:
                    values[node] = node.op.run(*(values[source] for source in node.inputs))
        return self.captured.result(
            [values[v] if isinstance(v, Node) else v for v in self.leaves]
        )  # fmt: skip


def _spec(nodes, uses, tensors: Mapping[str, Tensor], target, layout: str, exact: bool) -> Spec:
    own = set(nodes)
    inputs = tuple(dict.fromkeys(s for n in nodes for s in n.inputs if s not in own))
    outputs = tuple(n for n in nodes if any(u not in own or u is n for u in uses[n]))
    names = dict.fromkeys(name for node in nodes for name in parameters_of(node))
    strides = {name: tuple(tensors[name].stride()) for name in names}
    return Spec(tuple(nodes), uses, inputs, outputs, strides, target, layout, exact)
