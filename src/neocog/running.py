"""Running a captured model: stages in order, on packed weights that are kept between calls."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import choices
from .capture import Captured
from .execution import FORMATS, prefers_channels_last
from .fusion import fuse
from .maps import NCHW, NHWC
from .network import Foreign, Input, Network, Node
from .parameters import Parameters
from .partition import Eager, Stage, stages
from .problem import Block, Pool
from .stages import ITSELF, Native


def layout_of(tensors: Sequence[Tensor]) -> str:
    """The layout of a call: channels_last if one of its maps is."""
    return NHWC if any(prefers_channels_last(t) for t in tensors) else NCHW


PLANS_KEPT = 16
"""Shapes of arguments whose programs one model keeps."""


class Plans:
    """What has been made for each shape of arguments: the latest used, ``PLANS_KEPT`` at most."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, Plan | None] = OrderedDict()
        self._lock = threading.RLock()  # callers in other threads may drop what is looked up here

    def find(self, key: Hashable, make: Callable[[], Plan | None]) -> Plan | None:
        """What was made for ``key``, or ``make()``, which may say that there is none."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
                while len(self._made) > PLANS_KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]

    def __iter__(self) -> Iterator[Plan]:
        """The plans, the latest used last."""
        return (plan for plan in list(self._made.values()) if plan is not None)


@dataclass
class Plan:
    """The stages of one captured call, bound to weights."""

    captured: Captured
    network: Network
    stages: list[Stage]
    inputs: list[Node]
    """The tensors from outside that its stages read, or that it returns."""
    layout: str
    parameters: Parameters
    fixed: list[list[int]]
    """Per stage: the addresses of packed weights and of vectors."""
    themselves: list[list[tuple[int, str]]]
    """Per stage: which of those addresses are parameters' own, and their names."""
    kept: list[Tensor]
    """The tensors behind the addresses."""

    @classmethod
    def of(
        cls, captured: Captured, layout: str, parameters: Parameters, exact: bool = False
    ) -> Plan:
        """Fuse, deal out to stages, compile and pack; ``exact``: direct convolution only."""

        def fuses_pool(block: Block, pool: Pool) -> bool:
            return choices.fuses_pool(parameters.target, block.conv, block.epilogue, pool, exact)

        network = fuse(captured.network, fuses_pool)
        made = stages(network, parameters.target, layout, exact)
        read = {node for stage in made for node in stage.reads} | set(network.outputs)
        inputs = [node for node in network.nodes if node in read and isinstance(node.op, Input)]
        plan = cls(captured, network, made, inputs, layout, parameters, [], [], [])
        for stage in made:
            packed = stage.packed if isinstance(stage, Native) else []
            vectors = stage.vectors if isinstance(stage, Native) else []
            tensors = [parameters.packed_for(key) for key in packed]
            tensors += [parameters.vector_for(key) for key in vectors]
            plan.kept += tensors
            plan.fixed.append([t.data_ptr() for t in tensors])
            plan.themselves.append(
                [
                    (len(packed) + i, str(vector.source))
                    for i, vector in enumerate(vectors)
                    if vector.part == ITSELF
                ]
            )
        return plan

    def run(self, args: Mapping[str, Tensor]) -> Any:
        """The model's result for arguments of the captured shapes, by name."""
        values: dict[Node, Any] = {}
        for node in self.inputs:
            assert isinstance(node.op, Input)
            found = args.get(node.op.name)
            values[node] = self.parameters.tensors[node.op.name] if found is None else found
        self.parameters.refresh(args)
        for number, stage in enumerate(self.stages):
            if isinstance(stage, Native):
                self._run_native(number, stage, values, args)
            else:
                _run_eager(stage, values)
        leaves = dict(zip(self.captured.network.outputs, self.network.outputs, strict=True))
        return self.captured.result({old: values[new] for old, new in leaves.items()})

    def _run_native(self, number: int, stage: Native, values: dict[Node, Any], args) -> None:
        # The tensors are kept in the list: their memory must outlive the call.
        inputs = [self._ready(values[node]) for node in stage.inputs]
        for node in stage.outputs:
            format = FORMATS[self.layout] if len(node.shape) == 4 else torch.contiguous_format
            values[node] = torch.empty(node.shape, memory_format=format)
        addresses = [t.data_ptr() for t in inputs]
        addresses += [values[node].data_ptr() for node in stage.outputs]
        fixed = self.fixed[number]
        live = [(i, args[name]) for i, name in self.themselves[number] if name in args]
        if live:
            own = [(i, t.detach().contiguous()) for i, t in live]
            fixed = fixed.copy()
            for i, t in own:
                fixed[i] = t.data_ptr()
        stage.program.run(*addresses, fixed=fixed)

    def _ready(self, tensor: Tensor) -> Tensor:
        format = FORMATS[self.layout] if tensor.dim() == 4 else torch.contiguous_format
        return tensor.detach().contiguous(memory_format=format)


def _run_eager(stage: Eager, values: dict[Node, Any]) -> None:
    for node in stage.nodes:
        assert isinstance(node.op, Foreign)
        values[node] = node.op.run(*(values[source] for source in node.inputs))
