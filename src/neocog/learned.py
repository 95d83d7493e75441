"""A compiled run while training, as a function that PyTorch's autograd knows.

One ``torch.autograd.Function`` with a program forward and one backward for each choice of outputs
whose gradients arrive.

https://docs.pytorch.org/docs/stable/notes/extending.html
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import handback, kept, kernels, norm_steps
from .execution import strides_prefer_channels_last
from .facts import grads_are_kept
from .memory import POOL
from .network import BatchStatistics, Input, Layer, Network, Node, Norm, Pointwise, Shape
from .network import Pooling as PoolNode
from .problem import Act, Add
from .program import Program
from .running import Given, Result, format_of, given_of, ready, returned
from .target import Target
from .training_backward import Backward, backward_program
from .training_forward import forward_program
from .training_fusion import fuse_for_training
from .training_steps import Spec


@dataclass
class Programs:
    """The programs of a run for one choice of what has gradients."""

    forward: Program
    kept: kept.Kept
    wanted: Mapping[Node, bool]
    """Inputs, and whether they have gradients."""
    graded: frozenset[str]
    """The parameters with gradients."""
    backward: dict[tuple[bool, ...], Backward] = field(default_factory=dict)
    """By the outputs whose gradients arrive; written when they are first needed."""


@dataclass(eq=False)
class Learned:
    """A run: called with its maps and its parameters, returns its outputs."""

    spec: Spec
    network: Network
    given: list[Given]
    shapes: Mapping[str, Shape]
    """Of the parameters."""
    graded: tuple[bool, ...]
    """Which outputs have gradients."""
    fallback: Callable[..., Any]
    """The same in PyTorch."""
    made: dict[tuple[bool, ...], Programs] = field(default_factory=dict)
    moment: kernels.Moment | None = field(default_factory=kernels.Moment.now)

    def __post_init__(self) -> None:
        """Nothing is compiled before it is needed."""
        self.running = [
            (node, node.op.norm)
            for node in self.spec.nodes
            if isinstance(node.op, Pointwise)
            and isinstance(node.op.norm, BatchStatistics)
            and node.op.norm.mean is not None
        ]
        self.unchecked = [(i, g) for i, g in enumerate(self.given) if not g.checked]
        self.results = [Result.of(node) for node in self.spec.outputs]

    @classmethod
    def of(
        cls, network: Network, tensors: Mapping[str, Tensor], target: Target, exact: bool,
        graded: Sequence[bool], checked: Collection[Node], fallback: Callable[..., Any],
    ) -> Learned:  # fmt: skip
        """Fuse.

        ``tensors``: the parameters in the order in which they come with each call; ``graded``:
        which outputs have gradients; ``checked``: inputs that the caller vouches for.
        """
        given = given_of(network, checked)
        fused = fuse_for_training(network)
        nodes = tuple(node for node in fused.nodes if node.native)
        inputs = tuple(node for node in fused.nodes if isinstance(node.op, Input))
        strides = {name: tuple(t.stride()) for name, t in tensors.items()}
        sizes = {name: t.numel() for name, t in tensors.items()}
        outputs = tuple(fused.outputs)
        spec = Spec(nodes, fused.uses(), inputs, outputs, strides, sizes, target, exact)
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        return cls(spec, fused, given, shapes, tuple(graded), fallback)

    def programs(self, graded: tuple[bool, ...]) -> Programs:
        """The programs where these of the inputs and parameters have gradients."""
        if graded not in self.made:
            spec, n = self.spec, len(self.spec.inputs)
            names = frozenset(
                name for name, has in zip(spec.strides, graded[n:], strict=True) if has
            )
            inputs = dict(zip(spec.inputs, graded, strict=False))
            wanted = _wanted(spec, inputs, names, spec.outputs)
            found = kept.keep(spec.nodes, spec.uses, wanted, names, spec.target)
            with kernels.at(self.moment):
                forward = forward_program(spec, found)
            self.made[graded] = Programs(forward, found, inputs, names)
        return self.made[graded]

    def backward(self, programs: Programs, arrived: tuple[bool, ...]) -> Backward:
        """The backward program where the gradients of these outputs arrive."""
        found = programs.backward.get(arrived)
        if found is None:
            outputs = [n for n, has in zip(self.spec.outputs, arrived, strict=True) if has]
            wanted = _wanted(self.spec, programs.wanted, programs.graded, outputs)
            with kernels.at(self.moment):
                found = programs.backward[arrived] = backward_program(
                    self.spec, programs.kept, wanted, programs.graded, outputs
                )
        return found

    def __call__(self, *given: Tensor) -> Any:
        """Its output, or a tuple of them."""
        for i, expected in self.unchecked:
            if not expected.fits(given[i]):
                return self.fallback(*given)
        n = len(self.given)
        maps = [ready(t, g.format) for t, g in zip(given, self.given, strict=False)]
        tensors = (*maps, *given[n:])
        if grads_are_kept() and any(t.requires_grad for t in tensors):
            made = _Run.apply(self, *tensors)
        else:
            made = self.compute(tensors, (False,) * len(tensors))[1]
        return returned(made, self.results)

    def compute(
        self, tensors: Sequence[Tensor], graded: tuple[bool, ...]
    ) -> tuple[Programs, list[Tensor], Tensor]:
        """Its programs, its outputs and what is kept for the backward pass."""
        spec, programs = self.spec, self.programs(graded)
        POOL.next_pass()
        saved = POOL.empty((programs.kept.size,))
        outs = [POOL.empty(node.shape, format_of(node)) for node in spec.outputs]
        dense = [t.contiguous() if t.dim() == 1 else t for t in tensors]
        programs.forward.run(*(t.data_ptr() for t in (*dense, saved, *outs)))
        named = dict(zip(spec.strides, tensors[len(spec.inputs) :], strict=True))
        self.update_running(programs.kept, saved, named)
        return programs, outs, saved

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


def _wanted(
    spec: Spec, inputs: Mapping[Node, bool], names: frozenset[str], outputs: Sequence[Node]
) -> frozenset[Node]:
    """The nodes that a gradient of ``outputs`` reaches, and that lead to something with one."""
    reached: set[Node] = set(outputs)
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


class _Run(torch.autograd.Function):
    """(run, inputs.., parameters..) -> outputs."""

    @staticmethod
    def forward(ctx: Any, run: Learned, *tensors: Tensor) -> tuple[Tensor, ...]:
        spec = run.spec
        programs, outs, saved = run.compute(tensors, tuple(ctx.needs_input_grad[1:]))
        ctx.run, ctx.programs = run, programs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(t for t, has in zip(outs, run.graded, strict=True) if not has)
        )
        read = _read(spec, programs)
        ctx.save_for_backward(
            *(t if r else None for t, r in zip(tensors, read, strict=True)), saved
        )
        # Only to be differentiated again: PyTorch would not keep these, nor mind a write to them.
        # Running statistics change with every call, and nothing in a gradient depends on them.
        named = dict(zip(spec.strides, tensors[len(spec.inputs) :], strict=True))
        moved = {id(named[str(name)]) for _, norm in run.running for name in (norm.mean, norm.var)}
        ctx.others = [
            None if r or id(t) in moved else (t, t._version)
            for t, r in zip(tensors, read, strict=True)
        ]
        return tuple(outs)

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        run, spec, programs = ctx.run, ctx.run.spec, ctx.programs
        *tensors, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            pairs = zip(tensors, ctx.others, strict=True)
            every = [t if other is None else _unchanged(other) for t, other in pairs]
            return None, *_differentiable(run, every, ctx.needs_input_grad[1:], grads)
        plan = run.backward(programs, tuple([g is not None for g in grads]))
        if torch._C._autograd._get_current_graph_task_keep_graph():
            saved = saved.clone()  # the program works in it
        given = [
            None if g is None else ready(g, format_of(node))
            for g, node in zip(grads, spec.outputs, strict=True)
        ]
        POOL.next_pass()
        inputs = [POOL.empty(spec.inputs[i].shape, format_of(spec.inputs[i])) for i in plan.gin]
        uses = [POOL.empty(run.shapes[name]) for name in plan.uses]
        read = [t if t is None or t.dim() != 1 else t.contiguous() for t in tensors]
        buffers = (*read, saved, *given, *inputs, *uses)
        plan.program.run(*(0 if t is None else t.data_ptr() for t in buffers))
        found: dict[str, Tensor] = {}
        for name, grad in zip(plan.uses, uses, strict=True):
            found[name] = found[name] + grad if name in found else grad
        found = {name: _laid(grad, spec.strides[name]) for name, grad in found.items()}
        arrived = dict(zip(plan.gin, inputs, strict=True))
        return (
            None,
            *(arrived.get(i) for i in range(len(spec.inputs))),
            *(found.get(name) for name in spec.strides),
        )


def _laid(grad: Tensor, strides: Shape) -> Tensor:
    """A gradient in the layout of its weight, as PyTorch gives it."""
    if strides_prefer_channels_last(grad.shape, strides):
        return grad.contiguous(memory_format=torch.channels_last)
    return grad


def _read(spec: Spec, programs: Programs) -> list[bool]:
    """Which inputs and parameters the backward pass reads."""
    wanted = _wanted(spec, programs.wanted, programs.graded, spec.outputs)
    names: set[str | None] = set()
    for node in wanted:
        match node.op:
            case Layer(weight=weight) if node.inputs[0] in wanted:
                names.add(weight)
            case Pointwise(norm=Norm() | BatchStatistics() as norm):
                # A norm of the batch keeps its statistics; others' have to be as they were.
                batch = isinstance(norm, BatchStatistics)
                names |= {norm.weight, norm.bias} | (set() if batch else {norm.mean, norm.var})
    return [*(n in programs.kept.read for n in spec.inputs), *(n in names for n in spec.strides)]


def _unchanged(kept: tuple[Tensor, int]) -> Tensor:
    """A tensor that was not saved, as it was."""
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for computing a gradient of a gradient has been modified "
            f"by an inplace operation: a tensor of shape {tuple(tensor.shape)} is at version "
            f"{tensor._version}, expected version {version}"
        )
    return tensor


def _differentiable(
    run: Learned, tensors: Sequence[Tensor], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: recomputed in PyTorch's own operators."""
    handback.say("a compiled run", "double backward")
    spec = run.spec
    # Views of their own: a tensor that comes in at two places gets two gradients.
    tensors = [None if t is None else t.view_as(t) for t in tensors]
    values: dict[Node, Tensor] = dict(zip(spec.inputs, tensors, strict=False))
    named = dict(zip(spec.strides, tensors[len(spec.inputs) :], strict=True))
    for node in spec.nodes:
        values[node] = _in_pytorch(node, [values[s] for s in node.inputs], named)
    arrived = [(n, g) for n, g in zip(spec.outputs, grads, strict=True) if g is not None]
    outs = [values[node].reshape(node.shape) for node, _ in arrived]
    given = [g for _, g in arrived]
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outs, wanted, given, create_graph=True, allow_unused=True))
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
