"""Running a captured model: stages in order, on packed weights that are kept between calls."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from . import choices
from .capture import Captured
from .cpu import forks
from .execution import FORMATS, strides_prefer_channels_last
from .fusion import fuse
from .maps import NCHW, NHWC
from .network import Foreign, Input, Network, Node, Shape
from .parameters import Parameters
from .partition import Eager, stages
from .problem import Block, Pool
from .stages import ITSELF, Native
from .target import Target
from .tuning import Tuner

_prefers_channels_last = functools.lru_cache(1024)(strides_prefer_channels_last)


def layout_of(tensors: Sequence[Tensor]) -> str:
    """The layout of a call: channels_last if one of its maps is."""
    return NHWC if any(_prefers_channels_last(t.shape, t.stride()) for t in tensors) else NCHW


PLANS_KEPT = 16
"""Shapes of arguments whose programs one model keeps."""


P = TypeVar("P")


class Plans(Generic[P]):
    """What has been made for each shape of arguments: the latest used, ``PLANS_KEPT`` at most."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, P | None] = OrderedDict()
        self._latest: tuple[Hashable, P | None] = (None, None)
        self._lock = forks.lock()  # callers in other threads may drop what is looked up here

    def find(self, key: Hashable, make: Callable[[], P | None]) -> P | None:
        """What was made for ``key``, or ``make()``, which may say that there is none."""
        latest = self._latest  # one tuple: whatever other threads do, its parts belong together
        if latest[0] == key:
            return latest[1]
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
                while len(self._made) > PLANS_KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            self._latest = (key, self._made[key])
            return self._latest[1]

    def __iter__(self) -> Iterator[P]:
        """The plans, the latest used last."""
        return (plan for plan in list(self._made.values()) if plan is not None)


@dataclass
class Bound:
    """A native stage on its weights."""

    stage: Native
    tensors: list[Tensor]
    """Packed weights and vectors, whose memory it reads."""
    fixed: list[int]
    """Their addresses."""
    arguments: list[tuple[int, int]]
    """Which of them are arguments of the call, and which these are."""
    results: list[tuple[Node, Shape, torch.memory_format | None]]
    """Its outputs, as tensors to be made; None: contiguous."""

    @classmethod
    def of(
        cls, stage: Native, layout: str, parameters: Parameters, arguments: Mapping[str, int]
    ) -> Bound:
        """Pack what is not packed yet; ``arguments``: the parameters that come with each call."""
        tensors = [parameters.packed_for(key) for key in stage.packed]
        tensors += [parameters.vector_for(key) for key in stage.vectors]
        own = [
            (len(stage.packed) + i, arguments[str(vector.source)])
            for i, vector in enumerate(stage.vectors)
            if vector.part == ITSELF and str(vector.source) in arguments
        ]
        results = [
            (node, node.shape, FORMATS[NHWC] if layout == NHWC and len(node.shape) == 4 else None)
            for node in stage.outputs
        ]
        return cls(stage, tensors, [t.data_ptr() for t in tensors], own, results)

    def run(self, values: dict[Node, Any], args: Sequence[Any], layout: str) -> None:
        """Compute its outputs from its inputs, both in ``values``."""
        # Copies are kept in a list: their memory must outlive the call.
        kept = [_ready(values[node], layout) for node in self.stage.inputs]
        addresses = [t.data_ptr() for t in kept]
        for node, shape, format in self.results:
            if format is None:
                made = kept[0].new_empty(shape)
            else:
                made = torch.empty(
                    shape, dtype=torch.float32, device="cpu", memory_format=format
                )  # fmt: skip
            values[node] = made
            addresses.append(made.data_ptr())
        fixed = self.fixed
        if self.arguments:
            fixed = fixed.copy()
            for i, argument in self.arguments:
                kept.append(args[argument].detach().contiguous())
                fixed[i] = kept[-1].data_ptr()
        self.stage.program.run(*addresses, fixed=fixed)


@dataclass
class Plan:
    """The stages of one captured call, bound to weights."""

    captured: Captured
    network: Network
    stages: list[Bound | Eager]
    inputs: list[tuple[Node, Input]]
    """The tensors from outside that its stages read, or that it returns."""
    leaves: list[Node | Any]
    """What it returns: nodes, or values that are no tensors."""
    layout: str
    parameters: Parameters

    @classmethod
    def of(
        cls,
        captured: Captured,
        layout: str,
        parameters: Parameters,
        exact: bool = False,
        tune: bool = False,
    ) -> Plan:
        """Fuse, deal out to stages, compile and pack; for ``exact``, ``tune`` see ``freeze``."""
        choose = _choice(parameters.target, exact, tune)

        def fuses_pool(block: Block, pool: Pool) -> bool:
            return choices.fuses_pool(choose, block.conv, block.epilogue, pool)

        network = fuse(captured.network, fuses_pool)
        made = stages(network, parameters.target, layout, choose)
        read = {node for stage in made for node in stage.reads} | set(network.outputs)
        outside = [(node, node.op) for node in network.nodes if isinstance(node.op, Input)]
        inputs = [(node, op) for node, op in outside if node in read]
        arguments = {op.name: op.argument for _, op in outside if op.argument is not None}
        bound = [
            Bound.of(s, layout, parameters, arguments) if isinstance(s, Native) else s for s in made
        ]
        fused = dict(zip(captured.network.outputs, network.outputs, strict=True))
        leaves = [fused[v] if isinstance(v, Node) else v for v in captured.leaves]
        return cls(captured, network, bound, inputs, leaves, layout, parameters)

    @property
    def natives(self) -> list[Native]:
        """The stages that are programs."""
        return [stage.stage for stage in self.stages if isinstance(stage, Bound)]

    def run(self, args: Sequence[Any]) -> Any:
        """The model's result for arguments of the captured shapes."""
        values: dict[Any, Any] = {}
        for node, op in self.inputs:
            if op.argument is None:
                values[node] = self.parameters.tensors[op.name]
            else:
                values[node] = args[op.argument]
        for stage in self.stages:
            if isinstance(stage, Bound):
                stage.run(values, args, self.layout)
            else:
                _run_eager(stage, values)
        return self.captured.result(
            [values[v] if isinstance(v, Node) else v for v in self.leaves]
        )  # fmt: skip


def _choice(target: Target, exact: bool, tune: bool) -> choices.Choice:
    if exact:
        return choices.exact
    return Tuner(target) if tune else functools.partial(choices.algorithm, target)


def _ready(tensor: Tensor, layout: str) -> Tensor:
    format = FORMATS[layout] if tensor.dim() == 4 else torch.contiguous_format
    if tensor.is_contiguous(memory_format=format):
        return tensor
    return tensor.detach().contiguous(memory_format=format)


def _run_eager(stage: Eager, values: dict[Node, Any]) -> None:
    with torch.no_grad():
        for node in stage.nodes:
            assert isinstance(node.op, Foreign)
            values[node] = node.op.run(*(values[source] for source in node.inputs))
