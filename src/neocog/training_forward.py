"""The forward program of a stage while training: it computes, and keeps what gradients need."""

from __future__ import annotations

from . import choices, norm_steps
from .convolutions import Weights
from .fusion import LARGEST_FUSED_WINDOW
from .kept import Kept, is_norm
from .kernels import many_sizes
from .maps import Map
from .network import BatchStatistics, Layer, Node, Norm, Pointwise
from .network import Pooling as PoolNode
from .pools import pool_steps
from .problem import Pool
from .program import Place, Program
from .training_steps import Spec, Steps, pointwise_steps


def forward_program(spec: Spec, kept: Kept) -> Program:
    """Call buffers: in0.., the parameters ("p " + name), kept, out0.. ."""
    names = [f"in{i}" for i in range(len(spec.inputs))]
    names += [f"p {name}" for name in spec.strides]
    names += ["kept", *(f"out{i}" for i in range(len(spec.outputs)))]
    made = Forward(spec, kept, Program(tuple(names)))
    for node in spec.nodes:
        made.p.about = node
        made.compute(node)
        if node in spec.outputs:
            made.deliver(made.value(node), node, f"out{spec.outputs.index(node)}")
    return made.p


class Forward(Steps):
    """Writes the steps of one node after the other."""

    def compute(self, node: Node) -> None:
        """The steps of one node."""
        match node.op:
            case Layer():
                self._layer(node, node.op)
            case PoolNode():
                self.pooled(node, self._winner_place(node))
            case Pointwise(norm=norm) if is_norm(node):
                self._statistics(node, norm)
                if not self.taken_along(node):
                    self.normalised(node)
            case Pointwise(kind, steps):
                sources = [self.value(source) for source in node.inputs]
                self.elementwise(node, kind, steps, sources, self.new_value(node))

    def _layer(self, node: Node, op: Layer) -> None:
        conv, pool = op.block.conv, op.block.pool
        weights = Weights.of(self.parameter(op.weight), self.spec.strides[op.weight], conv)
        extra = {} if op.bias is None else {"bias": self.parameter(op.bias)}
        x, steps = self.value(node.inputs[0]), pointwise_steps(op)
        fused = pool is not None and self._fuses(op, pool)
        if pool is None or fused:
            winners = self._winner_map(node) if fused else None
            out = self.new_value(node)
            every = op.block.epilogue if fused else steps
            self.convolve(conv, weights, x, out, every, extra, winners)
            return
        before = self.scratch(("before", node), op.block.conv_shape)
        self.convolve(conv, weights, x, before, steps, extra)
        out, place = self.new_value(node), self._winner_place(node)
        pool_steps(self.p, self.spec.target, pool, before, out, place)

    def _fuses(self, op: Layer, pool: Pool) -> bool:
        """Whether the pool is taken from rows in the cache: a part of direct convolution."""
        plain = self.algorithm(op.block.conv, pointwise_steps(op)) == choices.DIRECT
        varies = pool.whole and many_sizes()
        return plain and pool.step.rows.span <= LARGEST_FUSED_WINDOW and not varies

    def _winner_place(self, node: Node) -> Place | None:
        return self.winners(node) if node in self.kept.winners else None

    def _winner_map(self, node: Node) -> Map | None:
        """Where the winning taps of a max pool are kept, if a gradient will ask for them.

        Its place counts in float32 elements, its strides in winners.
        """
        place = self._winner_place(node)
        return None if place is None else Map.dense(place, *node.map_shape[1:])

    def _statistics(self, node: Node, norm: object) -> None:
        p, target, place = self.p, self.spec.target, self.statistics(node)
        parameters: dict[str, Place] = self.norm_parameters(node)
        y = self.value(node.inputs[0])
        if isinstance(norm, BatchStatistics):
            shape = node.map_shape
            norm_steps.batch_statistics(p, target, y, shape, norm.eps, parameters, place)
        elif isinstance(norm, Norm):
            given = {"mean": self.parameter(norm.mean), "variance": self.parameter(norm.var)}
            channels = node.map_shape[1]
            norm_steps.given_statistics(p, target, channels, norm.eps, given, parameters, place)
