"""neocog.freeze: a model whose weights will not change, compiled for good."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_flatten

from .cpu.runtime import on_deep_stack
from .errors import InvalidModel, Unsupported
from .facts import grads_are_kept
from .guard import interrupted, plain, sharing, why_not
from .kernels import Sizes
from .parameters import Parameters
from .preserving import Snapshot, equal
from .recording import Recorded, record
from .reports import Report, report_of
from .rewriting import Rewritten, Setting, rewrite
from .running import Plans, choice
from .stages import Native
from .target import host

log = logging.getLogger("neocog")


@dataclass(eq=False)
class FrozenPlan:
    """A model for arguments of one kind."""

    rewritten: Rewritten | None
    """None if PyTorch runs the model as it is."""
    report: Report
    recorded: Recorded | None = None
    """Owns the constants."""
    failed: bool = False
    """Whether capturing ended in an error, which may be the model's own."""

    @property
    def natives(self) -> list[Native]:
        """Its programs."""
        return [] if self.rewritten is None else self.rewritten.natives


class Frozen(nn.Module):
    """What :func:`freeze` returns: call it like the model.

    It holds the model, and can stand in an ``nn.Sequential``, be copied, pickled and saved: weights
    and options go along, code is compiled anew. ``train()`` leaves it as it is. Weights that change
    after it was made are taken over by ``refresh()``; ``load_state_dict`` and ``to`` do so by
    themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        exact: bool = False,
        tune: bool = False,
        strict: bool = False,
    ):
        super().__init__()
        self.model, self.exact, self.tune, self.strict = model, exact, tune, strict
        self.training = False
        self._prepare()
        self._first(args, kwargs)

    def _prepare(self) -> None:
        self._plans: Plans[FrozenPlan] = Plans()
        self._sizes = Sizes()
        self._numbers = itertools.count()
        self._extra: MutableMapping[str, Tensor] = weakref.WeakValueDictionary()
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        self._known = {id(t): name for name, t in tensors}
        own = {name: t.detach() for name, t in tensors}
        self.weights = Parameters(ChainMap(own, self._extra), host())

    def _first(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The plan of the example. What the model itself refuses is refused here."""
        if _trains(self.model):
            raise InvalidModel("model is in training mode; call model.eval() before neocog.freeze")
        if self.plan_for(args, kwargs).failed:
            snapshot = Snapshot(self.model)
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    self.model(*args, **kwargs)
            finally:
                snapshot.restore()

    def refresh(self) -> None:
        """Take over weights of the model that have changed.

        Everything is captured and packed anew when it is called next.
        """
        self._prepare()

    @property
    def plans(self) -> list[FrozenPlan]:
        """The plans of the shapes it has met, the latest used last."""
        return list(self._plans)

    @property
    def reports(self) -> list[Report]:
        """What became of each of them."""
        return [plan.report for plan in self._plans]

    def plan_for(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> FrozenPlan:
        """The plan for arguments of these shapes and layouts; made when they are new."""
        tensors, key = _tensors(args, kwargs or {})
        reason = interrupted() or next(filter(None, map(why_not, tensors)), None)
        if reason is not None:
            return FrozenPlan(None, Report(whole=reason))
        return self._find(args, kwargs or {}, key)

    def _find(self, args: Sequence[Any], kwargs: Mapping[str, Any], key: Any) -> FrozenPlan:
        # A model without values needs more of the stack than one with them.
        return self._plans.find(key, lambda: on_deep_stack(lambda: self._make(args, kwargs, key)))

    def _make(self, args: Sequence[Any], kwargs: Mapping[str, Any], key: Any) -> FrozenPlan:
        if _trains(self.model):
            raise InvalidModel("model is in training mode; call model.eval() before it is used")
        try:
            recorded = record(self.model, args, kwargs, self._known, self._name)
        except Exception as error:
            report = Report(whole=_reason(error))
            if self.strict:
                raise Unsupported(f"{report.whole} (strict=True)") from error
            log.warning("%s", report)
            return FrozenPlan(None, report, failed=not isinstance(error, _CANNOT))
        extra = {n: t for n, t in recorded.constants.items() if n not in self.weights.tensors}
        self._extra.update(extra)
        choose = choice(self.weights.target, self.exact, self.tune)
        setting = Setting(self.weights, choose, self.exact, {})
        with self._sizes.size(key):
            made = rewrite(recorded.gm, setting)
        return FrozenPlan(made, report_of(made), recorded)

    def _name(self, tensor: Tensor) -> str:
        """A name for a tensor that the model has made from its own: what is equal has one name."""
        for name, other in list(self._extra.items()):
            if equal(other, tensor.detach()):
                return name
        return f"constant {next(self._numbers)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result."""
        # A module's own call takes longer than the guard.
        if torch.compiler.is_compiling() or self._forward_hooks or self._forward_pre_hooks:
            return super().__call__(*args, **kwargs)
        return self._run(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same, without hooks."""
        if torch.compiler.is_compiling():  # part of a larger graph, which is compiled as a whole
            with torch.no_grad():
                return self.model(*args, **kwargs)
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors, key = _tensors(args, kwargs)
        if interrupted() is not None or not all(map(plain, tensors)):
            return self._in_pytorch(args, kwargs)
        if any([t.requires_grad for t in tensors]) and grads_are_kept():
            log.warning("a frozen model is asked for gradients: PyTorch computes them")
            return self.model(*args, **kwargs)
        made = (self._plans.latest(key) or self._find(args, kwargs, key)).rewritten
        if made is None:
            return self._in_pytorch(args, kwargs)
        return made.run(*tensors)

    def _in_pytorch(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if interrupted() is not None:  # a transform may ask for gradients
            return self.model(*args, **kwargs)
        with torch.no_grad():
            return self.model(*args, **kwargs)

    # ---------------------------------------------------------------- as a module

    def train(self, mode: bool = True) -> Frozen:
        """A frozen model is for inference, whatever it is a part of."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Frozen:
        super()._apply(fn, recurse)
        self.refresh()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's weights; they are taken over."""
        found = super().load_state_dict(*args, **kwargs)
        self.refresh()
        return found

    def __getstate__(self) -> dict[str, Any]:
        made = ("_plans", "_sizes", "_numbers", "_extra", "_known", "weights")
        return {k: v for k, v in self.__dict__.items() if k not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def extra_repr(self) -> str:
        options = [f"{n}=True" for n in ("exact", "tune", "strict") if getattr(self, n)]
        return ", ".join([*options, *(f"\n{report}" for report in self.reports[-1:])])


def _trains(model: nn.Module) -> bool:
    """Whether a module is in training mode; a graph does what it says in any."""
    if isinstance(model, fx.GraphModule):
        called = [n.target for n in model.graph.nodes if n.op == "call_module"]
        modules = [m for name in called for m in model.get_submodule(str(name)).modules()]
        home = "torch.nn."
        return any(m.training for m in modules if type(m).__module__.startswith(home))
    return any(m.training for m in model.modules())


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Tensor], Any]:
    """The tensors among the arguments, and what plans depend on of all arguments."""
    if not kwargs and all([isinstance(a, Tensor) for a in args]):  # most calls, and quicker
        key = tuple([(a.shape, a.stride(), a.dtype) for a in args])
        return args, key if len(args) < 2 else (key, sharing(args))
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, (spec, sharing(tensors), *map(_kind, leaves))


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


_CANNOT = (
    Unsupported, DataDependentOutputException, DynamicOutputShapeException,
    UnsupportedOperatorException,
)  # fmt: skip


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    if isinstance(error, Unsupported):
        return text
    if isinstance(error, _CANNOT):
        return f"the model looks at the values of a tensor: {text}"
    return f"the model fails on tensors without values: {type(error).__name__}: {text}"


def freeze(
    model: nn.Module,
    example: Any,
    *,
    exact: bool = False,
    tune: bool = False,
    strict: bool = False,
) -> Frozen:
    """Compile ``model`` for inference; its weights must not change any more.

    ``model``: in eval mode (InvalidModel otherwise); it is left as it is. ``example``: an argument,
    or a sequence of all of them, or a dictionary of keyword arguments: float32 tensors on the CPU
    of the shape the model is used with, and whatever else the model takes; other shapes are
    compiled when they come. The result takes what the model takes and returns what it returns;
    asked for gradients it leaves the call to PyTorch. Weights that change afterwards are not
    noticed until ``refresh()``.

    ``exact``: no Winograd, whose errors are relative to the largest values of a tile of up to 8x8
    inputs (networks' results are off by up to 3e-6 of the largest value, or four times PyTorch's
    error), which may overflow where max|x| * sum|w| exceeds 2e35, and which spreads NaN and
    infinity over tiles of up to 6x6; and long sums are cut short. ``tune``: each layer is run with
    every algorithm that covers it, for a second or so in all, and the fastest is kept on disk.

    Layers that have no kernel run in PyTorch, and so does a whole model that cannot be captured:
    see ``neocog.report``. ``strict``: raise Unsupported instead. InvalidModel for an example
    without a tensor; errors of the model itself are its own.
    """
    if not isinstance(model, nn.Module):
        raise InvalidModel(f"model: expected a torch.nn.Module, got {model!r}")
    args, kwargs = _example(example)
    return Frozen(model, args, kwargs, exact, tune, strict)


def _example(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(example, Tensor):
        return [example], {}
    args, kwargs = ([], example) if isinstance(example, Mapping) else (example, {})
    if not isinstance(args, Sequence) or isinstance(args, str):
        raise InvalidModel(
            f"example: expected a tensor or a sequence of arguments, got {example!r}"
        )
    leaves, _ = tree_flatten((tuple(args), dict(kwargs)))
    if not any(isinstance(v, Tensor) for v in leaves):
        sizes = all(isinstance(v, int) for v in leaves) and leaves
        made = ", ".join(map(str, leaves if len(leaves) != 3 else [1, *leaves]))
        hint = f"; for that shape: torch.zeros({made})" if sizes else ""
        raise InvalidModel(f"example: expected at least one tensor, got {example!r}{hint}")
    return args, kwargs
