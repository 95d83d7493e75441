"""Which nodes of an observed graph run together: compiled runs, and PyTorch's nodes in between.

A run may hold only what is known to be pure. What has effects (writes to memory that another value
shares, random numbers, switches of modes, hooks, anything unknown) stays PyTorch's and keeps its
place: edges say what has to be done before it and after it. Nodes are then dealt out to stages, all
that can be computed in one kind of code first, then all of the next kind that has become possible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from .facts import INFERENCE, TRAINING, Fact, Kernel, Value, fact
from .network import Linear

PYTORCH = "pytorch"
"""The kind of nodes that PyTorch runs."""

Kind = tuple[str, int]
"""Kind of code, and the batch size of its maps: programs have one for all their maps."""

FOREIGN: Kind = (PYTORCH, 0)

Kernels = dict[fx.Node, tuple[str, Kernel]]

LAST = 1 << 60
"""The place of what is read after the graph has run."""


@dataclass
class Stage:
    """Nodes that run together, in order."""

    kind: str
    nodes: list[fx.Node]


@dataclass
class Partition:
    """The stages of a graph, in order, and what was found on the way."""

    stages: list[Stage]
    kernels: Kernels
    """What the compiled nodes are, and in which kind of code."""
    linears: dict[fx.Node, Kernel]
    """Fully connected layers with gradients, whose products PyTorch computes."""
    writes: dict[fx.Node, frozenset[int]]
    """The memory that nodes write to."""
    reasons: dict[fx.Node, str]
    """Why PyTorch runs a node that a kernel could compute by itself."""
    writes_outside: bool
    """Whether it writes to memory that came from outside."""


def partition(graph: fx.Graph) -> Partition:
    """The stages of an observed graph (see :mod:`neocog.facts`)."""
    return _Partitioner(graph).all()


@dataclass
class _Edges:
    """What a node has to wait for."""

    together: set[fx.Node] = field(default_factory=set)
    """Nodes that come before it, maybe in the same stage."""
    before: set[fx.Node] = field(default_factory=set)
    """Nodes whose stage comes before its own, unless PyTorch runs both."""


class _Partitioner:
    def __init__(self, graph: fx.Graph):
        inner = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        self.nodes = [n for n in inner if not fact(n).is_constant]
        self.outside = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
        self.output = next(n for n in graph.nodes if n.op == "output")
        self.place = {n: i for i, n in enumerate(graph.nodes)} | {self.output: LAST}
        self.last_use = {n: max((self.place[u] for u in n.users), default=-1) for n in graph.nodes}
        self.sharing: dict[int, list[tuple[fx.Node, Value]]] = {}
        for node in (*self.outside, *self.nodes):
            for value in fact(node).values:
                self.sharing.setdefault(value.storage, []).append((node, value))
        self.reasons: dict[fx.Node, str] = {}
        self.kernels: Kernels = {}
        self.linears: dict[fx.Node, Kernel] = {}
        self.writes: dict[fx.Node, frozenset[int]] = {}

    def all(self) -> Partition:
        """Choose kernels, find edges, deal."""
        self._choose()
        written = frozenset().union(*self.writes.values())
        self._keep_views(written)
        self._set_linears_aside()
        edges = self._edges(written)
        living = self._living()
        stages = self._deal([n for n in self.nodes if n in living], edges)
        outside = {v.storage for n in self.outside for v in fact(n).values}
        return Partition(
            stages, self.kernels, self.linears, self.writes, self.reasons, bool(outside & written)
        )  # fmt: skip

    # ---------------------------------------------------------------- kernels

    def _choose(self) -> None:
        """The kernel of each node, if it may be used; all else writes what it writes."""
        learned = any(
            set(f.kernels) == {TRAINING} and not f.graded for f in map(fact, self.nodes)
        )  # fmt: skip
        for node in self.nodes:
            made = fact(node)
            order = (TRAINING, INFERENCE) if learned else (INFERENCE, TRAINING)
            kind = next((k for k in order if k in made.kernels and _fits(k, made)), None)
            kernel = made.kernels[kind] if kind and not made.barrier else None
            in_place = kernel is not None and kernel.call is not None and kernel.call.in_place
            if in_place and not self._may_be_rebound(node):
                self.reasons[node] = f"{made.name} writes to memory that another value shares"
                kernel = None
            if kernel is not None and kind is not None:
                self.kernels[node] = (kind, kernel)
            writes = made.writes
            if kernel is not None and in_place:
                writes -= {made.value.storage}
            if writes:
                self.writes[node] = writes

    def _may_be_rebound(self, node: fx.Node) -> bool:
        """Whether nobody can tell a write from a new value that takes the tensor's place."""
        value = fact(node).value
        for other, shared in self.sharing[value.storage]:
            if other in self.outside or fact(other).barrier:
                return False
            own = shared.tensor == value.tensor and len(fact(other).values) == 1
            if not own and self.last_use[other] > self.place[node]:
                return False
        return True

    def _keep_views(self, written: frozenset[int]) -> None:
        """What is a view in PyTorch stays one where somebody could tell it from a copy."""
        for node, (kind, kernel) in list(self.kernels.items()):
            read = {v.storage for n in kernel.parameters.values() for v in fact(n).values}
            view = kernel.call is None or kernel.call.view
            storage = fact(node).value.storage
            if view and (storage in written or self._leaves(storage)):
                self.reasons[node] = f"{fact(node).name}: a view of memory that others see"
                del self.kernels[node]
            elif read & written and (kind == INFERENCE or _is_linear(kernel)):
                # Their weights are read, or packed, before the graph runs.
                self.reasons[node] = f"{fact(node).name}: a weight that the model writes to"
                del self.kernels[node]

    def _set_linears_aside(self) -> None:
        for node, (kind, kernel) in list(self.kernels.items()):
            if kind == TRAINING and _is_linear(kernel):
                self.linears[node] = kernel
                del self.kernels[node]

    def _leaves(self, storage: int) -> bool:
        """Whether a caller could hold two tensors of this memory afterwards."""
        sharing = self.sharing[storage]
        outside = any(n in self.outside or fact(n).barrier for n, _ in sharing)
        returned = {value.tensor for n, value in sharing if self.last_use[n] == LAST}
        return len(returned) + outside > 1

    def _kind(self, node: fx.Node) -> Kind:
        if node not in self.kernels:
            return FOREIGN
        shape = fact(node).value.shape
        return self.kernels[node][0], shape[0] if shape else 1

    # ---------------------------------------------------------------- order

    def _edges(self, written: frozenset[int]) -> dict[fx.Node, _Edges]:
        found: dict[fx.Node, _Edges] = {}
        writer: dict[int, fx.Node] = {}
        readers: dict[int, list[fx.Node]] = {}
        since: list[fx.Node] = []
        barrier: fx.Node | None = None
        random: fx.Node | None = None
        seen = self._seen()
        for node in self.nodes:
            made, own = fact(node), _Edges()
            found[node] = own
            for source in node.all_input_nodes:
                now = made.now.get(source, source)
                (own.before if now in seen else own.together).add(now)
            touched = {v.storage for n in node.all_input_nodes for v in fact(n).values} & written
            writes = self.writes.get(node, frozenset())
            for storage in touched | writes:
                if storage in writer:
                    own.before.add(writer[storage])
            for storage in writes:
                own.before.update(readers.pop(storage, ()))
                writer[storage] = node
            for storage in touched:
                readers.setdefault(storage, []).append(node)
            if made.random:
                own.before |= {random} if random is not None else set()
                random = node
            if barrier is not None:
                own.before.add(barrier)
            if made.barrier or self._writes_to_unknown(node):
                own.before.update(since)
                since, barrier = [], node
            since.append(node)
            own.together -= own.before
        return found

    def _writes_to_unknown(self, node: fx.Node) -> bool:
        """Whether a node writes to memory that may be shared in a way that nobody knows."""
        return any(
            fact(n).barrier for s in self.writes.get(node, ()) for n, _ in self.sharing[s]
        )  # fmt: skip

    def _seen(self) -> set[fx.Node]:
        """Values with gradients that somebody may hang a hook on: a barrier reads them, or they are
        returned. All of such a gradient has to pass through the tensor itself."""
        seen: set[fx.Node] = set()
        for node in (*(n for n in self.nodes if fact(n).barrier), self.output):
            made = fact(node)
            seen |= {made.now.get(source, source) for source in node.all_input_nodes}
        return {n for n in seen if fact(n).graded}

    def _living(self) -> set[fx.Node]:
        """What is returned, or has effects, and all that these need."""
        waiting = [n for n in self.nodes if n in self.writes or self._acts(fact(n))]
        waiting.append(self.output)
        living: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if node not in living:
                living.add(node)
                now = fact(node).now
                waiting += [now.get(s, s) for s in node.all_input_nodes]
                # PyTorch's own in-place nodes give the tensor they were given.
                waiting += list(node.all_input_nodes)
        return living

    @staticmethod
    def _acts(made: Fact) -> bool:
        return bool(made.barrier) or made.random

    def _deal(self, left: list[fx.Node], edges: dict[fx.Node, _Edges]) -> list[Stage]:
        living = set(left)
        done: set[fx.Node] = set()
        kinds = {node: self._kind(node) for node in left}
        order = [*dict.fromkeys(k for k in kinds.values() if k != FOREIGN), FOREIGN]
        stages: list[Stage] = []
        while left:
            for kind in order:
                chosen: dict[fx.Node, None] = {}
                for node in left:
                    if kinds[node] == kind and self._ready(node, edges[node], living, done, chosen):
                        chosen[node] = None
                done |= set(chosen)
                left = [n for n in left if n not in chosen]
                if chosen:
                    stages.append(Stage(kind[0], list(chosen)))
        return stages

    def _ready(
        self, node: fx.Node, edges: _Edges, living: set[fx.Node], done: set[fx.Node],
        chosen: Iterable[fx.Node],
    ) -> bool:  # fmt: skip
        together = edges.together if node in self.kernels else edges.together | edges.before
        before = edges.before if node in self.kernels else set()
        return all(s in done or s not in living for s in before) and all(
            s in done or s in chosen or s not in living for s in together
        )


def _is_linear(kernel: Kernel) -> bool:
    return kernel.call is not None and isinstance(kernel.call.op, Linear)


def _fits(kind: str, made: Fact) -> bool:
    """Whether parameters come as that kind of code takes them: with every call, in training."""
    parameters = made.kernels[kind].parameters.values()
    return kind == INFERENCE or all(node.op == "placeholder" for node in parameters)
