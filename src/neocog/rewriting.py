"""A graph of PyTorch's, rewritten: what has kernels becomes compiled runs, the rest stays.

Every node that PyTorch runs is copied as it stands; each stage of compiled nodes becomes one call.
What comes out is a ``torch.fx.GraphModule`` again, which Python runs line by line: there is no
interpreter of ours, and what was not understood cannot be changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint

from . import choices, fully_connected, substitutes
from . import network as net
from .execution import strides_prefer_channels_last
from .facts import INFERENCE, fact
from .learned import Learned
from .parameters import Parameters
from .partition import PYTORCH, Kernels, Stage, partition
from .running import Run
from .stages import Native


@dataclass
class Left:
    """A call that PyTorch runs, and why."""

    name: str
    reason: str
    multiply_adds: int


@dataclass
class Rewritten:
    """A graph with compiled runs in it."""

    run: Callable[..., Any]
    """Takes the graph's arguments, returns its result."""
    runs: list[Run | Learned]
    left: list[Left]
    """What PyTorch runs."""
    writes_outside: bool = False
    """Whether it writes to its arguments: it is right only for arguments that share as these do."""
    linears: list[net.Node] = field(default_factory=list)
    """Fully connected layers while training, whose products are PyTorch's."""

    @property
    def natives(self) -> list[Native]:
        """The programs of its runs at inference."""
        return [run.stage for run in self.runs if isinstance(run, Run)]

    @property
    def nodes(self) -> list[net.Node]:
        """The compiled nodes, after fusion."""
        return [n for run in self.runs for n in run.network.nodes if n.native] + self.linears

    @property
    def infers(self) -> bool:
        """Whether some of its runs read packed weights."""
        return any(isinstance(run, Run) for run in self.runs)


@dataclass
class Setting:
    """What runs are built with."""

    parameters: Parameters
    choose: choices.Choice
    exact: bool
    tensors: Mapping[str, Tensor]
    """The parameters of this call, by name."""
    inside: Callable[[fx.GraphModule], Callable[..., Any]] = lambda gm: gm
    """Compiles a graph that an operator calls."""


def rewrite(gm: fx.GraphModule, setting: Setting) -> Rewritten:
    """The graph of ``gm``, whose nodes have facts, with compiled runs in it."""
    return _Writer(gm, setting).all()


