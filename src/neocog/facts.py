"""What is known of each node of a PyTorch graph: its values, its effects, and its kernel, if any.

Every node runs once on fake tensors (shape, strides, data type and device, but no values) under a
``TorchDispatchMode`` that sees the operators behind it. What they write to, whether they draw
random numbers and whether anything about them is unknown becomes the node's :class:`Fact`; so does
the operation that the tables of calls make of it. :mod:`neocog.partition` decides what to do.

https://docs.pytorch.org/docs/stable/fx.html,
https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .aten_calls import spelled_in_aten
from .effects import NAMESPACES, NO_OPERATOR, SPECIAL, is_known, is_random, storage_of, written
from .errors import InvalidProblem, Unsupported
from .layer_calls import CALLS, Call
from .training_calls import TRAINING_CALLS

INFERENCE, TRAINING = "inference", "training"
"""The kinds of compiled code: with a backward pass or without."""

TABLES: dict[str, Mapping[Any, Callable[..., Call | Tensor]]] = {
    INFERENCE: {**CALLS, **spelled_in_aten(CALLS)},
    TRAINING: {**TRAINING_CALLS, **spelled_in_aten(TRAINING_CALLS)},
}
"""PyTorch's function -> its operation, by the kind of code it is compiled to."""


@dataclass(frozen=True)
class Value:
    """One tensor of a node's result, at the time the node has run."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    tensor: int
    """Two values with the same number are one tensor object."""
    storage: int
    """Two values with the same number share memory."""

    @classmethod
    def of(cls, t: Tensor) -> Value:
        """The facts of a fake or a real tensor."""
        strided = t.layout == torch.strided
        return cls(
            tuple(t.shape),
            tuple(t.stride()) if strided else (),
            t.dtype,
            t.requires_grad,
            id(t),
            t.untyped_storage()._cdata if strided else 0,
        )


@dataclass(frozen=True)
class Kernel:
    """What a node would be in a compiled program."""

    call: Call | None
    """The operation; None if the result is the first input itself."""
    inputs: tuple[fx.Node, ...]
    """The nodes of the maps it reads."""
    parameters: dict[str, fx.Node]
    """The placeholders and constants it reads as parameters, by name."""


@dataclass
class Fact:
    """What is known of one node."""

    values: tuple[Value, ...] = ()
    now: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Node it names as an input -> the node with that tensor's value at this time."""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    """By the kind of code."""
    reason: str = ""
    """Why there is no kernel, or not of every kind."""
    name: str = ""
    """Of the function, for reports."""
    writes: frozenset[int] = frozenset()
    """The storages it writes to, of those that were there before."""
    random: bool = False
    barrier: str = ""
    """Why nothing may move across this node; empty if it is known to be harmless."""
    graded: bool = False
    """Whether gradients come back through it."""
    multiply_adds: int = 0
    operators: int = 0
    """How many of ATen's operators it ran."""
    is_constant: bool = False
    """Whether its result is no tensor, and follows from sizes."""
    constant: Any = None

    @property
    def value(self) -> Value:
        """The only tensor of its result."""
        (value,) = self.values
        return value


def fact(node: fx.Node) -> Fact:
    """The fact of an observed node."""
    return node.meta["neocog"]


_OPERATORS = {
    operator.add: Tensor.__add__,
    operator.mul: Tensor.__mul__,
    operator.sub: Tensor.__sub__,
    operator.truediv: Tensor.__truediv__,
    operator.iadd: Tensor.__iadd__,
    operator.imul: Tensor.__imul__,
    operator.isub: Tensor.__isub__,
    operator.itruediv: Tensor.__itruediv__,
}


