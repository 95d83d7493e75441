"""A native stage of a network while training, as a function that PyTorch's autograd knows.

One ``torch.autograd.Function`` with a program forward and one backward.

https://docs.pytorch.org/docs/stable/notes/extending.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import handback, kept, kernels, norm_steps
from .execution import FORMATS
from .memory import POOL
from .network import BatchStatistics, Layer, Node, Norm, Pointwise
from .network import Pooling as PoolNode
from .problem import Act, Add
from .program import Program
from .training_backward import Backward, backward_program
from .training_forward import forward_program
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
    moment: kernels.Moment | None = field(default_factory=kernels.Moment.now)

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
            with kernels.at(self.moment):
                forward = forward_program(spec, found)
            self.made[graded] = Programs(forward, found, wanted, names)
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
    names: tuple[str | None, ...] = ()
    match node.op:
        case Layer(weight=weight, bias=bias):
            names = (weight, bias)
        case Pointwise(norm=Norm() | BatchStatistics() as norm):
            # Running statistics are read where they stand for the batch's; else only moved.
            names = (norm.weight, norm.bias, norm.mean, norm.var)
    return [name for name in names if name is not None]


class _Stage(torch.autograd.Function):
    """(stage, inputs.., parameters..) -> outputs."""

    @staticmethod
    def forward(ctx: Any, stage: Learned, *tensors: Tensor) -> tuple[Tensor, ...]:
        spec = stage.spec
        graded = tuple(ctx.needs_input_grad[1:])
        programs = stage.programs(graded)
        POOL.next_pass()
        saved = POOL.empty((programs.kept.size,))
        outs = [POOL.empty(node.shape, _format(node, spec.layout)) for node in spec.outputs]
        dense = [t.contiguous() if t.dim() == 1 else t for t in tensors]
        programs.forward.run(*(t.data_ptr() for t in (*dense, saved, *outs)))
        named = dict(zip(spec.strides, tensors[len(spec.inputs) :], strict=True))
        stage.update_running(programs.kept, saved, named)
        ctx.stage, ctx.programs = stage, programs
        # Running statistics change with every call, and nothing in a gradient depends on them.
        moved = {name for _, norm in stage.running for name in (norm.mean, norm.var)}
        lasting = [None if name in moved else t for name, t in named.items()]
        ctx.save_for_backward(*tensors[: len(spec.inputs)], *lasting, saved)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        spec, programs = ctx.stage.spec, ctx.programs
        *tensors, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *_differentiable(spec, tensors, ctx.needs_input_grad[1:], grads)
        if programs.backward is None:
            with kernels.at(ctx.stage.moment):
                programs.backward = backward_program(
                    spec, programs.kept, programs.wanted, programs.graded
                )
        plan = programs.backward
        if torch._C._autograd._get_current_graph_task_keep_graph():
            saved = saved.clone()  # the program works in it
        given = [_ready(g, spec.layout) for g in grads]
        POOL.next_pass()
        inputs = [
            POOL.empty(tensors[i].shape, _format(spec.inputs[i], spec.layout)) for i in plan.gin
        ]
        named = dict(zip(spec.strides, tensors[len(spec.inputs) :], strict=True))
        uses = [POOL.empty(named[name].shape) for name in plan.uses]
        read = [t if t is None or t.dim() != 1 else t.contiguous() for t in tensors]
        buffers = (*read, saved, *given, *inputs, *uses)
        plan.program.run(*(0 if t is None else t.data_ptr() for t in buffers))
        found: dict[str, Tensor] = {}
        for name, grad in zip(plan.uses, uses, strict=True):
            found[name] = found[name] + grad if name in found else grad
        arrived = dict(zip(plan.gin, inputs, strict=True))
        return (
            None,
            *(arrived.get(i) for i in range(len(spec.inputs))),
            *(found.get(name) for name in spec.strides),
        )


def _differentiable(
    spec: Spec, tensors: Sequence[Tensor], needs: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: recomputed in PyTorch's own operators."""
    handback.say("a compiled stage", "double backward")
    # Views of their own: a tensor that comes in at two places gets two gradients.
    tensors = [None if t is None else t.view_as(t) for t in tensors]
    values: dict[Node, Tensor] = dict(zip(spec.inputs, tensors, strict=False))
    named = dict(zip(spec.strides, tensors[len(spec.inputs) :], strict=True))
    for node in spec.nodes:
        values[node] = _in_pytorch(node, [values[s] for s in node.inputs], named)
    outs = [values[node].reshape(node.shape) for node in spec.outputs]
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _in_pytorch(node: Node, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> Tensor:
    x, *others = inputs
    match node.op:
        case Layer(block=block, weight=weight, bias=bias):
            rows, cols = block.conv.rows, block.conv.cols
            return handback.conv_block(
                x, named[weight], None if bias is None else named[bias], None,
                (rows.stride, cols.stride), (rows.low, rows.high, cols.low, cols.high),
                (rows.dilation, cols.dilation), block.conv.groups, block.epilogue,
            )  # fmt: skip
        case PoolNode(pool):
            return handback.pool(x, pool.step)
        case Pointwise(kind=kind, steps=steps, norm=norm):
            if kind == "add":
                x = x + others.pop(0)
            if isinstance(norm, Norm | BatchStatistics):
                x = _normalised(x, norm, named)
            for step in steps:
                if isinstance(step, Add):
                    x = x + others.pop(0)
                elif isinstance(step, Act):
                    x = handback.activation(x, step)
            return x
    raise TypeError(f"no operation of training: {node}")


def _normalised(x: Tensor, norm: Norm | BatchStatistics, named: Mapping[str, Tensor]) -> Tensor:
    batch = isinstance(norm, BatchStatistics)
    mean, var = (None if batch else named[str(name)] for name in (norm.mean, norm.var))
    weight, bias = (None if n is None else named[n] for n in (norm.weight, norm.bias))
    return F.batch_norm(x, mean, var, weight, bias, batch, 0.0, norm.eps)


def _format(node: Node, layout: str) -> torch.memory_format:
    return FORMATS[layout] if len(node.shape) == 4 else torch.contiguous_format


def _ready(tensor: Tensor, layout: str) -> Tensor:
    format = FORMATS[layout] if tensor.dim() == 4 else torch.contiguous_format
    return tensor.contiguous(memory_format=format)
