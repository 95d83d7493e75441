"""A model as it was, whatever running it has kept on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, Tensor)


class Snapshot:
    """All that a model and the objects it holds refer to: attributes, buffers, hooks, containers.

    What tensors hold is no part of it.
    """

    def __init__(self, model: nn.Module):
        self.states: list[tuple[Any, Any]] = [(owner, _copy(owner)) for owner in _owners(model)]

    def changes(self) -> dict[tuple[int, str], Any]:
        """What is another than it was: its value now, by the number of its owner and its name."""
        return {
            (number, name): owner.get(name) if isinstance(owner, dict) else list(owner)
            for number, (owner, was) in enumerate(self.states)
            for name in _differences(was, owner)
        }

    def restore(self) -> None:
        """Let everything refer to what it did."""
        for owner, was in self.states:
            if next(_differences(was, owner), None) is None:
                continue
            if isinstance(owner, list):
                owner[:] = was
            else:
                owner.clear()
                owner.update(was)


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same, tensors by what they hold."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return isinstance(a, _PLAIN) and bool(a == b)


def _owners(model: nn.Module) -> Iterator[Any]:
    """The dictionaries, lists and sets that a model can be changed by."""
    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list | set):
            yield value
            waiting += value
        elif isinstance(value, tuple):
            waiting += value
        elif isinstance(value, nn.Module) or _is_object_of_a_program(value):
            yield vars(value)
            waiting += vars(value).values()


def _is_object_of_a_program(value: Any) -> bool:
    """Whether it is an object of a class that keeps its attributes in Python."""
    home = type(value).__module__
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, type)
        and type(value).__name__ not in ("module", "function", "method")
        and home.partition(".")[0] not in ("builtins", "torch", "numpy", "logging", "threading")
    )


def _copy(owner: Any) -> Any:
    kind = next(kind for kind in (dict, list, set) if isinstance(owner, kind))
    return kind(owner)


def _differences(was: Any, now: Any) -> Iterator[str]:
    if isinstance(was, dict):
        for name in was.keys() | now.keys():
            if name not in was or name not in now or was[name] is not now[name]:
                yield str(name)
    elif isinstance(was, list):
        if len(was) != len(now) or any(a is not b for a, b in zip(was, now, strict=True)):
            yield "a list"
    elif was != now:
        yield "a set"