def grads_are_kept() -> bool:
    """Whether autograd records what is done; in inference mode it never does."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class Observer(TorchDispatchMode):
    """Runs the nodes of one graph in order, and writes down their facts."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: dict[int, fx.Node] = {}
        """Tensor object -> the node that has its value now."""
        self.kept: list[Tensor] = []
        """Numbers of objects stay unique while these live."""
        self.names: dict[fx.Node, str] = {}
        """What placeholders and constants are called as parameters; else by their nodes' names."""
        self._running: Fact | None = None
        self._before: frozenset[int] = frozenset()

    # ---------------------------------------------------------------- values

    def hold(self, node: fx.Node, tensor: Tensor) -> None:
        """Let ``node`` stand for the value of ``tensor`` from now on."""
        self.holders[id(tensor)] = node
        self.kept.append(tensor)

    def outside(self, node: fx.Node, tensor: Tensor) -> None:
        """A placeholder, or a constant of the graph."""
        node.meta["neocog"] = Fact(values=(Value.of(tensor),))
        self.hold(node, tensor)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that has the value of ``tensor``."""
        found = self.holders.get(id(tensor))
        if found is None:
            raise Unsupported("a tensor that comes from nowhere")
        return found

    # ---------------------------------------------------------------- running a node

    def run(
        self, node: fx.Node, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """``function(*args, **kwargs)``, observed for ``node``; the mode has to be active."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = Fact(name=_name(function))
        graded = grads_are_kept() and any(t.requires_grad for t in tensors)
        self._find_kernels(made, function, args, kwargs, graded)
        self._find_now(node, made)
        shapes = [(t.shape, t.stride()) for t in tensors if t.layout == torch.strided]
        self._running = made
        self._before = frozenset(storage_of(t) for t in tensors)
        try:
            result = function(*args, **kwargs)
            if made.name in _NORMS:
                result = _laid_out(tensors[0], result)
            result = self.given_back(result)
        finally:
            self._running = None
        if shapes != [(t.shape, t.stride()) for t in tensors if t.layout == torch.strided]:
            raise Unsupported(f"{made.name} changes the shape of a tensor in place")
        self.finish(node, made, function, result)
        made.graded = graded or any(v.requires_grad for v in made.values)
        return result

    def close(self, output: fx.Node) -> None:
        """The values that the output node names, as they are in the end."""
        made = output.meta["neocog"] = Fact()
        self._find_now(output, made)

    def put_together(self, node: fx.Node) -> None:
        """A node that puts values of Python's together, and computes nothing."""
        made = node.meta["neocog"] = Fact(name="structure")
        self._find_now(node, made)

    def _find_now(self, node: fx.Node, made: Fact) -> None:
        for source in node.all_input_nodes:
            values = fact(source).values
            if len(values) == 1:
                made.now[source] = self.holders.get(values[0].tensor, source)

    def finish(self, node: fx.Node, made: Fact, function: Any, result: Any) -> None:
        """Write down what came out."""
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        made.values = tuple(map(Value.of, found))
        known = made.operators or (made.name in NO_OPERATOR and not made.writes)
        if not is_known(function) or made.name in SPECIAL or not known:
            made.barrier = made.barrier or f"{made.name}: an effect that is not known"
        if not found and not made.barrier and not made.writes and not made.random:
            made.is_constant, made.constant = _is_plain_value(result), result
        _check_kernels(made)
        node.meta["neocog"] = made
        for t in found:
            self.hold(node, t)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        kwargs = kwargs or {}
        if self._running is None:
            return self.unclaimed(func, args, kwargs)
        self.watch(func, args, kwargs)
        result = func(*args, **kwargs)
        self._note(self._running, func, args, kwargs, result)
        return result

    def run_operator(
        self, node: fx.Node, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """An operator that is a node itself; asked from within the dispatch of it."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = Fact(name=_name(func))
        self._find_kernels(made, func, args, kwargs, graded=False)
        self._find_now(node, made)
        self._before = frozenset(map(storage_of, tensors))
        result = func(*args, **kwargs)
        self._note(made, func, args, kwargs, result)
        result = self.given_back(result)
        self.finish(node, made, func, result)
        return result

    def given_back(self, result: Any) -> Any:
        """The result of a node as the next ones see it."""
        return result

    def unclaimed(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator that no node asked for."""
        return func(*args, **kwargs)

    def watch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Asked before an operator of a node runs."""

    def _note(
        self,
        made: Fact,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        if func.namespace == "prim":
            return
        made.operators += 1
        made.writes |= written(func, args, kwargs) & self._before
        made.random |= is_random(func)
        if func.namespace not in NAMESPACES:
            made.barrier = f"{func}: an operator of somebody else's"
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            made.multiply_adds += count(*args, **kwargs, out_val=result) // 2

    # ---------------------------------------------------------------- kernels

    def _find_kernels(
        self, made: Fact, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], graded: bool
    ) -> None:
        if torch.is_autocast_enabled("cpu"):
            made.reason = "autocast: the kernels compute float32"
            return
        function = _OPERATORS.get(function, function)
        for kind in (TRAINING,) if graded else (INFERENCE, TRAINING):
            call = TABLES[kind].get(function)
            if call is None:
                known = graded and function in TABLES[INFERENCE]
                what = f"the gradient of {made.name}" if known else made.name
                made.reason = made.reason or f"{what}: no kernel"
                continue
            try:
                made.kernels[kind] = self._kernel(call, args, kwargs)
            except (Unsupported, InvalidProblem, TypeError) as error:
                # PyTorch runs the call, or refuses it in its own words.
                made.reason = made.reason or str(error)

    def _kernel(
        self, call: Callable[..., Call | Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Kernel:
        parameters: dict[str, fx.Node] = {}

        def name(tensor: Tensor | None) -> str | None:
            if tensor is None:
                return None
            _check_plain(tensor)
            node = self.node_of(tensor)
            if node.op not in ("placeholder", "get_attr"):
                raise Unsupported("a weight that is computed by the model itself")
            found = self.names.get(node, node.name)
            parameters[found] = node
            return found

        made = call(name, *args, **kwargs)
        inputs = (made,) if isinstance(made, Tensor) else made.inputs
        for t in inputs:
            _check_plain(t)
        return Kernel(
            None if isinstance(made, Tensor) else made,
            tuple(self.node_of(t) for t in inputs),
            parameters,
        )


def _check_plain(tensor: Tensor) -> None:
    """Unsupported for what no kernel may read; a fake tensor stands for one of the CPU's memory."""
    if tensor.dtype != torch.float32:
        raise Unsupported(f"dtype {tensor.dtype}: the kernels compute float32")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise Unsupported(f"a tensor on {tensor.device} in layout {tensor.layout}")
    if tensor.is_neg():
        raise Unsupported("a tensor with the negative bit")


def _check_kernels(made: Fact) -> None:
    """No kernel but for one result of the shape that PyTorch says."""
    for kind, kernel in list(made.kernels.items()):
        value = made.values[0] if len(made.values) == 1 else None
        shape = None if kernel.call is None else tuple(kernel.call.shape)
        if value is None or shape not in (None, value.shape) or value.dtype != torch.float32:
            del made.kernels[kind]
            made.reason = f"{made.name}: a result that the kernels do not give"


def _is_plain_value(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain_value, value))
    plain = bool | int | float | str | torch.dtype | torch.device
    return isinstance(value, plain) and not isinstance(value, torch.SymInt | torch.SymFloat)


_NORMS = frozenset({"batch_norm", "aten.batch_norm.default"})


def _laid_out(x: Tensor, result: Tensor) -> Tensor:
    """The result of a batch norm as the CPU lays it out: contiguous or channels_last.

    A fake one keeps the strides of ``x`` whatever they are (PyTorch 2.13).
    """
    if x.dim() != 4 or x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return result
    return result.contiguous(memory_format=suggest_memory_format(x))


def _name(function: Any) -> str:
    if isinstance(function, OpOverload):
        return str(function)
    return getattr(function, "__name__", type(function).__name__)
