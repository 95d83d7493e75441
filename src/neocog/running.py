"""A compiled run of a model at inference: one native call on packed weights."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from . import choices
from .cpu import forks
from .execution import FORMATS
from .fusion import fuse
from .guard import plain
from .maps import NCHW, NHWC
from .network import Input, Layer, Linear, Network, Node, Shape
from .parameters import Parameters
from .problem import Block, Pool
from .stages import ITSELF, Builder, Native, Packed
from .target import Target
from .tuning import Tuner

PLANS_KEPT = 16
"""Shapes of arguments whose programs one model keeps."""

P = TypeVar("P")


class Plans(Generic[P]):
    """What has been made for each shape of arguments: the latest used, ``PLANS_KEPT`` at most."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, P] = OrderedDict()
        self._latest: tuple[Hashable, P | None] = (None, None)
        self._lock = forks.lock()  # callers in other threads may drop what is looked up here

    def latest(self, key: Hashable) -> P | None:
        """What was made for ``key``, if that is what was asked for last."""
        latest = self._latest  # one tuple: whatever other threads do, its parts belong together
        return latest[1] if latest[0] == key else None

    def find(self, key: Hashable, make: Callable[[], P]) -> P:
        """What was made for ``key``, or ``make()``."""
        latest = self.latest(key)
        if latest is not None:
            return latest
        with self._lock:
            found = self._made.get(key)
            if found is None:
                found = self._made[key] = make()
                while len(self._made) > PLANS_KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            self._latest = (key, found)
            return found

    def __iter__(self) -> Iterator[P]:
        """The plans, the latest used last."""
        return iter(list(self._made.values()))


@dataclass(frozen=True)
class Result:
    """A tensor that a run returns."""

    shape: Shape
    strides: Shape
    dense: bool
    """Whether the program writes with these strides; else the result is copied into them."""
    format: torch.memory_format

    @classmethod
    def of(cls, node: Node) -> Result:
        """The tensor of an output node."""
        format = format_of(node)
        natural = natural_strides(node.shape, format)
        strides = node.strides or natural
        pairs = zip(node.shape, strides, natural, strict=True)
        dense = all(n == 1 or a == b for n, a, b in pairs)
        return cls(node.shape, strides, dense, format)

    @functools.cached_property
    def written(self) -> tuple[Shape, Shape]:
        """Shape and strides of the memory that a program writes to."""
        return self.shape, (
            self.strides if self.dense else natural_strides(self.shape, self.format)
        )

    def restrided(self, written: Tensor) -> Tensor:
        """The result with the strides it has in PyTorch."""
        made = torch.empty_strided(self.shape, self.strides, dtype=torch.float32, device="cpu")
        return made.copy_(written)


@functools.lru_cache(1024)
def natural_strides(shape: Shape, format: torch.memory_format) -> Shape:
    """Of a dense tensor of this shape."""
    return tuple(torch.empty(shape, device="meta", memory_format=format).stride())


def format_of(node: Node) -> torch.memory_format:
    """How a node's tensor lies in memory."""
    return FORMATS[NHWC if len(node.shape) == 4 and node.channels_last else NCHW]


def ready(tensor: Tensor, format: torch.memory_format) -> Tensor:
    """``tensor``, or a copy that lies as a program reads it."""
    if tensor.is_contiguous(memory_format=format):
        return tensor
    return tensor.contiguous(memory_format=format)


@dataclass(frozen=True)
class Given:
    """A map that a run is given."""

    shape: Shape
    format: torch.memory_format
    checked: bool
    """Whether the caller has made sure that it is plain memory of this shape."""

    def fits(self, value: Any) -> bool:
        """Whether ``value`` is what was foreseen."""
        return (
            isinstance(value, Tensor)
            and plain(value)
            and value.dtype == torch.float32
            and value.shape == self.shape
        )


def given_of(network: Network, checked: Collection[Node]) -> list[Given]:
    """The maps that a run of ``network`` is given, in order."""
    return [
        Given(node.shape, format_of(node), node in checked)
        for node in network.nodes
        if isinstance(node.op, Input)
    ]


