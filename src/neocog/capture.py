"""Capture: a model, called once on tensors without data, becomes a :class:`Network`.

The model runs with its arguments as meta tensors (shapes, no data) under a
``torch.overrides.TorchFunctionMode`` that sees every call of a PyTorch function. Calls of layers
that neocog's kernels cover become nodes of their own; every other call becomes a foreign node that
runs in PyTorch, with the reason. Python's control flow runs as it is, so any model can be captured
whose flow depends on shapes only; one that looks at values raises Unsupported.

https://docs.pytorch.org/docs/stable/torch.overrides.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from .errors import InvalidProblem, Unsupported
from .layer_calls import CALLS, Call
from .network import Foreign, Input, Network, Node

Calls = Mapping[Any, Callable[..., Call | Tensor]]
"""PyTorch's functions that have kernels, each with what makes an operation of it."""


@dataclass
class Captured:
    """A network and how its outputs make up what the model returned."""

    network: Network
    spec: Any
    leaves: list[Node | Any]
    """The returned structure's leaves: nodes, or values that are no tensors."""
    parameters: dict[str, Tensor]
    """Tensors the model brought itself (parameters, buffers), by name."""

    def result(self, leaves: list[Any]) -> Any:
        """The model's return value from its leaves, tensors in the place of nodes."""
        if self.spec.is_leaf():  # what most models return, and quicker
            return leaves[0]
        return tree_unflatten(leaves, self.spec)


def capture(
    model: Callable[..., Any],
    args: Sequence[Any],
    names: Mapping[int, str] | None = None,
    calls: Calls = CALLS,
    spelled_out: Mapping[Any, Callable[..., Tensor]] = MappingProxyType({}),
) -> Captured:
    """The network of ``model(*args)``.

    ``names``: id -> name of tensors the model may read besides its arguments; others it reads are
    named by number. ``calls``: what has kernels. ``spelled_out``: operators whose first result is
    told in others; nobody asks for the rest. Unsupported if the model looks at the values of a
    tensor or writes to memory that several tensors share.
    """
    recorder = _Recorder(names or {}, calls, spelled_out)
    # Inference tensors count no versions, which say whether a call has written to them.
    with torch.inference_mode(False), torch.no_grad():
        metas = [
            recorder.argument(i, a) if isinstance(a, Tensor) else a for i, a in enumerate(args)
        ]
        try:
            with recorder:
                result = model(*metas)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            if isinstance(error, InvalidProblem | Unsupported) or "meta" not in str(error).lower():
                raise
            raise Unsupported(f"the model looks at the values of a tensor: {error}") from error
    leaves, spec = tree_flatten(result)
    leaves = [recorder.node(v) if isinstance(v, Tensor) else v for v in leaves]
    recorder.network.outputs = [v for v in leaves if isinstance(v, Node)]
    return Captured(recorder.network, spec, leaves, recorder.parameters)


def argument(index: int) -> str:
    """The name of an argument; no parameter has a space in its own."""
    return f"argument {index}"


