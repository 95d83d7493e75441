"""A model, called once on fake tensors, becomes a graph: the way of :func:`neocog.freeze`.

The arguments are fake tensors with their true device, data type and strides, and no values. What
the model brings itself (parameters, buffers, tensors it makes) is real: whatever depends on these
alone is computed here, once, and the graph holds the result. A ``TorchFunctionMode`` sees every
PyTorch function that reads an argument or what came from one, and writes it down as it was called;
operators that reach no such function (in scripted functions, in C++) are seen by the observer's
dispatch mode.

Python's control flow simply runs. A model whose flow, or whose state, depends on values raises
Unsupported, and is as it was.

https://docs.pytorch.org/docs/stable/torch.overrides.html
"""

from __future__ import annotations

import operator
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._C import _functorch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .effects import is_random, storage_of, written
from .errors import Unsupported
from .facts import Fact, Observer
from .guard import plain
from .ops import SPELLED_OUT
from .preserving import Snapshot, equal
from .structures import Structure, attribute, target

LARGEST_CONSTANT = 1 << 20
"""Elements up to which a tensor that depends on sizes alone is computed once and kept."""


@dataclass
class Recorded:
    """A graph, and its constants by the names they have as parameters."""

    gm: fx.GraphModule
    constants: dict[str, Tensor]


def record(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], known: Mapping[int, str],
    name_of: Callable[[Tensor], str],
) -> Recorded:  # fmt: skip
    """The graph of ``model(*args, **kwargs)``, whose nodes have facts; its placeholders stand for
    the tensors among the arguments, in order.

    ``known``: id -> name of tensors of the model; ``name_of`` names the others it reads.
    """
    with _state_kept(), torch.inference_mode(False), torch.no_grad():
        snapshot = Snapshot(model)
        try:
            made = _Recorder(known, name_of).record(model, args, kwargs)
            kept = snapshot.changes()
            if kept:
                # What it keeps may change what it does the next time.
                _check_kept(kept)
                again = _Recorder(known, name_of).record(model, args, kwargs)
                after = snapshot.changes()
                states = kept.keys() == after.keys() and all(equal(kept[k], after[k]) for k in kept)
                if not states or not _same(made, again):
                    raise Unsupported(f"the model keeps a state from call to call: {_names(kept)}")
                made = again
        finally:
            snapshot.restore()
    return made


def _check_kept(kept: Mapping[tuple[int, str], Any]) -> None:
    """What depends on an argument cannot be kept by a graph."""
    varying = {key: v for key, v in kept.items() if any(map(_is_fake, tree_leaves(v)))}
    if varying:
        raise Unsupported(f"the model keeps what depends on its arguments: {_names(varying)}")


def _names(kept: Mapping[tuple[int, str], Any]) -> str:
    return ", ".join(sorted({name for _, name in kept})[:3])


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def _same(a: Recorded, b: Recorded) -> bool:
    if str(a.gm.graph) != str(b.gm.graph):
        return False
    pairs = zip(a.constants.values(), b.constants.values(), strict=True)
    return all(x is y or (x.shape == y.shape and torch.equal(x, y)) for x, y in pairs)


@contextmanager
def _state_kept() -> Iterator[None]:
    """Random numbers go on as if nothing had been drawn."""
    state, others = torch.get_rng_state(), _other_states()
    try:
        yield
        if pickle.dumps(_other_states()) != pickle.dumps(others):
            raise Unsupported("the model draws random numbers from Python's or NumPy's generator")
    finally:
        torch.set_rng_state(state)
        random.setstate(others[0])
        np.random.set_state(others[1])


def _other_states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


