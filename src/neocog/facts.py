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
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .aten_calls import spelled_in_aten
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
    device: str
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
            t.device.type if strided else str(t.layout),
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
        self._before = frozenset(_storage(t) for t in tensors)
        try:
            result = self.given_back(function(*args, **kwargs))
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
        if not _known(function) or made.name in _SPECIAL or not known:
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
        self._before = frozenset(map(_storage, tensors))
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
        if func.namespace not in _NAMESPACES:
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


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata if t.layout == torch.strided else 0


def _name(function: Any) -> str:
    if isinstance(function, OpOverload):
        return str(function)
    return getattr(function, "__name__", type(function).__name__)


_NAMESPACES = frozenset({"aten", "prims", "prim", "neocog"})

NO_OPERATOR = frozenset({
    # what tells about tensors
    "size", "dim", "stride", "numel", "ndimension", "is_contiguous", "nelement", "storage_offset",
    "__get__", "getattr", "is_floating_point", "is_complex", "element_size", "is_tensor",
    "aten.sym_size.int", "aten.sym_stride.int",
    # what may give back what it is given
    "contiguous", "to", "float", "cpu", "type", "type_as", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "resolve_conj",
    "resolve_neg", "expand_as", "reshape", "view", "broadcast_tensors",
    # arithmetic with sizes
    "getitem", "__len__", "len", "ceil", "floor", "ge", "gt", "le", "lt", "eq", "ne", "add", "sub",
    "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "and_", "or_", "not_", "is_",
    "is_not", "min", "max", "int", "bool", "sqrt", "prod", "tuple", "list", "slice", "contains",
    "isinstance", "sym_int", "sym_float", "sym_max", "sym_min", "sym_sum", "sym_size",
})  # fmt: skip
"""Functions that may do their work without any of ATen's operators, and have no effects."""

_SPECIAL = frozenset({
    "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad_",
    "backward", "set_", "resize_", "resize_as_", "detach_", "share_memory_",
})  # fmt: skip
"""Functions that change more than values."""


def _known(function: Any) -> bool:
    """Whether it is one of PyTorch's, or Python's, own functions."""
    if isinstance(function, HigherOrderOperator):
        return False
    if isinstance(function, OpOverload):
        return function.namespace in _NAMESPACES
    name = getattr(function, "__name__", "")
    homes = (
        torch, F, Tensor, operator, torch._C._nn, torch._C._TensorBase, torch._VF, torch.special,
        torch.linalg, torch.fft,
    )  # fmt: skip
    if any(getattr(home, name, None) is function for home in homes):
        return True
    return getattr(function, "__module__", "") in ("math", "builtins", "_operator") or (
        isinstance(getattr(function, "__self__", None), property | types.GetSetDescriptorType)
    )


_RUNNING_STATISTICS = {
    "native_batch_norm": (3, 4, 5),
    "cudnn_batch_norm": (3, 4, 5),
    "_native_batch_norm_legit": (3, 4, 5),
    "_batch_norm_impl_index": (3, 4, 5),
}
"""Operators that move running statistics without saying so in their schema: the positions of these,
and of the flag that they do."""


def is_random(func: OpOverload) -> bool:
    """Whether an operator draws from PyTorch's generator."""
    return torch.Tag.nondeterministic_seeded in func.tags


def written(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[int]:
    """The storages that an operator writes to."""
    found: set[int] = set()
    if func._schema.is_mutable:
        for i, argument in enumerate(func._schema.arguments):
            info = argument.alias_info
            if info is not None and info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                found |= {_storage(t) for t in tree_leaves(value) if isinstance(t, Tensor)}
    positions = _RUNNING_STATISTICS.get(func._overloadpacket.__name__)
    if positions is not None and len(args) > positions[2] and args[positions[2]] is True:
        found |= {_storage(args[i]) for i in positions[:2] if isinstance(args[i], Tensor)}
    return found