class _Recorder(TorchFunctionMode):
    def __init__(
        self,
        names: Mapping[int, str],
        calls: Calls,
        spelled_out: Mapping[Any, Callable[..., Tensor]],
    ) -> None:
        super().__init__()
        self._calls, self._spelled_out = calls, spelled_out
        self.network = Network()
        self.parameters: dict[str, Tensor] = {}
        self._names = names
        self._nodes: dict[int, Node] = {}
        self._kept: list[Tensor] = []  # ids stay unique while their tensors live

    # ---------------------------------------------------------------- tensors and their nodes

    def argument(self, index: int, tensor: Tensor) -> Tensor:
        """The meta tensor that stands for an argument."""
        meta = torch.empty_like(tensor, device="meta", requires_grad=False)
        name = argument(index)
        self._bind(meta, self.network.add(Input(name, index), (), tensor.shape, name))
        return meta

    def node(self, tensor: Tensor) -> Node:
        """The node of a tensor; one not seen before is a parameter."""
        known = self._nodes.get(id(tensor))
        return known if known is not None else self._parameter(tensor)

    def name_of(self, tensor: Tensor | None) -> str | None:
        """The name of a tensor in the position of a parameter."""
        if tensor is None:
            return None
        _check_tensor(tensor)
        node = self.node(tensor)
        if not isinstance(node.op, Input):
            raise Unsupported("a weight that is computed by the model itself")
        return node.op.name

    def _parameter(self, tensor: Tensor) -> Node:
        name = self._names.get(id(tensor), f"tensor {len(self.parameters)}")
        self.parameters[name] = tensor
        node = self.network.add(Input(name), (), tensor.shape, name)
        self._bind(tensor, node)
        return node

    def _bind(self, tensor: Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)

    # ---------------------------------------------------------------- calls

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: D105
        kwargs = kwargs or {}
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if name.endswith(("__get__", ".dim", ".size", ".stride", ".is_contiguous", ".numel")):
            found = func(*args, **kwargs)
            if not isinstance(found, Tensor):  # x.data and x.mT are tensors
                return found
        if torch.is_autocast_enabled("cpu"):
            raise Unsupported("autocast: the kernels compute float32")
        if func in self._spelled_out:
            with self:
                first = self._spelled_out[func](*args, **kwargs)
            return first, *([None] * (len(func._schema.returns) - 1))
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        call = self._calls.get(func)
        reason = f"{name}: no kernel"
        if call is not None:
            try:
                return self._native(call, args, kwargs)
            except SharedMemory:
                raise
            except (Unsupported, InvalidProblem, TypeError) as error:
                reason = str(error)  # PyTorch runs the call, or refuses it in its own words
        return self._foreign(func, name, reason, args, kwargs, tensors)

    def _native(self, call: Callable[..., Call | Tensor], args, kwargs) -> Tensor:
        made = call(self.name_of, *args, **kwargs)
        if isinstance(made, Tensor):
            return made
        for t in made.inputs:
            _check_tensor(t)
        written = made.inputs[0] if made.in_place else None
        if written is not None:
            self._check_writable(written)
            if isinstance(self.node(written).op, Input):
                raise Unsupported("writes to a tensor from outside")
        inputs = tuple(self.node(t) for t in made.inputs)
        node = self.network.add(made.op, inputs, made.shape, made.name)
        if written is not None:
            result = written
        elif made.view:
            result = made.inputs[0].reshape(made.shape)
        else:
            result = torch.empty(made.shape, dtype=torch.float32, device="meta")
        self._bind(result, node)
        return result

    def _check_writable(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()._cdata
        for other in self._kept:
            if other is not tensor and other.untyped_storage()._cdata == storage:
                raise SharedMemory("writes to memory that two tensors share")

    def _foreign(self, func, name: str, reason: str, args, kwargs, tensors) -> Any:
        flat, spec = tree_flatten((args, kwargs))
        places = [i for i, v in enumerate(flat) if isinstance(v, Tensor)]

        def run(*values: Tensor) -> Any:
            filled = list(flat)
            for place, value in zip(places, values, strict=True):
                filled[place] = value
            run_args, run_kwargs = tree_unflatten(filled, spec)
            return func(*run_args, **run_kwargs)

        inputs = tuple(self.node(t) for t in tensors)
        metas = [t if t.is_meta else torch.empty_like(t, device="meta") for t in tensors]
        versions = [m._version for m in metas]
        with FlopCounterMode(display=False) as counter:
            result = run(*metas)
        for place in places:
            flat[place] = None
        written = [i for i, m in enumerate(metas) if m._version != versions[i]]
        for i in written:
            self._check_writable(metas[i])
            if any(inputs[i] in node.inputs for node in self.network.nodes):
                # That reader may have to wait for another foreign call, the write does not.
                raise SharedMemory(f"{name} writes to a value that was read before")
        work = counter.get_total_flops() // 2
        made = self.network.add(Foreign(name, reason, run, work), inputs, (), name)
        for i in written:
            op = Foreign(name, reason, _Argument(i), part=True)
            node = self.network.add(op, (*inputs, made), metas[i].shape, name)
            self._bind(tensors[i], node)
        leaves, leaf_spec = tree_flatten(result)
        for i, leaf in enumerate(leaves):
            own = next((tensors[j] for j in written if leaf is metas[j]), None)
            if own is not None:
                leaves[i] = own  # the model may keep it: it must not become a meta tensor
            elif isinstance(leaf, Tensor):
                if any(leaf is m for m in metas):
                    # x.contiguous() may copy where x has another layout than here: two tensors.
                    leaf = leaves[i] = leaf.view_as(leaf)
                op = Foreign(name, reason, _Leaf(i), part=True)
                self._bind(leaf, self.network.add(op, (made,), leaf.shape, name))
        return tree_unflatten(leaves, leaf_spec)


class SharedMemory(Unsupported):
    """The model writes to memory that several tensors share; the whole model is handed back."""


@dataclass(frozen=True)
class _Leaf:
    """One tensor of what a foreign call returned."""

    index: int

    def __call__(self, result: Any) -> Tensor:
        return tree_flatten(result)[0][self.index]


@dataclass(frozen=True)
class _Argument:
    """An argument after a foreign call has written to it."""

    index: int

    def __call__(self, *values: Any) -> Tensor:
        return values[self.index]


def _check_tensor(tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise Unsupported(f"dtype {tensor.dtype}: the kernels compute float32")
