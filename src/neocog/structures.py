"""Python's values in a graph: functions without a name, objects and structures with tensors inside.

A graph of ``torch.fx`` holds numbers, strings, tuples, lists, dictionaries and nodes. What else a
call takes or a model returns becomes a node that makes it from the tensors in it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import _get_qualified_name
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def attribute(getter: Any) -> str:
    """The name of the attribute that a getter such as ``Tensor.T.__get__`` gets."""
    owner = getter.__self__
    if isinstance(owner, property):
        owner = owner.fget
    return str(owner.__name__)


def target(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func`` as the target of a node, which has to have a name."""
    try:
        root, *path = _get_qualified_name(func).split(".")
        found = functools.reduce(getattr, path, torch) if root == "torch" else func
    except Exception:  # it looks for names in several ways, and fails in as many
        return _Called(func)
    return func if found is func else _Called(func)


class _Called:
    """A function without a name."""

    __name__ = "called"

    def __init__(self, func: Callable[..., Any]):
        self.func = func

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.func(*args, **kwargs)


class Structure:
    """A value that is made from the tensors in it: called with these, makes it again."""

    __name__ = "structure"

    parts: list[Any]
    """What it is made from, in order; may be structures again."""
    _make: Callable[[list[Any]], Any]

    def __init__(self, value: Any):
        if not any(map(_holds, tree_leaves(value))):  # nothing to be made
            self._make, self._places, self._leaves = operator.itemgetter(0), [], [value]
            self.parts = []
            return
        leaves, spec = tree_flatten(value)
        make: Callable[[list[Any]], Any] = functools.partial(tree_unflatten, treespec=spec)
        if spec.is_leaf() and _tensors_in(value):  # an object, of a dataclass, say
            leaves, make = list(vars(value).values()), functools.partial(_like, value)
        self._make = make
        self._places = [i for i, leaf in enumerate(leaves) if any(map(_holds, tree_leaves(leaf)))]
        self.parts = [leaves[i] for i in self._places]
        self._leaves = [None if i in self._places else v for i, v in enumerate(leaves)]

    def __call__(self, *parts: Any) -> Any:
        """The value with these parts."""
        leaves = list(self._leaves)
        for place, part in zip(self._places, parts, strict=True):
            leaves[place] = part
        return self._make(leaves)

    def alone(self) -> Structure:
        """The same without the parts, which it holds only until they are in the graph."""
        self.parts = []
        return self


def _holds(value: Any) -> bool:
    return isinstance(value, Tensor) or bool(_tensors_in(value))


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors among an object's attributes."""
    attributes = getattr(value, "__dict__", None)
    if isinstance(value, nn.Module | type) or not isinstance(attributes, dict):
        return []
    inside = [v for v in attributes.values() if not isinstance(v, type)]
    return [t for t in tree_leaves(inside) if isinstance(t, Tensor)]


def _like(value: Any, attributes: list[Any]) -> Any:
    made = object.__new__(type(value))
    vars(made).update(zip(vars(value), attributes, strict=True))
    return made