def returned(made: Sequence[Tensor], results: Sequence[Result]) -> Any:
    """What a run returns: its output, or a tuple of them."""
    made = [
        t if result.dense else result.restrided(t) for t, result in zip(made, results, strict=True)
    ]
    return made[0] if len(made) == 1 else tuple(made)


@dataclass(eq=False)
class Run:
    """Compiled nodes: called with its maps and its live parameters, returns its outputs."""

    network: Network
    stage: Native
    given: list[Given]
    tensors: list[Tensor]
    """Packed weights and vectors, whose memory it reads."""
    live: list[tuple[int, int]]
    """Which of them come with each call, and as which of its arguments."""
    fallback: Callable[..., Any]
    """The same in PyTorch."""

    def __post_init__(self) -> None:
        """What each call needs: addresses do not change."""
        self.fixed = [t.data_ptr() for t in self.tensors]
        self.unchecked = [(i, g) for i, g in enumerate(self.given) if not g.checked]
        inputs = [node for node in self.network.nodes if isinstance(node.op, Input)]
        pairs = enumerate(zip(inputs, self.given, strict=True))
        # The caller vouches for the strides of what is checked, too.
        self.laid = [(i, g.format) for i, (n, g) in pairs if not (g.checked and Result.of(n).dense)]
        self.reads = [inputs.index(node) for node in self.stage.inputs]
        self.results = [Result.of(node) for node in self.network.outputs]
        self.writes = [self.network.outputs.index(node) for node in self.stage.outputs]
        self.memory = [result.written for result in self.results]
        self.simple = len(self.results) == 1 and self.results[0].dense

    @classmethod
    def of(
        cls, network: Network, parameters: Parameters, choose: choices.Choice,
        live: Sequence[str], checked: Collection[Node], fallback: Callable[..., Any],
    ) -> Run:  # fmt: skip
        """Fuse, write the program, pack what is not packed yet.

        ``live``: the parameters that come with each call, in order; ``checked``: the inputs that
        the caller vouches for.
        """

        def fuses_pool(block: Block, pool: Pool) -> bool:
            return choices.fuses_pool(choose, block.conv, block.epilogue, pool)

        given = given_of(network, checked)
        fused = fuse(network, fuses_pool)
        inner = [node for node in fused.nodes if node.native]
        target = parameters.target
        cut = seam(inner, target, choose)
        stage = Builder(inner, fused.uses(), target, choose, cut).build()
        tensors = [parameters.packed_for(key) for key in stage.packed]
        tensors += [parameters.vector_for(key) for key in stage.vectors]
        own = [
            (len(stage.packed) + i, len(given) + live.index(str(vector.source)))
            for i, vector in enumerate(stage.vectors)
            if vector.part == ITSELF and str(vector.source) in live
        ]
        return cls(fused, stage, given, tensors, own, fallback)

    def __call__(self, *given: Tensor) -> Any:
        """Its output, or a tuple of them."""
        for i, expected in self.unchecked:
            if not expected.fits(given[i]):
                return self.fallback(*given)
        # Copies are kept in a list: their memory must outlive the call.
        kept = list(given)
        for i, format in self.laid:
            kept[i] = ready(kept[i], format)
        # A tensor made from another takes half the time of one that is told all about itself.
        made = [kept[0].new_empty_strided(*memory) for memory in self.memory]
        addresses = [kept[i].data_ptr() for i in self.reads]
        addresses += [made[i].data_ptr() for i in self.writes]
        fixed = self.fixed
        if self.live:
            fixed = fixed.copy()
            for i, argument in self.live:
                kept.append(given[argument].contiguous())
                fixed[i] = kept[-1].data_ptr()
        self.stage.program.run(*addresses, fixed=fixed)
        return made[0] if self.simple else returned(made, self.results)


def choice(target: Target, exact: bool, tune: bool) -> choices.Choice:
    """How the algorithm of a layer is chosen; see :func:`neocog.freeze`."""
    if exact:
        return choices.exact
    return Tuner(target) if tune else functools.partial(choices.algorithm, target)


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
