"""torch.compile(model, backend="neocog"): PyTorch finds this module by its entry point.

https://docs.pytorch.org/docs/stable/torch.compiler_custom_backends.html
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .capture import Calls, Captured, argument, capture
from .errors import Unsupported
from .freezing import Frozen
from .kernels import Sizes
from .layer_calls import CALLS
from .learning import LearningPlan
from .ops import SPELLED_OUT
from .parameters import Live
from .reports import Report, report_of
from .running import Plan, Plans, layout_of
from .target import host
from .training_calls import TRAINING_CALLS

log = logging.getLogger("neocog")

OPTIONS = {"strict": False, "exact": False, "tune": False}
"""Options and their defaults. ``strict``: raise instead of running a whole graph in PyTorch;
``exact``: no Winograd, ``tune``: try every algorithm (see :func:`neocog.freeze`)."""

_graphs: weakref.WeakSet[LiveGraph] = weakref.WeakSet()

_sizes, _learning_sizes = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
"""The sizes a model has met, by its first parameter: Dynamo makes a graph for each."""


def neocog(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; weights stay live.

    ValueError for a mode or an option it does not know. What has no kernel runs in PyTorch, and
    stands in ``neocog.report(compiled)`` and in the log ("neocog") with the reason.
    """
    if mode not in (None, "default"):
        raise ValueError(f"mode must be None or 'default', got {mode!r}")
    given = dict(options or {})
    unknown = sorted(given.keys() - OPTIONS.keys())
    if unknown:
        raise ValueError(f"options: unknown {unknown}, expected some of {sorted(OPTIONS)}")
    return LiveGraph(gm, {**OPTIONS, **given})


class LiveGraph:
    """A graph whose parameters arrive, like its inputs, with every call."""

    def __init__(self, gm: fx.GraphModule, options: Mapping[str, Any]):
        self.gm, self.options = gm, options
        self.parameters = Live({}, host())
        self.tensors: list[weakref.ref[Tensor]] = []
        self.report = Report(whole="it has not been called yet")
        self._plans: Plans[Plan] = Plans()
        self._learning: Plans[LearningPlan] = Plans()
        _graphs.add(self)

    def __call__(self, *args: Any) -> Any:
        """The graph's result, a tuple of tensors."""
        # One call at a time: another may come with other weights.
        tensors = [a for a in args if isinstance(a, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return self._learn(args, tensors)
        with self.parameters.lock:
            plan = self._plan_for(args)
            if plan is not None:
                self.parameters.refresh(_named(args))
                return plan.run(args)
        return self.gm(*args)

    def _plan_for(self, args: Sequence[Any]) -> Plan | None:
        key = self._key(args)
        return self._plans.find(key, lambda: self._make(args, key[0]))

    def _key(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The layout, and all that plans depend on."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        layout = layout_of([t for t in tensors if not isinstance(t, nn.Parameter)])
        return (layout, *(_kind(a) for a in args))

    def _learn(self, args: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
        """A call with gradients to come."""
        key = self._key(args)
        with self.parameters.lock:
            plan = self._learning.find(key, lambda: self._make_learning(args, key[0]))
        return self.gm(*args) if plan is None else plan.run(args)

    def _make_learning(self, args: Sequence[Any], layout: str) -> LearningPlan | None:
        captured = self._captured(args, TRAINING_CALLS)
        if captured is None:
            return None
        tensors = {**captured.parameters, **_named(args)}
        with _sizes_of(args, _learning_sizes).size(self._key(args)):
            plan = LearningPlan.of(captured, layout, host(), self.options["exact"], tensors)
        self.report = report_of(plan)
        log.info("%s", self.report)
        return plan

    def _make(self, args: Sequence[Any], layout: str) -> Plan | None:
        captured = self._captured(args, CALLS)
        if captured is None:
            return None
        tensors = {**captured.parameters, **_named(args)}
        self.parameters.refresh(tensors)
        self.parameters.tensors = tensors  # all of them, until the plan is made
        exact, tune = self.options["exact"], self.options["tune"]
        with _sizes_of(args, _sizes).size(self._key(args)):
            plan = Plan.of(captured, layout, self.parameters, exact, tune)
        self.report = report_of(plan)
        log.info("%s", self.report)
        return plan

    def _captured(self, args: Sequence[Any], calls: Calls) -> Captured | None:
        """The graph as a network; None, with the reason reported, if PyTorch has to run it."""
        self.tensors = [weakref.ref(a) for a in args if isinstance(a, Tensor)]
        device = next((a.device for a in args if _elsewhere(a)), None)
        if device is not None:
            self._hand_back(f"a tensor on {device}; kernels run on the CPU")
            return None
        try:
            return capture(self.gm, args, calls=calls, spelled_out=SPELLED_OUT)
        except Unsupported as error:
            self._hand_back(str(error))
            return None

    def _hand_back(self, reason: str) -> None:
        if self.options["strict"]:
            raise Unsupported(f"{reason} (options strict=True)")
        if self.report.whole != reason:
            self.report = Report(whole=reason)
            log.warning("%s", self.report)


def _sizes_of(args: Sequence[Any], known: WeakTensorKeyDictionary) -> Sizes:
    first = next((a for a in args if isinstance(a, nn.Parameter)), None)
    if first is None:
        return Sizes()
    if first not in known:
        known[first] = Sizes()
    found: Sizes = known[first]
    return found


def _named(args: Sequence[Any]) -> dict[str, Tensor]:
    return {argument(i): a for i, a in enumerate(args) if isinstance(a, Tensor)}


def _kind(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _elsewhere(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def report(compiled: Any) -> list[Report]:
    """What neocog made of a frozen model, or of what ``torch.compile(..., backend="neocog")`` gave.

    One report per graph (Dynamo may cut a model into several), of its last new shape. Empty if it
    has not been called yet. ValueError for anything else.
    """
    if isinstance(compiled, Frozen):
        return [report_of(plan) for plan in compiled.plans]
    if not isinstance(compiled, nn.Module):
        raise ValueError(f"compiled: expected a frozen or compiled model, got {type(compiled)}")
    own = {id(t) for t in (*compiled.parameters(), *compiled.buffers())}
    return [
        graph.report
        for graph in _graphs
        if any(id(tensor()) in own for tensor in graph.tensors)
    ]  # fmt: skip