class _Operators(Observer):
    """The observer, which knows whom to ask about operators that no function was seen for."""

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def unclaimed(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of scripted functions and the like, or of what computes constants."""
        with torch._C.DisableTorchFunction():  # our own questions are no calls of the model's
            return self.recorder.operator(func, args, kwargs)

    def given_back(self, result: Any) -> Any:
        """Only fake tensors depend on arguments."""
        return self.recorder.fake(result)

    def watch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing of the model's own may be written to."""
        self.recorder.check_writes(func, args, kwargs)


class _WritesToConstant(Unsupported):
    """A call writes what comes from an argument to a tensor that was thought to be a constant."""

    def __init__(self, tensor: Tensor):
        super().__init__("the model writes to a tensor that it keeps")
        self.tensor = tensor


class _Recorder(TorchFunctionMode):
    def __init__(self, known: Mapping[int, str], name_of: Callable[[Tensor], str]):
        super().__init__()
        self.known, self.name_of = known, name_of
        self.graph = fx.Graph()
        self.observer = _Operators(self)
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.constants: dict[str, Tensor] = {}
        self.attributes: dict[str, Tensor] = {}
        self.fresh: dict[int, list[Tensor]] = {}
        """Tensors that the model has made itself from constants, by their memory."""
        self.instead: dict[int, Tensor] = {}
        """A tensor that was a constant until something was written to it -> its fake."""
        self.random = False
        """Whether a constant call draws random numbers."""
        self.closing = False
        """Whether what is written is the result."""

    # ---------------------------------------------------------------- the whole call

    def record(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recorded:
        """Run the model, and finish the graph."""
        leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
        given = [self._argument(i, v) if isinstance(v, Tensor) else v for i, v in enumerate(leaves)]
        given_args, given_kwargs = tree_unflatten(given, spec)
        with self.observer:
            with self:
                result = model(*given_args, **given_kwargs)
            self.closing = True
            output = self.graph.output(self._written(result))
            self.observer.close(output)
        gm = fx.GraphModule(self.attributes, self.graph)
        return Recorded(gm, self.constants)

    def _argument(self, index: int, tensor: Tensor) -> Tensor:
        fake = self.fakes.from_tensor(tensor.detach(), static_shapes=True)
        self.observer.outside(self.graph.placeholder(f"argument_{index}"), fake)
        return fake

    # ---------------------------------------------------------------- functions

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: D105
        kwargs = dict(kwargs or {})
        if self.instead:
            args, kwargs = tree_map_only(Tensor, self._current, (args, kwargs))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if torch.is_autocast_enabled("cpu"):
            raise Unsupported("autocast: the kernels compute float32")
        if func is torch._C._set_grad_enabled and args == (True,):
            raise Unsupported("the model computes gradients itself")
        name = getattr(func, "__name__", "")
        varies = any(isinstance(t, FakeTensor) for t in tensors)
        if name in _CHANGES or (varies and name in _BEHIND):
            raise Unsupported(
                f"the model looks behind its tensors, or changes what they are: {name}"
            )
        if any(_functorch.is_functorch_wrapped_tensor(t) for t in tensors):
            raise Unsupported("a transform of torch.func")
        if not varies:
            return self._constant_call(func, args, kwargs)
        if name in _ABOUT:
            found = func(*args, **kwargs)
            if not isinstance(found, Tensor):  # x.data and x.mT are tensors
                return found
        stand_in = _stand_in(func, args)
        if stand_in is not None:
            return self._constant_call(func, stand_in, kwargs)
        spelled = SPELLED_OUT.get(func)
        if spelled is not None:
            with self:
                first = spelled(*args, **kwargs)
            if first is not None:
                return first, *self._call(func, args, kwargs)[1:]
        return self._call(func, args, kwargs)

    def _current(self, tensor: Tensor) -> Tensor:
        return self.instead.get(id(tensor), tensor)

    def _constant_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that reads no argument: it runs now, unless it draws random numbers."""
        outer, self.random = self.random, False
        try:
            state = torch.get_rng_state()
            result = func(*args, **kwargs)
            drawn, self.random = self.random, outer
        finally:
            self.random = outer
        if not drawn:
            return result
        torch.set_rng_state(state)
        written = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for t in written:  # such as torch.empty(3).normal_()
            if any(t is r for r in tree_leaves(result)):
                self._promote(t)
        args, kwargs = tree_map_only(Tensor, self._current, (args, kwargs))
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write a call down, and run it on fake tensors."""
        try:
            return self._recorded(func, args, kwargs)
        except _WritesToConstant as error:
            self._promote(error.tensor)
            args, kwargs = tree_map_only(Tensor, self._current, (args, kwargs))
            return self._recorded(func, args, kwargs)

    def _recorded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node = self._node(func, args, kwargs)
        try:
            result = self.observer.run(node, func, args, kwargs)
        except Exception:  # which the model may catch
            self.graph.erase_node(node)
            raise
        return self._held(node, result)

    def _held(self, node: fx.Node, result: Any) -> Any:
        """The result; several tensors become nodes of their own."""
        leaves, spec = tree_flatten(result)
        for i, leaf in enumerate(leaves if not spec.is_leaf() else ()):
            if isinstance(leaf, Tensor):
                part = self.graph.call_function(_leaf, (node, i))
                self.observer.finish(part, Fact(name="getitem"), operator.getitem, leaf)
        return result

    def fake(self, result: Any) -> Any:
        """What a call of the graph returns: it differs from call to call."""
        return tree_map_only(Tensor, self._fake, result)

    def _fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        return self.fakes.from_tensor(tensor, static_shapes=True)

    # ---------------------------------------------------------------- operators behind functions

    def operator(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator that nobody has written down: of a constant, or of a scripted function."""
        if self.instead:
            args, kwargs = tree_map_only(Tensor, self._current, (args, kwargs))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(isinstance(t, FakeTensor) for t in tensors) and func.namespace != "prim":
            node = self._node(func, args, kwargs)
            self.check_writes(func, args, kwargs)
            return self._held(node, self.observer.run_operator(node, func, args, kwargs))
        self.check_writes(func, args, kwargs)
        self.random |= is_random(func)
        result = func(*args, **kwargs)
        read = set(map(storage_of, tensors))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and (storage_of(t) not in read or storage_of(t) in self.fresh):
                self.fresh.setdefault(storage_of(t), []).append(t)
        return result

    def check_writes(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise before an operator writes to a tensor that the model keeps."""
        to = written(func, args, kwargs)
        if not to:
            return
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        varies = any(isinstance(t, FakeTensor) for t in tensors)
        for t in tensors:
            if isinstance(t, FakeTensor) or storage_of(t) not in to:
                continue
            if storage_of(t) not in self.fresh:
                raise Unsupported(
                    f"the model writes to {self.known.get(id(t), 'a tensor that it keeps')}"
                )
            if varies:
                raise _WritesToConstant(t)

    def _promote(self, tensor: Tensor) -> None:
        """From now on, what was a constant is a value of the graph: a copy in each call."""
        made = self.fresh.get(storage_of(tensor), [])
        if any(other is not tensor for other in made) or not made:
            raise Unsupported("the model writes to a tensor that it keeps")
        constant = self._constant(tensor)
        node = self.graph.call_function(torch.clone, (constant,))
        fake = self.fakes.from_tensor(tensor.clone(), static_shapes=True)
        self.observer.finish(node, Fact(name="clone", operators=1), torch.clone, fake)
        self.instead[id(tensor)] = fake

    # ---------------------------------------------------------------- nodes

    def _node(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        written_args, written_kwargs = self._written(args), self._written(kwargs)
        if getattr(func, "__name__", "") == "__get__":
            return self.graph.call_function(getattr, (*written_args[:1], attribute(func)))
        return self.graph.call_function(target(func), written_args, written_kwargs)

    def _written(self, value: Any) -> Any:
        """``value`` as a graph can hold it: tensors as nodes, structures as calls."""
        if isinstance(value, Tensor):
            return self._reference(value)
        if isinstance(value, _SIMPLE) or value is None or value is Ellipsis:
            return value
        if type(value) in (tuple, list):
            return type(value)(self._written(v) for v in value)
        if isinstance(value, torch.Size):
            return self._structure(value) if self.closing else tuple(value)
        if isinstance(value, slice):
            return slice(*(self._written(v) for v in (value.start, value.stop, value.step)))
        if type(value) is dict and all(isinstance(k, str) for k in value):
            return {k: self._written(v) for k, v in value.items()}
        return self._structure(value)

    def _structure(self, value: Any) -> fx.Node:
        """Any other value of Python's: a call that makes it."""
        structure = Structure(value)
        parts = tuple(self._written(part) for part in structure.parts)
        node = self.graph.call_function(structure.alone(), parts)
        self.observer.put_together(node)
        return node

    def _reference(self, tensor: Tensor) -> fx.Node:
        tensor = self._current(tensor)
        found = self.observer.holders.get(id(tensor))
        if found is None and isinstance(tensor, FakeTensor):
            raise Unsupported("the model reads a tensor that it has kept from another call")
        node = self._constant(tensor) if found is None else found
        if self.closing and storage_of(tensor) in self.fresh:  # the caller may write to it
            node = self.graph.call_function(torch.clone, (node,))
            self.observer.finish(node, Fact(name="clone", operators=1), torch.clone, tensor.clone())
        return node

    def _constant(self, tensor: Tensor) -> fx.Node:
        found = self.observer.holders.get(id(tensor))
        if found is not None:
            return found
        name = self.known.get(id(tensor)) or self.name_of(tensor)
        attribute = f"constant_{len(self.attributes)}"
        self.attributes[attribute] = tensor.detach()
        self.constants[name] = tensor.detach()
        node = self.graph.get_attr(attribute)
        self.observer.names[node] = name
        self.observer.outside(node, tensor)
        if not plain(tensor.detach()):
            raise Unsupported(f"{name} is not plain memory")
        return node


_SIMPLE = (
    bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip

_ABOUT = frozenset({
    "__get__", "dim", "size", "stride", "is_contiguous", "numel", "ndimension", "nelement",
    "storage_offset", "is_floating_point", "is_complex", "element_size", "__len__", "get_device",
    "is_tensor", "is_signed",
})  # fmt: skip
"""Functions that tell about a tensor, and give none."""

_CHANGES = frozenset({"__set__", "register_hook", "retain_grad", "backward", "requires_grad_"})
"""Functions that change more than values."""

_BEHIND = frozenset({
    "data_ptr", "is_inference", "untyped_storage", "storage", "_typed_storage", "is_shared",
    "share_memory_",
    "numpy", "__array__", "__dlpack__",
})  # fmt: skip
"""Functions that no fake tensor has an answer to."""

_MADE_LIKE = frozenset(
    {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
)
_BY_ANOTHER = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})


def _stand_in(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The arguments of a call that looks at the shape, data type and device of an argument only,
    with a real tensor in its place; None for any other call."""
    name = getattr(func, "__name__", "")
    fakes = [i for i, a in enumerate(args) if isinstance(a, FakeTensor)]
    if name in _MADE_LIKE and fakes == [0]:
        like = args[0]
        if like.numel() > LARGEST_CONSTANT:
            return None
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        return made, *args[1:]
    if name in _BY_ANOTHER and fakes == [1] and isinstance(args[0], Tensor):
        other = args[1]
        made = torch.empty((), dtype=other.dtype, device=other.device).expand(other.shape)
        return args[0], made, *args[2:]
    return None


def _leaf(result: Any, index: int) -> Any:
    """One tensor of what a call returned."""
    return tree_leaves(result)[index]