class _Writer:
    def __init__(self, gm: fx.GraphModule, setting: Setting):
        self.gm, self.setting = gm, setting
        self.old = gm.graph
        self.parted = partition(gm.graph)
        self.new = fx.Graph()
        self.made: dict[fx.Node, Any] = {}
        self.result = Rewritten(lambda *_: None, [], [], self.parted.writes_outside)
        self.late: dict[fx.Node, fx.Node] = {}

    def all(self) -> Rewritten:
        """Every stage in turn."""
        for node in self.old.nodes:
            if node.op == "placeholder":
                self.made[node] = self.new.placeholder(str(node.target))
            elif fact(node).is_constant:
                self.made[node] = fact(node).constant
        self._write_late_weights()
        for stage in self.parted.stages:
            if stage.kind == PYTORCH:
                for node in stage.nodes:
                    self._copy(node)
            else:
                self._compile(stage)
        output = next(node for node in self.old.nodes if node.op == "output")
        (result,) = fx.map_arg(output.args, lambda n: self._now(output, n))
        self.new.output(result)
        self.result.run = self._alone() or fx.GraphModule(self.gm, self.new).forward
        return self.result

    def _alone(self) -> Run | Learned | None:
        """The run that is all there is to the graph: called by itself, it is quicker."""
        *given, output = self.new.nodes
        if not given:
            return None
        call = given.pop()
        alone = output.args == (call,) and all(n.op == "placeholder" for n in given)
        whole = isinstance(call.target, Run | Learned) and call.args == tuple(given)
        return call.target if alone and whole else None

    # ---------------------------------------------------------------- values

    def _value(self, node: fx.Node) -> Any:
        """What stands for a node's value in the new graph."""
        if node not in self.made and node.op == "get_attr":
            self.made[node] = self.new.get_attr(str(node.target))
        return self.made[node]

    def _now(self, reader: fx.Node, node: fx.Node) -> Any:
        """The same, as it is when ``reader`` runs."""
        return self._value(fact(reader).now.get(node, node))

    # ---------------------------------------------------------------- PyTorch's

    def _copy(self, node: fx.Node) -> None:
        if node in self.late:
            self._write_linear(node)
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._now(node, n))
        body = self._checkpointed(node)
        if body is not None:
            call = substitutes.Checkpoint(body, self.setting.inside(body))
            self.made[node] = self.new.call_function(call, args[1:])
            return
        target = node.target
        if target is F.instance_norm and fact(node).graded:
            target = substitutes.instance_norm
        self.made[node] = self.new.create_node(node.op, target, args, kwargs, node.name)
        made = fact(node)
        if made.operators or made.barrier:
            reason = self.parted.reasons.get(node) or made.barrier or made.reason
            self.result.left.append(Left(made.name, reason, made.multiply_adds))

    def _checkpointed(self, node: fx.Node) -> fx.GraphModule | None:
        """The graph that a node runs under torch.utils.checkpoint, of the plain kind."""
        if node.target is not tag_activation_checkpoint or not isinstance(node.args[0], fx.Node):
            return None
        body = getattr(self.gm, str(node.args[0].target))
        return None if "_checkpoint_context_fn" in body.meta else body

    def _write_late_weights(self) -> None:
        """Fully connected layers while training: see :mod:`neocog.fully_connected`."""
        linears = [n for s in self.parted.stages for n in s.nodes if n in self.parted.linears]
        if linears:
            weights = [self._value(self._weight(node)) for node in linears]
            made = self.new.call_function(fully_connected.late, (weights,))
            self.late = {
                node: self.new.call_function(_item, (made, i)) for i, node in enumerate(linears)
            }

    def _weight(self, node: fx.Node) -> fx.Node:
        kernel = self.parted.linears[node]
        assert kernel.call is not None and isinstance(kernel.call.op, net.Linear)
        return kernel.parameters[kernel.call.op.weight]

    def _write_linear(self, node: fx.Node) -> None:
        kernel = self.parted.linears[node]
        assert kernel.call is not None and isinstance(kernel.call.op, net.Linear)
        (x,), op = kernel.inputs, kernel.call.op
        bias = None if op.bias is None else self._value(kernel.parameters[op.bias])
        args = (self._value(x), self.late[node], bias)
        self.made[node] = self.new.call_function(fully_connected.linear, args)
        source = net.Node(net.Input(x.name), (), fact(x).value.shape)
        self.result.linears.append(net.Node(op, (source,), kernel.call.shape, node.name))

    # ---------------------------------------------------------------- compiled

    def _compile(self, stage: Stage) -> None:
        network, made = network_of(stage, self.parted.kernels)
        needed = [n for n in stage.nodes if n in self._needed(stage)]
        network.outputs = list(dict.fromkeys(made[n] for n in needed if made[n].native))
        sources: dict[net.Node, fx.Node] = {}
        for node, part in made.items():
            if not part.native:
                sources.setdefault(part, node)
        if network.outputs:
            results = self._call(stage, network, made, sources, needed)
            for node in needed:
                if made[node].native:
                    self.made[node] = results[made[node]]
        else:  # nobody reads it: what it writes is all it is for
            for node in stage.nodes:
                self._copy(node)
        for node in needed:
            if not made[node].native:  # it only passes a value on
                self.made[node] = self._value(sources[made[node]])

    def _call(
        self, stage: Stage, network: net.Network, made: Mapping[fx.Node, net.Node],
        sources: Mapping[net.Node, fx.Node], needed: Sequence[fx.Node],
    ) -> dict[net.Node, fx.Node]:  # fmt: skip
        """A compiled run, called; its outputs in the new graph."""
        maps = [sources[part] for part in network.nodes if not part.native]
        parameters: dict[str, fx.Node] = {}
        for node in stage.nodes:
            parameters |= self.parted.kernels[node][1].parameters
        live = {name: n for name, n in parameters.items() if n.op == "placeholder"}
        checked = {made[n] for n in maps if n.op == "placeholder"}
        leaving = {made[n]: n for n in needed}
        fallback = self._fallback(stage, [*maps, *live.values()], leaving, network.outputs)
        run: Run | Learned
        setting = self.setting
        if stage.kind == INFERENCE:
            choose, names = setting.choose, list(live)
            run = Run.of(network, setting.parameters, choose, names, checked, fallback)
        else:
            tensors = {name: setting.tensors[name] for name in live}
            graded = [fact(leaving[n]).value.requires_grad for n in network.outputs]
            target, exact = setting.parameters.target, setting.exact
            run = Learned.of(network, tensors, target, exact, graded, checked, fallback)
        # A graph calls functions by their names.
        vars(run).update(__name__=f"run{len(self.result.runs)}", __module__=__name__)
        self.result.runs.append(run)
        call = self.new.call_function(run, tuple(self._value(n) for n in (*maps, *live.values())))
        if len(network.outputs) == 1:
            return {network.outputs[0]: call}
        return {
            part: self.new.call_function(_item, (call, i)) for i, part in enumerate(network.outputs)
        }

    def _needed(self, stage: Stage) -> set[fx.Node]:
        """The nodes of a stage whose values are read outside of it."""
        own, found = set(stage.nodes), set()
        output = next(node for node in self.old.nodes if node.op == "output")
        for other in self.parted.stages:
            for node in other.nodes if other is not stage else ():
                found |= self._reads(node)
        return (found | self._reads(output)) & own

    def _reads(self, node: fx.Node) -> set[fx.Node]:
        if node in self.parted.kernels:
            return set(self.parted.kernels[node][1].inputs)
        if node in self.parted.linears:
            return set(self.parted.linears[node].inputs)
        now = fact(node).now
        return {now.get(source, source) for source in node.all_input_nodes}

    def _fallback(
        self, stage: Stage, inputs: Sequence[fx.Node], leaving: Mapping[net.Node, fx.Node],
        outputs: Sequence[net.Node],
    ) -> Callable[..., Any]:  # fmt: skip
        """The nodes of a stage in PyTorch, made when it is needed: what was foreseen was wrong."""
        gm = self.gm

        @functools.cache
        def module() -> fx.GraphModule:
            graph = fx.Graph()
            env: dict[fx.Node, Any] = {n: graph.placeholder(n.name) for n in dict.fromkeys(inputs)}

            def value(reader: fx.Node, node: fx.Node) -> Any:
                node = fact(reader).now.get(node, node)
                if node not in env:
                    env[node] = (
                        fact(node).constant
                        if fact(node).is_constant
                        else graph.get_attr(str(node.target))
                    )
                return env[node]

            for node in stage.nodes:
                find = functools.partial(value, node)
                args, kwargs = fx.map_arg((node.args, node.kwargs), find)
                env[node] = graph.create_node(node.op, node.target, args, kwargs)
            results = [env[leaving[part]] for part in outputs]
            graph.output(results[0] if len(results) == 1 else tuple(results))
            return fx.GraphModule(gm, graph)

        return lambda *given: module()(*given)


def network_of(stage: Stage, kernels: Kernels) -> tuple[net.Network, dict[fx.Node, net.Node]]:
    """The compiled nodes of a stage as a network, and where each node's value is in it."""
    network = net.Network()
    made: dict[fx.Node, net.Node] = {}

    def value(node: fx.Node) -> net.Node:
        if node not in made:
            made[node] = network.add(net.Input(node.name), (), fact(node).value.shape, node.name)
            _lay(made[node], node)
        return made[node]

    for node in stage.nodes:
        call = kernels[node][1].call
        sources = tuple(value(n) for n in kernels[node][1].inputs)
        if call is None:
            made[node] = sources[0]
            continue
        made[node] = network.add(call.op, sources, call.shape, call.name)
        _lay(made[node], node)
    return network, made


def _lay(made: net.Node, node: fx.Node) -> None:
    value = fact(node).value
    made.strides = value.strides
    made.channels_last = strides_prefer_channels_last(value.shape, value.strides)


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]
