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

from .capture import argument, capture
from .errors import Unsupported
from .freezing import Frozen
from .parameters import Live
from .reports import Report, report_of
from .running import Plan, Plans, layout_of
from .target import host

log = logging.getLogger("neocog")

OPTIONS = {"strict": False, "exact": False, "tune": False}
"""Options and their defaults. ``strict``: raise instead of running a whole graph in PyTorch;
``exact``: no Winograd, ``tune``: try every algorithm (see :func:`neocog.freeze`)."""

_graphs: weakref.WeakSet[LiveGraph] = weakref.WeakSet()


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
        self._plans = Plans()
        _graphs.add(self)

    def __call__(self, *args: Any) -> Any:
        """The graph's result, a tuple of tensors."""
        # One call at a time: another may come with other weights.
        with self.parameters.lock:
            plan = self._plan_for(args)
            if plan is not None:
                self.parameters.refresh(_named(args))
                return plan.run(args)
        return self.gm(*args)

    def _plan_for(self, args: Sequence[Any]) -> Plan | None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        graded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if graded:
            self.tensors = [weakref.ref(t) for t in tensors]
            self._hand_back("gradients are needed; call it under torch.no_grad()")
            return None
        layout = layout_of([t for t in tensors if not isinstance(t, nn.Parameter)])
        key = (layout, *(_kind(a) for a in args))
        return self._plans.find(key, lambda: self._make(args, layout))

    def _make(self, args: Sequence[Any], layout: str) -> Plan | None:
        self.tensors = [weakref.ref(a) for a in args if isinstance(a, Tensor)]
        device = next((a.device for a in args if _elsewhere(a)), None)
        if device is not None:
            self._hand_back(f"a tensor on {device}; kernels run on the CPU")
            return None
        try:
            captured = capture(self.gm, args)
        except Unsupported as error:
            self._hand_back(str(error))
            return None
        tensors = {**captured.parameters, **_named(args)}
        self.parameters.refresh(tensors)
        self.parameters.tensors = tensors  # all of them, until the plan is made
        plan = Plan.of(
            captured, layout, self.parameters, self.options["exact"], self.options["tune"]
        )
        self.report = report_of(plan)
        log.info("%s", self.report)
        return plan

    def _hand_back(self, reason: str) -> None:
        if self.options["strict"]:
            raise Unsupported(f"{reason} (options strict=True)")
        if self.report.whole != reason:
            self.report = Report(whole=reason)
            log.warning("%s", self.report)


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
