"""Networks: a graph of layers with concrete shapes, between a run of a model and its program.

A :class:`Network` lists its nodes in an order in which they can be computed. A node has one
operation, inputs and the shape of its result as PyTorch has it: (N, C, H, W) for maps, (N, C) for
vectors. Parameters are names; who runs the network knows their tensors. Operations come in two
sorts:

- what stands in a graph of PyTorch's: one operation per call;
- what :mod:`neocog.fusion` makes of it: a :class:`Layer` is a convolution with everything up to
  its pool.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .problem import Act, Block, Conv, Pool, Step

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Input:
    """A tensor from outside: an argument of the call, or a parameter, by its name."""

    name: str
    argument: int | None = None
    """Which argument it is."""


@dataclass(frozen=True)
class Norm:
    """The tensors of a batch norm at inference: scale = weight / sqrt(var + eps).

    shift = bias - mean * scale; a missing weight is 1, a missing bias 0.
    """

    mean: str
    var: str
    weight: str | None
    bias: str | None
    eps: float


@dataclass(frozen=True)
class BatchStatistics:
    """The tensors of a batch norm while training: it takes the statistics of its batch.

    Running ones, if there are any, become ``(1 - momentum) * running + momentum * the batch's``.
    """

    mean: str | None
    var: str | None
    weight: str | None
    bias: str | None
    eps: float
    momentum: float


@dataclass(frozen=True)
class Constants:
    """The affine step ``scale * x + shift`` of a model's own numbers, alike for all channels."""

    channels: int
    scale: float
    shift: float


@dataclass(frozen=True)
class Convolution:
    """``conv`` of its input with the parameter ``weight`` (K, C/groups, KH, KW), plus ``bias``."""

    conv: Conv
    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class BatchNorm:
    """``scale[c] * x + shift[c]``."""

    norm: Norm | Constants | BatchStatistics


@dataclass(frozen=True)
class Activation:
    """An activation, element by element."""

    act: Act


@dataclass(frozen=True)
class Pooling:
    """A pool of maps."""

    pool: Pool


@dataclass(frozen=True)
class Padding:
    """Zeros around maps: rows and columns on each side, none of them negative."""

    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class Arithmetic:
    """``a + b`` or ``a * b``, where a and b have one shape or b is (N, C, 1, 1)."""

    kind: str
    """``add`` or ``mul``."""


@dataclass(frozen=True)
class Concat:
    """Its inputs' channels side by side."""


@dataclass(frozen=True)
class Flatten:
    """(N, C, H, W) as (N, C*H*W), in PyTorch's order."""


@dataclass(frozen=True)
class Linear:
    """A fully connected layer on (N, C): ``weight`` (K, C), ``bias`` (K)."""

    weight: str
    bias: str | None = None
    act: Act | None = None


@dataclass(frozen=True)
class Layer:
    """A fused block: ``block`` of inputs (x, and the residual if the epilogue adds one)."""

    block: Block
    weight: str
    bias: str | None = None
    norm: Norm | Constants | None = None
    averaged: int = 0
    """How many terms the sums have at least in which later layers take its values, if a vector for
    each picture is what they are for: such sums average its rounding errors. 0 if its values, or
    those of a map made from them, are returned: each of these shows what there is of errors."""


@dataclass(frozen=True)
class Pointwise:
    """A fused pointwise pass: copy, add or mul of the inputs, then the steps (affine, act).

    Where the steps add a residual, that is the last input.
    """

    kind: str
    steps: tuple[Step, ...]
    norm: Norm | Constants | BatchStatistics | None = None


Op = (
    Input | Convolution | BatchNorm | Activation | Pooling | Padding | Arithmetic | Concat | Flatten
    | Linear | Layer | Pointwise
)  # fmt: skip


@dataclass(eq=False)
class Node:
    """One operation, the nodes it reads and the shape of its result."""

    op: Op
    inputs: tuple[Node, ...]
    shape: Shape
    name: str = ""
    strides: Shape = ()
    """Of its tensor, where it comes from outside or leaves; contiguous if empty."""
    channels_last: bool = False
    """Whether PyTorch takes that tensor for channels_last."""

    @property
    def map_shape(self) -> tuple[int, int, int, int]:
        """The shape as kernels see it: (N, C) is a map of one pixel."""
        if len(self.shape) == 2:
            return (*self.shape, 1, 1)
        return self.shape  # type: ignore[return-value]

    @property
    def native(self) -> bool:
        """Whether a kernel computes it."""
        return not isinstance(self.op, Input)

    @property
    def multiply_adds(self) -> int:
        """Of convolutions and fully connected layers."""
        match self.op:
            case Convolution(conv=conv) | Layer(block=Block(conv=conv)):
                return conv.multiply_adds
            case Linear():
                batch, channels = self.inputs[0].shape
                return batch * channels * self.shape[1]
        return 0

    def __repr__(self) -> str:
        return f"{self.name or type(self.op).__name__} {'x'.join(map(str, self.shape))}: {self.op}"


@dataclass
class Network:
    """Nodes in an order in which they can be computed, and which of them are returned."""

    nodes: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)

    def add(self, op: Op, inputs: tuple[Node, ...], shape: Shape, name: str = "") -> Node:
        """Append a node."""
        node = Node(op, inputs, tuple(shape), name)
        self.nodes.append(node)
        return node

    def uses(self) -> dict[Node, list[Node]]:
        """Who reads each node; a returned node is also read by itself."""
        found: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for source in node.inputs:
                found[source].append(node)
        for node in self.outputs:
            found[node].append(node)
        return found

    def __str__(self) -> str:
        return "\n".join(str(node) for node in self.nodes)
