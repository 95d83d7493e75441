"""One stage of a network as a program: its steps, and the memory of its maps.

Every map is NHWC with the halo that its readers need, written by its producer; scratch is shared
out by lifetimes; concatenated maps are written straight into their place among the channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from . import bands, choices
from .cpu import elementwise, linear
from .kernels import kernel
from .maps import NCHW, NHWC, Halo, Map, clear_halo, deliver, read, scratch_map
from .network import Concat, Flatten, Layer, Linear, Node, Padding, Pointwise
from .network import Pooling as PoolNode
from .pools import pool_steps
from .problem import Bias, Conv
from .program import Place, Program
from .target import Target

ITSELF = "itself"
"""The part of a vector that is the parameter, unchanged."""


@dataclass(frozen=True)
class Packed:
    """The packed weights of a layer: which parameter, in the order which kernel reads."""

    weight: str
    conv: Conv
    """The smallest with these channels and windows: the size of the maps does not matter."""
    algorithm: str

    @classmethod
    def of(cls, choose: choices.Choice, layer: Layer) -> Packed:
        """The packed weights of ``layer``."""
        chosen = choose(layer.block.conv, layer.block.epilogue, layer.averaged)
        return cls(layer.weight, choices.layer(layer.block.conv), chosen)


@dataclass(frozen=True)
class Vector:
    """A vector a program reads: a parameter itself, or scale or shift of a batch norm."""

    source: object
    part: str


@dataclass
class Native:
    """A program, and what its call buffers are, in order."""

    program: Program
    inputs: list[Node]
    outputs: list[Node]
    packed: list[Packed]
    vectors: list[Vector]


@dataclass
class Builder:
    """Makes the program of some nodes; :meth:`build` once."""

    nodes: list[Node]
    uses: dict[Node, list[Node]]
    """Who reads each node, of the whole network."""
    target: Target
    choose: choices.Choice
    seam: int
    """How many of the first nodes run image by image."""
    maps: dict[Node, Map] = field(default_factory=dict)
    delivered: set[Node] = field(default_factory=set)
    planes: dict[Node, int] = field(default_factory=dict)
    """Elements between the channels of maps that are planes."""
    full: dict[Node, Map] = field(default_factory=dict)
    """Maps of the whole batch, made in iterations and read after them."""

    def build(self) -> Native:
        """The program and what its call buffers are."""
        own = set(self.nodes)
        self.own = own
        inputs = list(dict.fromkeys(s for n in self.nodes for s in n.inputs if s not in own))
        outputs = [n for n in self.nodes if any(u not in own or u is n for u in self.uses[n])]
        self.outputs = set(outputs)
        self.keys: dict[Node, Packed] = {}
        self.packed: dict[Packed, str] = {}
        self.vectors: dict[Vector, str] = {}
        for node in self.nodes:
            self._name_parameters(node)
        names = [f"in{i}" for i in range(len(inputs))] + [f"out{i}" for i in range(len(outputs))]
        self.p = Program((*names, *self.packed.values(), *self.vectors.values()))
        self.buffers = dict(zip([*inputs, *outputs], names, strict=True))
        self.slices = self._slices()
        self.wanted = {n: self._halo(n) for n in [*inputs, *self.nodes]}
        batch, cut = self.nodes[0].map_shape[0], self.seam
        self._run(self.nodes[:cut], 1, batch)
        self._run(self.nodes[cut:], batch, 1)
        return Native(self.p, inputs, outputs, list(self.packed), list(self.vectors))

    def _run(self, nodes: list[Node], images: int, iterations: int) -> None:
        """Emit nodes, ``images`` of the batch at a time."""
        if not nodes:
            return
        self.images, self.iterations, self.running = images, iterations, set(nodes)
        self.p.section(iterations)
        self.maps.update(self.full)
        for node in self.buffers:
            if node not in self.own and any(u in self.running for u in self.uses[node]):
                self._read_input(node)
        for chain in bands.deal(nodes, self._linked):
            if len(chain) > 1:
                self._emit_chain(chain)
            else:
                self._emit(chain[0])
            for node in chain:
                if node in self.outputs and node not in self.delivered:
                    self._deliver(node)

    def _shape(self, node: Node) -> tuple[int, int, int, int]:
        """The shape of a node's map in one iteration."""
        return (self.images, *node.map_shape[1:])

    def _moving(self, place: Place, image: int) -> Place:
        """A place in memory of the whole batch, as an iteration sees it."""
        return self.p.moving(place, image * self.images) if self.iterations > 1 else place

    def _call_buffer(self, node: Node) -> Place:
        _, channels, height, width = node.map_shape
        return self._moving(self.p.buffer(self.buffers[node]), channels * height * width)

    # ---------------------------------------------------------------- parameters

    def _name_parameters(self, node: Node) -> None:
        op = node.op
        if isinstance(op, Layer):
            key = self.keys[node] = Packed.of(self.choose, op)
            self.packed.setdefault(key, f"w{len(self.packed)}")
        for vector in _vectors(node).values():
            self.vectors.setdefault(vector, f"v{len(self.vectors)}")

    def _parameters(self, node: Node) -> dict[str, Place | int]:
        return {
            name: self.p.buffer(self.vectors[vector]) for name, vector in _vectors(node).items()
        }

    # ---------------------------------------------------------------- memory

    def _slices(self) -> dict[Node, tuple[Node, int]]:
        """Which map is written straight into which concatenation, from which channel on."""
        found: dict[Node, tuple[Node, int]] = {}
        for node in self.nodes:
            first = 0
            for source in node.inputs if isinstance(node.op, Concat) else ():
                own = source in self.own and not isinstance(source.op, Concat | Flatten | Padding)
                if own and source not in found:
                    found[source] = (node, first)
                first += source.map_shape[1]
        return found

    def _halo(self, node: Node) -> Halo:
        """What the readers of a map reach beyond it."""
        users = [user for user in self.uses[node] if user in self.own and user is not node]
        halos = [
            _sides(choices.halo(user.op.block.conv, self.keys[user].algorithm))
            for user in users
            if isinstance(user.op, Layer)
        ]
        return Halo(*(max(side) for side in zip(*halos, strict=True))) if halos else Halo()

    def _allocate(self, node: Node) -> Map:
        """The map that ``node`` is written to."""
        if node in self.slices:
            whole, first = self.slices[node]
            if whole not in self.maps:
                self._allocate(whole)
            m = self.maps[whole]
            self.maps[node] = replace(m, place=m.place + first)
            if whole in self.full:
                full = self.full[whole]
                self.full[node] = replace(full, place=full.place + first)
        else:
            halo = self.wanted[node]
            parts = [part for part, (whole, _) in self.slices.items() if whole is node]
            for part in parts:
                halo = Halo(*map(max, _sides(halo), _sides(self.wanted[part])))
            readers = [u for n in (node, *parts) for u in self.uses[n] if u in self.own]
            lasting = self.iterations > 1 and any(u not in self.running for u in readers)
            shape = node.map_shape if lasting else self._shape(node)
            m, corner = scratch_map(self.p, shape, halo, shared=lasting)
            if lasting:
                self.full[node] = m
                m = replace(m, place=self._moving(m.place, m.image))
                corner = self._moving(corner, m.image)
            clear_halo(self.p, self.target, m, corner, self._shape(node), halo)
            self.maps[node] = m
        return self.maps[node]

    # ---------------------------------------------------------------- nodes

    def _read_input(self, node: Node) -> None:
        self.p.about = node
        place = self._call_buffer(node)
        layout = _layout(node)
        halo = self.wanted[node]
        if layout == NCHW and self._reads_planes(node):
            images, channels, height, width = self._shape(node)
            m = read(self.p, self.target, place, NHWC, (images * channels, 1, height, width), halo)
            self.planes[node] = m.image
            m = replace(m, image=channels * m.image)
        else:
            m = read(self.p, self.target, place, layout, self._shape(node), halo)
        self.maps[node] = m

    def _reads_planes(self, node: Node) -> bool:
        """Whether all that read a map can read its channels as planes: no need to mix them."""
        users = [u for u in self.uses[node] if u is not node and u in self.own]
        return node.shape[1] > 1 and all(
            isinstance(u.op, Layer)
            and choices.reads_planes(u.op.block.conv, self.keys[u].algorithm)
            and u.inputs[1:] != (node,)
            for u in users
        )

    def _emit(self, node: Node) -> None:
        self.p.about = node
        self._make_room(node)
        match node.op:
            case Layer():
                self._layer(node, node.op)
            case PoolNode(pool):
                x, pool = self.maps[node.inputs[0]], replace(pool, batch=self.images)
                pool_steps(self.p, self.target, pool, x, self.maps[node], None)
            case Padding():
                self._pad(node, node.op)
            case Pointwise():
                self._pointwise(node, node.op)
            case Concat():
                self._concat(node)
            case Flatten():
                self._flatten(node)
            case Linear():
                self._linear(node, node.op)

    def _make_room(self, node: Node) -> None:
        """Memory for the map of a node; a flattened one sees to it itself."""
        direct = self._direct_output(node)
        if direct is not None:
            self.maps[node] = direct
        elif not isinstance(node.op, Flatten) and node not in self.maps:
            self._allocate(node)

    def _linked(self, node: Node, following: Node) -> bool:
        """Whether the map between two layers is better computed in bands."""
        if self.images != 1 or following.inputs[:1] != (node,) or self.uses[node] != [following]:
            return False
        return 4 * math.prod(node.map_shape[1:]) > bands.BANDED_BYTES and all(
            isinstance(n.op, Layer)
            and self.keys[n].algorithm == choices.DIRECT
            and n.op.block.pool is None
            and n not in self.slices
            and bands.slides(n.op.block.conv)
            for n in (node, following)
        )

    def _emit_chain(self, chain: list[Node]) -> None:
        """Layers in turn, a few rows at a time."""
        convs = [replace(n.op.block.conv, batch=1) for n in chain if isinstance(n.op, Layer)]
        self.p.about = last = chain[-1]
        self._make_room(last)

        def layer(number: int, conv: Conv, x: Map, out: Map, row: int) -> None:
            self.p.about = node = chain[number]
            residuals = [bands.row_of(self.maps[n], row) for n in node.inputs[1:]]
            plane = 0 if number else self.planes.get(node.inputs[0], 0)
            self._convolve(node, conv, x, out, residuals, plane)

        halos = [choices.halo(conv, choices.DIRECT) for conv in convs]
        start = self.maps[chain[0].inputs[0]]
        bands.emit(self.p, self.target, convs, halos, start, self.maps[last], layer)

    def _direct_output(self, node: Node) -> Map | None:
        """The output tensor itself, where its layout is the map's and nobody needs a halo."""
        if node not in self.outputs or node in self.slices or isinstance(node.op, Flatten | Concat):
            return None
        if not self.wanted[node].empty:
            return None
        batch, channels, height, width = node.map_shape
        if _layout(node) == NCHW and height * width > 1 and channels > 1:
            return None
        return self._to_output(node)

    def _to_output(self, node: Node) -> Map:
        """The output tensor as a map, which whoever asks for it writes."""
        self.delivered.add(node)
        shape = node.map_shape[1:]
        if self.iterations > 1 and any(
            u in self.own and u not in self.running for u in self.uses[node] if u is not node
        ):
            self.full[node] = Map.dense(self.p.buffer(self.buffers[node]), *shape)
        return Map.dense(self._call_buffer(node), *shape)

    def _deliver(self, node: Node) -> None:
        m, shape = self.maps[node], self._shape(node)
        if _layout(node) == NCHW and shape[1] > 1 and shape[2] * shape[3] > 1:
            deliver(self.p, self.target, m, self._call_buffer(node), NCHW, shape)
        else:
            self._copy(m, Map.dense(self._call_buffer(node), *shape[1:]), shape)

    def _copy(self, source: Map, to: Map, shape: Sequence[int]) -> None:
        self._elementwise("copy", (), (source,), to, shape, {})

    def _elementwise(self, kind, steps, sources, to: Map, shape, parameters) -> None:
        batch, channels, height, width = shape
        fields: dict[str, Place | int] = {**parameters, **to.fields("out")}
        for letter, m in zip("ab", sources, strict=False):
            fields |= m.fields(letter)
        plan = elementwise.ElementwisePlan(self.target, channels, kind, steps)
        self.p.step(kernel(plan), batch * height, rows=height, cols=width, **fields)
        self.p.work += batch * channels * height * width

    def _layer(self, node: Node, op: Layer) -> None:
        x, *residuals = (self.maps[n] for n in node.inputs)
        conv, plane = replace(op.block.conv, batch=self.images), self.planes.get(node.inputs[0], 0)
        self._convolve(node, conv, x, self.maps[node], residuals, plane)

    def _convolve(
        self, node: Node, conv: Conv, x: Map, out: Map, residuals: Sequence[Map], plane: int
    ) -> None:
        """``conv`` is that of the layer ``node``, or some rows of it."""
        assert isinstance(node.op, Layer)
        extra, key = self._parameters(node), self.keys[node]
        for residual in residuals:
            extra |= residual.fields("residual")
        packed = self.p.buffer(self.packed[key])
        steps = node.op.block.epilogue
        choices.convolve(
            self.p, self.target, conv, key.algorithm, x, packed, out, steps, extra, plane
        )  # fmt: skip

    def _pointwise(self, node: Node, op: Pointwise) -> None:
        sources = [self.maps[s] for s in node.inputs]
        if len(sources) == 2 and node.inputs[1].map_shape != node.inputs[0].map_shape:
            sources[1] = Map(sources[1].place, sources[1].image, 0, 0)
        self._elementwise(
            op.kind, op.steps, sources, self.maps[node], self._shape(node), self._parameters(node)
        )

    def _pad(self, node: Node, op: Padding) -> None:
        m, around, source = self.maps[node], self.wanted[node], node.inputs[0]
        inside = replace(m, place=m.place + (op.top * m.row + op.left * m.pixel))
        # Its zeros and those of its halo at once: rows are cleared from end to end.
        own = (op.top, op.bottom, op.left, op.right)
        halo = Halo(*(a + b for a, b in zip(_sides(around), own, strict=True)))
        corner = m.place + -(around.top * m.row + around.left * m.pixel)
        clear_halo(self.p, self.target, inside, corner, self._shape(source), halo)
        self._copy(self.maps[source], inside, self._shape(source))

    def _concat(self, node: Node) -> None:
        m, first = self.maps[node], 0
        for source in node.inputs:
            if self.slices.get(source) != (node, first):
                to = replace(m, place=m.place + first)
                self._copy(self.maps[source], to, self._shape(source))
            first += source.map_shape[1]

    def _flatten(self, node: Node) -> None:
        source = node.inputs[0]
        flat = self._to_output(node) if node in self.outputs else self._allocate(node)
        self.maps[node] = flat
        m, shape = self.maps[source], self._shape(source)
        if shape[2] * shape[3] == 1:
            self._copy(m, flat, shape)
        elif shape[1] == 1:
            self._copy(m, Map.dense(flat.place, *shape[1:]), shape)
        else:
            deliver(self.p, self.target, m, flat.place, NCHW, shape)

    def _linear(self, node: Node, op: Linear) -> None:
        steps = ((Bias(),) if op.bias else ()) + ((op.act,) if op.act else ())
        x, out = self.maps[node.inputs[0]], self.maps[node]
        batch, outputs = self.images, node.shape[1]
        (weight,) = [v for k, v in _vectors(node).items() if k == "w"]
        fields = {k: v for k, v in self._parameters(node).items() if k != "w"}
        channels = node.inputs[0].shape[1]
        self.p.step(
            kernel(linear.LinearPlan(self.target, steps)),
            -(-outputs // linear.OUTPUTS_PER_ITEM),
            x=x.place, x_row=x.image, w=self.p.buffer(self.vectors[weight]), w_row=channels,
            out=out.place, out_row=out.image, batch=batch, outputs=outputs, inputs=channels,
            **fields,
        )  # fmt: skip
        self.p.work += batch * channels * outputs


def _layout(node: Node) -> str:
    """The layout of a node's tensor; vectors (N, C) are both."""
    return NCHW if len(node.shape) == 4 and not node.channels_last else NHWC


def _sides(halo: Halo) -> tuple[int, int, int, int]:
    return halo.top, halo.bottom, halo.left, halo.right


def _vectors(node: Node) -> dict[str, Vector]:
    """What a node reads besides maps and packed weights, by the names kernels give it."""
    op, found = node.op, {}
    if isinstance(op, Linear):
        found["w"] = Vector(op.weight, ITSELF)
    if isinstance(op, Layer | Linear) and op.bias is not None:
        found["bias"] = Vector(op.bias, ITSELF)
    if isinstance(op, Layer | Pointwise) and op.norm is not None:
        found |= {part: Vector(op.norm, part) for part in ("scale", "shift")}
    return found
