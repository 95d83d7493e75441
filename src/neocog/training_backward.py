"""The backward program of a stage: from the gradients of its outputs to all that are wanted.

Nodes come in reverse. The gradient of a map is written by the first of its readers to be undone and
added to by the others, in the epilogue of their convolutions where they have one. It has the halo
that the convolution reads which takes it further back.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

from . import norm_steps, strided
from .convolutions import Weights
from .kept import Kept, activation_of, is_norm, pool_of, undone_by_result
from .maps import Halo, Map, read
from .network import BatchStatistics, Layer, Node, Norm, Pointwise
from .network import Pooling as PoolNode
from .pools import unpool
from .problem import Act, Add
from .program import LINE, Place, Program
from .training_steps import Spec, Steps, layout
from .weight_gradients import weight_gradient_steps

IDENTITY = Act("identity")


@dataclass(frozen=True)
class Backward:
    """The program, and what its call buffers are.

    In order: those of ``inputs`` as in0.., the parameters ("p " + name), kept, the gradients of the
    outputs gout0.., then of the inputs ``gin``, and ``uses``: of each use of a parameter, gp0.. .
    """

    program: Program
    gin: tuple[int, ...]
    uses: tuple[str, ...]


def backward_program(
    spec: Spec, kept: Kept, wanted: Collection[Node], graded: Collection[str],
    arrived: Collection[Node],
) -> Backward:  # fmt: skip
    """``wanted``: the nodes whose gradient is needed; ``graded``: the parameters with one;
    ``arrived``: the outputs whose gradients come with the call."""
    nodes = _by_depth([node for node in spec.nodes if node in wanted])
    uses = [name for node in nodes for name in _learned(node, graded)]
    gin = [i for i, node in enumerate(spec.inputs) if node in wanted]
    names = [f"in{i}" for i in range(len(spec.inputs))]
    names += [f"p {name}" for name in spec.strides]
    names += ["kept", *(f"gout{i}" for i in range(len(spec.outputs)))]
    names += [*(f"gin{i}" for i in gin), *(f"gp{i}" for i in range(len(uses)))]
    steps = _Undo(spec, kept, Program(tuple(names)), given=True, wanted=wanted, graded=graded,
                  arrived=arrived)  # fmt: skip
    steps.all(nodes)
    return Backward(steps.p, tuple(gin), tuple(uses))


def _by_depth(nodes: Sequence[Node]) -> list[Node]:
    """Nodes by the longest way that leads to them.

    Branches that begin with the same map come to it at the same time, on their way back: its
    gradient need not wait for the longer one.
    """
    depth: dict[Node, int] = {}
    for node in nodes:
        depth[node] = 1 + max(depth.get(source, 0) for source in node.inputs)
    return sorted(nodes, key=lambda node: depth[node])


def _learned(node: Node, graded: Collection[str]) -> list[str]:
    """The parameters of a node that have gradients, in order."""
    names: tuple[str | None, ...] = ()
    match node.op:
        case Layer(weight=weight, bias=bias):
            names = (weight, bias)
        case Pointwise(norm=Norm() | BatchStatistics() as norm):
            names = (norm.weight, norm.bias)
    return [name for name in names if name is not None and name in graded]


@dataclass
class _Undo(Steps):
    wanted: Collection[Node] = ()
    graded: Collection[str] = ()
    arrived: Collection[Node] = ()
    gradients: dict[Node, Hashable] = field(default_factory=dict)
    """The key of each gradient's map."""
    first_use: int = 0
    """The number of the node's first use of a parameter."""
    results: list[Place] = field(default_factory=list)
    """The gradients of parameters, by their uses."""

    def all(self, nodes: Sequence[Node]) -> None:
        """The steps of these nodes, last one first."""
        self._lend_results(nodes)
        self.first_use = sum(len(_learned(node, self.graded)) for node in nodes)
        for node in reversed(nodes):
            self.first_use -= len(_learned(node, self.graded))
            self.p.about = node
            if node in self.arrived:
                self._take(node, f"gout{self.spec.outputs.index(node)}")
            self._undo(node)
        for i, node in enumerate(self.spec.inputs):
            if node in self.wanted:
                self.p.about = node
                self.deliver(self.maps[self.gradients[node]], node, f"gin{i}")

    def _buffer_for(self, node: Node, name: str | None) -> Place | None:
        """Where the gradient of a parameter of this node goes, if it is wanted."""
        if name is None or name not in self.graded:
            return None
        number = self.first_use + _learned(node, self.graded).index(name)
        return self.results[number]

    def _lend_results(self, nodes: Sequence[Node]) -> None:
        """Gradients of parameters serve as scratch until they are computed."""
        for name in (name for node in nodes for name in _learned(node, self.graded)):
            place = self.p.buffer(f"gp{len(self.results)}")
            size = self.spec.sizes[name]
            size -= size % LINE
            self.results.append(self.p.lend(place, size, False) if size else place)

    # ---------------------------------------------------------------- gradients of maps

    def _halo(self, node: Node) -> Halo:
        """What the convolution reaches beyond a gradient that takes it further back."""
        if not isinstance(node.op, Layer) or node.inputs[0] not in self.wanted:
            return Halo()
        conv = node.op.block.conv
        return strided.halo(conv.grad_input(), self._weights(node.op).adjoint())

    def _weights(self, op: Layer) -> Weights:
        strides = self.spec.strides[op.weight]
        return Weights.of(self.parameter(op.weight), strides, op.block.conv)

    def _own_halo(self, node: Node) -> Halo:
        """The halo of the gradient of a node's result."""
        if self._in_place(node):
            return self._own_halo(node.inputs[0])
        raw = activation_of(node).name == "identity" and pool_of(node) is None
        return self._halo(node) if raw else Halo()

    def _in_place(self, node: Node) -> bool:
        """Whether a batch norm's gradient goes where that of its result was."""
        y, *residual = node.inputs or (node,)
        passed_on = residual and activation_of(node) == IDENTITY
        return is_norm(node) and y in self.wanted and self.spec.uses[y] == [node] and not passed_on

    def _take(self, node: Node, name: str) -> None:
        """The gradient that comes from outside."""
        m = read(self.p, self.spec.target, self.p.buffer(name), layout(node), node.map_shape)
        to, adds = self._into(node)
        self.elementwise(node, "add" if adds else "copy", (), [m, to][: 1 + adds], to)

    def _into(self, node: Node) -> tuple[Map, bool]:
        """Where to write a part of a node's gradient, and whether another stands there already."""
        adds = node in self.gradients
        if not adds:
            self.gradients[node] = key = ("gradient", node)
            self.scratch(key, node.map_shape, self._own_halo(node))
        return self.maps[self.gradients[node]], adds

    def _pass_on(self, node: Node, m: Map, key: Hashable | None) -> None:
        """Give a gradient to another node too, or add it to its own.

        ``key``: the map's, if nobody else needs it any more.
        """
        if node not in self.wanted:
            return
        if key is not None and node not in self.gradients and self._own_halo(node).empty:
            self.gradients[node] = key
            return
        to, adds = self._into(node)
        self.elementwise(node, "add" if adds else "copy", (), [m, to][: 1 + adds], to)

    # ---------------------------------------------------------------- nodes

    def _undo(self, node: Node) -> None:
        key = self.gradients[node]
        g = self.maps[key]
        match node.op:
            case Layer():
                self._layer(node, node.op, g)
            case Pointwise() if is_norm(node):
                self._norm(node, node.op, g, key)
            case Pointwise():
                g, key = self._before_activation(node, g, key)
                for i, source in enumerate(node.inputs):
                    self._pass_on(source, g, key if i == len(node.inputs) - 1 else None)
            case PoolNode():
                self._pool(node, node.op, g)

    def _before_activation(self, node: Node, g: Map, key: Hashable) -> tuple[Map, Hashable]:
        act, shape = activation_of(node), node.map_shape
        if act == IDENTITY:
            return g, key
        out = self.scratch(made := ("before", node), shape)
        result = self.value(node)
        unpool(self.p, self.spec.target, None, act, shape, shape, g, out, result, None)
        return out, made

    def _layer(self, node: Node, op: Layer, g: Map) -> None:
        p, target, conv, source = self.p, self.spec.target, op.block.conv, node.inputs[0]
        act, pool = activation_of(node), pool_of(node)
        if act != IDENTITY or pool is not None:
            pooled, g = g, self.scratch(("before", node), op.block.conv_shape, self._halo(node))
            result = self.value(node) if act != IDENTITY else None
            winners = self.winners(node) if pool is not None else None
            shapes = (op.block.conv_shape, node.map_shape)
            unpool(p, target, pool, act, *shapes, pooled, g, result, winners)
        places = {"w": self._buffer_for(node, op.weight), "bias": self._buffer_for(node, op.bias)}
        needs = tuple(name for name, place in places.items() if place is not None)
        if needs:
            x = self.value(source)
            weight_gradient_steps(
                p, target, conv, x, g, needs, self.spec.exact, places["w"], places["bias"]
            )
        if source in self.wanted:
            weights, adjoint = self._weights(op).adjoint(), conv.grad_input()
            out, adds = self._into(source)
            steps = (Add(),) if adds else ()
            extra = out.fields("residual") if adds else {}
            if strided.prefers(adjoint, weights):
                strided.convolve(p, target, adjoint, g, weights, out, steps, extra, any_size=False)
            else:
                self.convolve(adjoint, weights, g, out, steps, extra)

    def _norm(self, node: Node, op: Pointwise, g: Map, key: Hashable) -> None:
        y, *residual = node.inputs
        norm, act = op.norm, activation_of(node)
        assert isinstance(norm, Norm | BatchStatistics)
        maps = {"g": g, "y": self.value(y)}
        if undone_by_result(node):
            maps["z"] = self.value(node)
        mode = ""
        # The pass that writes the gradient of y undoes the activation for the residual by the way.
        together = y in self.wanted and act != IDENTITY
        if residual and residual[0] in self.wanted and together:
            maps["residual"], adds = self._into(residual[0])
            mode = "add" if adds else "write"
        made = None
        if y in self.wanted:
            if self._in_place(node):
                self.gradients[y] = key
                maps["out"] = g
            elif y not in self.gradients:
                maps["out"] = self._into(y)[0]
            else:
                made = maps["out"] = self.scratch(("part", node), node.map_shape)
        places = {"gweight": self._buffer_for(node, norm.weight),
                  "gbias": self._buffer_for(node, norm.bias)}  # fmt: skip
        norm_steps.norm_gradient(
            self.p, self.spec.target, node.map_shape, act, maps, self.statistics(node),
            isinstance(norm, BatchStatistics),
            {name: place for name, place in places.items() if place is not None}, mode,
        )  # fmt: skip
        if made is not None:
            self._pass_on(y, made, ("part", node))
        if residual and residual[0] in self.wanted and not together:
            g, key = self._before_activation(node, g, key)
            self._pass_on(residual[0], g, key)

    def _pool(self, node: Node, op: PoolNode, g: Map) -> None:
        (source,), pool = node.inputs, op.pool
        winners = self.winners(node) if pool.kind == "max" else None
        fresh = source not in self.gradients
        out = self._into(source)[0] if fresh else self.scratch(("part", node), pool.in_shape)
        shapes = (pool.in_shape, pool.out_shape)
        unpool(self.p, self.spec.target, pool.step, IDENTITY, *shapes, g, out, None, winners)
        if not fresh:
            self._pass_on(source, out, ("part", node))
