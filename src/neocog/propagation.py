"""The facts of a graph that somebody else has captured: Dynamo, torch.export, torch.fx.

The graph's nodes run in order on fake tensors that stand for the arguments of a call, so that sizes
are numbers, whatever was symbolic when the graph was made. Modes that the graph switches
(gradients, autocast) are switched here, too, and put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from .errors import Unsupported
from .facts import Fact, Observer, fact


def observe(gm: fx.GraphModule, args: Sequence[Any]) -> None:
    """Write the facts of all nodes of ``gm``, called with ``args``.

    Unsupported for graphs that cannot run on fake tensors.
    """
    for node in gm.graph.nodes:
        home = getattr(node.target, "__module__", None) or ""
        if node.op == "call_function" and "functorch" in home:
            raise Unsupported("a transform of torch.func")
    with _state_kept():
        _Walk(gm, args).all()


def written_arguments(gm: fx.GraphModule, args: Sequence[Any]) -> frozenset[int]:
    """Which arguments a call of ``gm`` writes to. Unsupported as :func:`observe`."""
    observe(gm, args)
    nodes = list(gm.graph.nodes)
    written = frozenset().union(*(fact(node).writes for node in nodes))
    placeholders = [node for node in nodes if node.op == "placeholder"]
    return frozenset(
        i for i, n in enumerate(placeholders) if any(v.storage in written for v in fact(n).values)
    )


class _Walk:
    def __init__(self, gm: fx.GraphModule, args: Sequence[Any]):
        self.gm, self.args = gm, iter(args)
        self.observer = Observer()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.values: dict[fx.Node, Any] = {}

    def all(self) -> None:
        """Every node in order."""
        nodes = list(self.gm.graph.nodes)
        outside = [node for node in nodes if node.op in ("placeholder", "get_attr")]
        for node in outside:
            self.values[node] = self._outside(node)
        with self.fakes, self.observer:
            for node in nodes:
                if node in self.values:
                    continue
                try:
                    self.values[node] = self._value(node)
                except Unsupported:
                    raise
                except Exception as error:
                    raise Unsupported(f"{node.name} cannot be foreseen: {error}") from error

    def _value(self, node: fx.Node) -> Any:
        if node.op == "output":
            self.observer.close(node)
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if isinstance(node.target, HigherOrderOperator):
            return self._higher_order(node)
        return self.observer.run(node, self._function(node, args), args, kwargs)

    def _outside(self, node: fx.Node) -> Any:
        value = next(self.args) if node.op == "placeholder" else _attribute(self.gm, node.target)
        if not isinstance(value, Tensor):
            node.meta["neocog"] = Fact()
            return value
        value = self.fakes.from_tensor(value, static_shapes=True)
        self.observer.outside(node, value)
        return value

    def _function(self, node: fx.Node, args: Sequence[Any]) -> Callable[..., Any]:
        if node.op == "call_method":
            owner = Tensor if isinstance(args[0], Tensor) else type(args[0])
            return getattr(owner, str(node.target))
        if node.op == "call_module":
            return _attribute(self.gm, node.target)
        assert callable(node.target)
        return node.target

    def _higher_order(self, node: fx.Node) -> Any:
        """An operator on functions, which PyTorch alone knows to run: its results were told."""

        def fake(t: Tensor) -> Tensor:
            if not all(isinstance(n, int) for n in (*t.shape, *t.stride())):
                raise Unsupported(f"{node.name}: a result of a size that is not known")
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            return made.requires_grad_(t.requires_grad) if t.is_floating_point() else made

        example = node.meta.get("example_value", node.meta.get("val"))
        result = tree_map_only(Tensor, fake, example)
        name = f"{getattr(node.target, '__name__', node.target)}"
        made = Fact(name=name, reason=f"{name}: an operator on functions")
        self.observer.finish(node, made, node.target, result)
        return result


def _attribute(gm: fx.GraphModule, path: Any) -> Any:
    value: Any = gm
    for name in str(path).split("."):
        value = getattr(value, name)
    return value


@contextlib.contextmanager
def _state_kept() -> Iterator[None]:
    """Modes and the generator of random numbers as before, whatever a graph does to them."""
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    dtype, state = torch.get_autocast_dtype("cpu"), torch.get_rng_state()
    try:
        # What somebody does with saved tensors is not to be done with fake ones.
        with (
            torch.set_grad_enabled(grad), torch.autograd.graph.saved_tensors_hooks(_same, _same)
        ):  # fmt: skip
            yield
    finally:
        torch.set_autocast_enabled("cpu", autocast)
        torch.set_autocast_dtype("cpu", dtype)
        torch.set_rng_state(state)


def _same(tensor: Tensor) -> Tensor:
    return tensor
