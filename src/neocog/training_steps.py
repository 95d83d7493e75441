"""What the forward and the backward program of a stage have in common: maps and weights.

What is kept between the two is lent to both as scratch: to the forward program before it is
written, to the backward program as soon as it has been read for the last time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from . import choices, norm_steps
from .convolutions import Weights
from .cpu import elementwise
from .kept import Kept, halo_for, is_norm
from .kernels import kernel, settle
from .maps import NCHW, NHWC, Halo, Map, clear_halo, deliver, map_with_halo, read, scratch_map
from .network import BatchStatistics, Layer, Node, Norm, Pointwise, Shape
from .network import Pooling as PoolNode
from .pools import pool_steps
from .problem import Affine, Conv, Pooling, Step
from .program import Place, Program
from .target import Target
from .winograd_steps import SLOTS_PER_BYTE

NONE = Halo()


@dataclass(frozen=True)
class Spec:
    """What both programs of a stage are made from."""

    nodes: tuple[Node, ...]
    uses: Mapping[Node, Sequence[Node]]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    strides: Mapping[str, tuple[int, ...]]
    """Of the parameters, by name, in the order in which they come with each call."""
    sizes: Mapping[str, int]
    """Elements of the parameters."""
    target: Target
    exact: bool


@dataclass
class Steps:
    """A program under way: the forward one or the backward one."""

    spec: Spec
    kept: Kept
    p: Program
    given: bool = False
    """Whether what is kept comes with the call, and is of no use to anybody afterwards."""
    maps: dict[Hashable, Map] = field(default_factory=dict)
    parts: dict[int, Place] = field(default_factory=dict)
    """Of what is kept, by where they start."""

    def __post_init__(self) -> None:
        """All that is kept, in parts."""
        start = self.p.buffer("kept")
        for offset, size in self.kept.parts.items():
            self.parts[offset] = self.p.lend(start + offset, size, self.given)

    # ---------------------------------------------------------------- memory

    def scratch(self, key: Hashable, shape: Shape, halo: Halo = NONE) -> Map:
        """A new map in scratch."""
        m, corner = scratch_map(self.p, shape, halo)
        clear_halo(self.p, self.spec.target, m, corner, shape, halo)
        self.maps[key] = m
        return m

    def parameter(self, name: str) -> Place:
        """A parameter's own memory."""
        return self.p.buffer(f"p {name}")

    # ---------------------------------------------------------------- values

    def value(self, node: Node) -> Map:
        """The map of a node: written already, kept, or computed here again."""
        if node not in self.maps:
            self.maps[node] = self._found(node)
        return self.maps[node]

    def _found(self, node: Node) -> Map:
        if node in self.spec.inputs:
            return self._read_input(node)
        if node in self.kept.values:
            return self._kept_map(node)
        if is_norm(node):
            return self.normalised(node)
        return self.pooled(node, None)

    def _kept_map(self, node: Node) -> Map:
        offset, halo = self.kept.values[node]
        return map_with_halo(self.parts[offset], node.map_shape, halo)

    def _read_input(self, node: Node) -> Map:
        place = self.p.buffer(f"in{self.spec.inputs.index(node)}")
        halo = halo_for(node, self.spec.uses)
        return read(self.p, self.spec.target, place, layout(node), node.map_shape, halo)

    def new_value(self, node: Node) -> Map:
        """Memory for the map of a node: in what is kept, or scratch."""
        if node not in self.kept.values:
            return self.scratch(node, node.map_shape, halo_for(node, self.spec.uses))
        m, (offset, halo) = self._kept_map(node), self.kept.values[node]
        clear_halo(self.p, self.spec.target, m, self.parts[offset], node.map_shape, halo)
        self.maps[node] = m
        return m

    def normalised(self, node: Node) -> Map:
        """The pass behind a batch norm's statistics."""
        assert isinstance(node.op, Pointwise)
        sources = [self.value(source) for source in node.inputs]
        out = self.new_value(node)
        self.elementwise(node, "copy", node.op.steps, sources, out)
        return out

    def pooled(self, node: Node, winners: Place | None) -> Map:
        """The pass of a pool, which takes that of a batch norm along if nobody else needs it."""
        (source,), op = node.inputs, node.op
        assert isinstance(op, PoolNode)
        before: tuple[Step, ...] = ()
        parameters = {}
        if self.taken_along(source):
            assert isinstance(source.op, Pointwise)
            before, parameters = source.op.steps, self.scale_and_shift(source)
            (source,) = source.inputs
        x, out = self.value(source), self.new_value(node)
        pool_steps(self.p, self.spec.target, op.pool, x, out, winners, before, parameters)
        return out

    def taken_along(self, node: Node) -> bool:
        """Whether the pass behind a batch norm's statistics is left to the pools that read it."""
        spec = self.spec
        inside = is_norm(node) and len(node.inputs) == 1 and node not in spec.outputs
        return inside and all(isinstance(user.op, PoolNode) for user in spec.uses[node])

    def scale_and_shift(self, node: Node) -> dict[str, Place]:
        """What a batch norm comes down to once its statistics are there."""
        target, channels, place = self.spec.target, node.map_shape[1], self.statistics(node)
        rows = {"scale": norm_steps.SCALE, "shift": norm_steps.SHIFT}
        return {
            name: norm_steps.statistic(target, channels, place, row) for name, row in rows.items()
        }

    def statistics(self, node: Node) -> Place:
        """Where the statistics of a batch norm stand."""
        return self.parts[self.kept.statistics[node]]

    def winners(self, node: Node) -> Place:
        """Where the winning taps of a max pool are kept."""
        return self.parts[self.kept.winners[node]]

    def norm_parameters(self, node: Node) -> dict[str, Place]:
        """Weight and bias of a batch norm, as far as it has them."""
        assert isinstance(node.op, Pointwise)
        norm = node.op.norm
        assert isinstance(norm, Norm | BatchStatistics)
        names = {"weight": norm.weight, "bias": norm.bias}
        return {key: self.parameter(name) for key, name in names.items() if name is not None}

    def elementwise(
        self, node: Node, kind: str, steps: tuple[Step, ...], sources: Sequence[Map], out: Map
    ) -> None:
        """A pass over whole maps; a residual comes last."""
        batch, channels, height, width = node.map_shape
        fields = out.fields("out")
        names = (*"ab"[: 1 if kind == "copy" else 2], "residual")
        for name, m in zip(names, sources, strict=False):
            fields |= m.fields(name)
        if any(isinstance(step, Affine) for step in steps):
            fields |= self.scale_and_shift(node)
        plan = elementwise.ElementwisePlan(self.spec.target, channels, kind, steps)
        self.p.step(kernel(plan), batch * height, rows=height, cols=width, **fields)
        self.p.work += batch * channels * height * width

    # ---------------------------------------------------------------- convolutions

    def convolve(
        self, conv: Conv, weights: Weights, x: Map, out: Map, epilogue: tuple[Step, ...] = (),
        extra: Mapping[str, Place | int] | None = None, winners: Map | None = None,
    ) -> None:  # fmt: skip
        """A convolution on weights that may have changed: pack them, then compute."""
        p, target, extra = self.p, self.spec.target, extra or {}
        pooled = any(isinstance(step, Pooling) for step in epilogue)
        algorithm = choices.DIRECT if pooled else self.algorithm(conv, epilogue)
        choices.convolve_packing(
            p, target, conv, algorithm, weights, x, out, epilogue, extra, winners
        )

    def algorithm(self, conv: Conv, epilogue: tuple[Step, ...] = ()) -> str:
        """The cheapest algorithm, packing the weights included."""
        if self.spec.exact:
            return choices.exact(conv, epilogue)
        return trained(self.spec.target, conv, epilogue)

    def deliver(self, m: Map, node: Node, name: str) -> None:
        """Copy a map to the call buffer of the node's tensor, or of its gradient."""
        shape, place = node.map_shape, self.p.buffer(name)
        if layout(node) == NCHW and shape[1] > 1 and shape[2] * shape[3] > 1:
            deliver(self.p, self.spec.target, m, place, NCHW, shape)
        else:
            self.elementwise(node, "copy", (), [m], Map.dense(place, *shape[1:]))


def layout(node: Node) -> str:
    """The layout of a node's tensor, and of its gradient."""
    return NHWC if node.channels_last else NCHW


def trained(target: Target, conv: Conv, epilogue: tuple[Step, ...] = ()) -> str:
    """The cheapest algorithm for weights that are packed anew in every step."""

    def cost(name: str) -> float:
        packing = 4 * choices.packed_elements(target, conv, name) * SLOTS_PER_BYTE
        return choices.cost(target, conv, name) + packing

    found = choices.candidates(conv, epilogue)
    if len(found) == 1:
        return found[0]
    return settle((choices.layer(conv), epilogue), lambda: min(found, key=cost))


def pointwise_steps(layer: Layer) -> tuple[Step, ...]:
    """The pointwise steps of a layer, its pool left out."""
    return tuple(step for step in layer.block.epilogue if not isinstance(step, Pooling))
