"""What becomes of a model on the way to its programs, for tests."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from neocog import network as net
from neocog.facts import fact
from neocog.partition import PYTORCH, Partition, partition
from neocog.recording import Recorded, record
from neocog.rewriting import network_of


def recorded(model: nn.Module, *args: Any) -> Recorded:
    """The graph of ``model(*args)``; tensors the model makes itself are called by number."""
    known = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    numbers = iter(range(1000))
    return record(model, args, {}, known, lambda t: f"made {next(numbers)}")


def parted(model: nn.Module, *args: Any) -> Partition:
    """Its stages."""
    return partition(recorded(model, *args).gm.graph)


def networks(model: nn.Module, *args: Tensor) -> list[net.Network]:
    """The networks of its compiled stages, before fusion."""
    made = parted(model, *args)
    found = []
    for stage in made.stages:
        if stage.kind != PYTORCH:
            network, nodes = network_of(stage, made.kernels)
            read = {source for node in network.nodes for source in node.inputs}
            network.outputs = [n for n in nodes.values() if n.native and n not in read]
            network.outputs += _read_elsewhere(made, stage.nodes, nodes, network.outputs)
            found.append(network)
    return found


def _read_elsewhere(
    made: Partition, own: list[fx.Node], nodes: dict[fx.Node, net.Node], known: list[net.Node]
) -> list[net.Node]:
    users = {n: [u for u in n.users if u not in own] for n in own}
    found = [nodes[n] for n in own if users[n] and nodes[n].native and nodes[n] not in known]
    return list(dict.fromkeys(found))


def left(model: nn.Module, *args: Any) -> dict[str, str]:
    """What PyTorch runs, and why, by the name of the function."""
    made = parted(model, *args)
    return {
        fact(n).name: made.reasons.get(n) or fact(n).barrier or fact(n).reason
        for stage in made.stages
        if stage.kind == PYTORCH
        for n in stage.nodes
        if fact(n).operators or fact(n).barrier
    }
