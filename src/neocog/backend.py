"""torch.compile(model, backend="neocog"): PyTorch finds this module by its entry point.

https://docs.pytorch.org/docs/stable/torch.compiler_custom_backends.html
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import Unsupported
from .facts import grads_are_kept
from .freezing import Frozen
from .guard import interrupted, plain, sharing, why_not
from .kernels import Sizes
from .ops import spell_out
from .parameters import Live
from .propagation import observe
from .reports import Report, Reports, report_of
from .rewriting import Rewritten, Setting, rewrite
from .running import Plans, choice
from .target import host

log = logging.getLogger("neocog")

OPTIONS = {"strict": False, "exact": False, "tune": False}
"""Options and their defaults. ``strict``: raise instead of running a whole graph in PyTorch;
``exact``: no Winograd, ``tune``: try every algorithm (see :func:`neocog.freeze`)."""

_graphs: weakref.WeakValueDictionary[int, LiveGraph] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_sizes = {graded: WeakTensorKeyDictionary() for graded in (True, False)}
"""The sizes a model has met, by its first parameter, in training and at inference: Dynamo makes a
graph for each."""


def neocog(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; weights stay live.

    ValueError for a mode or an option it does not know. What has no kernel runs in PyTorch, and
    is listed in ``neocog.report(compiled)`` and in the log ("neocog") with the reason.
    """
    if mode not in (None, "default"):
        raise ValueError(f"mode must be None or 'default', got {mode!r}")
    given = dict(options or {})
    unknown = sorted(given.keys() - OPTIONS.keys())
    if unknown:
        raise ValueError(f"options: unknown {unknown}, expected some of {sorted(OPTIONS)}")
    return LiveGraph(gm, {**OPTIONS, **given})


@dataclass(frozen=True)
class _Plan:
    """A graph for arguments of one kind."""

    rewritten: Rewritten | None
    """None if PyTorch runs the graph as it is."""
    report: Report
    shared: tuple[int, ...] | None = None
    """Which arguments share memory, where the graph writes to some."""


class LiveGraph:
    """A graph whose parameters arrive, like its inputs, with every call."""

    def __init__(self, gm: fx.GraphModule, options: Mapping[str, Any]):
        self.gm, self.options = gm, options
        spell_out(gm)
        self.names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        self.parameters = Live({}, host())
        self.tensors: list[weakref.ref[Tensor]] = []
        self.origin = _Origin.of_this_frame()
        self.report = Report(whole="it has not been called yet")
        self._plans: Plans[_Plan] = Plans()
        _graphs[next(_numbers)] = self

    def __call__(self, *args: Any) -> Any:
        """The graph's result, a tuple of tensors."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        if interrupted() is not None or not all(map(_usual, args)):
            self._leave(args)
            return self.gm(*args)
        graded = grads_are_kept() and any(t.requires_grad for t in tensors)
        key = (graded, *(_kind(a) for a in args))
        # One call at a time: another may come with other weights.
        with self.parameters.lock:
            plan = self._plans.find(key, lambda: self._make(args, key))
            if plan.shared is not None and plan.shared != sharing(tensors):
                other = (*key, sharing(tensors))
                plan = self._plans.find(other, lambda: self._make(args, other))
            made = plan.rewritten
            if made is None:
                return self.gm(*args)
            if made.infers:
                self.parameters.refresh(self._named(args))
                return made.run(*args)
        return made.run(*args)

    def _named(self, args: Sequence[Any]) -> dict[str, Tensor]:
        pairs = zip(self.names, args, strict=True)
        return {name: a.detach() for name, a in pairs if isinstance(a, Tensor)}

    def _make(self, args: Sequence[Any], key: tuple[Any, ...]) -> _Plan:
        self.tensors = [weakref.ref(a) for a in args if isinstance(a, Tensor)]
        try:
            observe(self.gm, args)
            tensors = self._named(args)
            self.parameters.refresh(tensors)
            self.parameters.tensors = tensors  # all of them, until the plan is made
            exact, target = self.options["exact"], self.parameters.target
            choose = choice(target, exact, self.options["tune"])
            setting = Setting(self.parameters, choose, exact, tensors, self._inside)
            with _sizes_of(args, graded=key[0]).size(key):
                made = rewrite(self.gm, setting)
        except Unsupported as error:
            return _Plan(None, self._hand_back(str(error)))
        self.report = report_of(made)
        log.info("%s", self.report)
        shared = sharing(list(tensors.values())) if made.writes_outside else None
        return _Plan(made, self.report, shared)

    def _inside(self, gm: fx.GraphModule) -> Callable[..., Any]:
        """A graph that an operator of this one calls."""
        return LiveGraph(gm, self.options)

    def _leave(self, args: Sequence[Any]) -> None:
        """Say why PyTorch runs this call."""
        self.tensors = [weakref.ref(a) for a in args if isinstance(a, Tensor)]
        odd = next((a for a in args if not _usual(a)), None)
        reason = why_not(odd) if isinstance(odd, Tensor) else f"an argument of type {type(odd)}"
        self._hand_back(interrupted() or str(reason))

    def _hand_back(self, reason: str) -> Report:
        if self.options["strict"]:
            raise Unsupported(f"{reason} (options strict=True)")
        if self.report.whole != reason:
            self.report = Report(whole=reason)
            log.warning("%s", self.report)
        return self.report


def _sizes_of(args: Sequence[Any], graded: bool) -> Sizes:
    first, known = next((a for a in args if isinstance(a, nn.Parameter)), None), _sizes[graded]
    if first is None:
        return Sizes()
    if first not in known:
        known[first] = Sizes()
    found: Sizes = known[first]
    return found


def _usual(value: Any) -> bool:
    """Whether a graph with such an argument can be compiled."""
    if isinstance(value, Tensor):
        return plain(value)
    return value is None or isinstance(value, bool | int | float | str)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.requires_grad
    return type(value), value


@dataclass(frozen=True)
class _Origin:
    """The Python that a graph was captured from."""

    owner: weakref.ref[nn.Module] | None = None
    """Whose method it is."""
    file: str = ""
    function: str = ""

    @classmethod
    def of_this_frame(cls) -> _Origin:
        """Of what Dynamo is capturing in this thread (names of PyTorch 2.13)."""
        try:
            frame = InstructionTranslator.current_tx().output.root_tx
            code, local = frame.f_code, frame.f_locals
        except AttributeError:  # nothing is: somebody calls the backend by hand
            return cls()
        called = local.get("fn") if code.co_name == "inner" else None  # PyTorch's, around modules
        owner = called if isinstance(called, nn.Module) else local.get("self")
        code = getattr(called, "__code__", code)
        found = weakref.ref(owner) if isinstance(owner, nn.Module) else None
        return cls(found, code.co_filename, code.co_name)

    def is_of(self, compiled: Any, modules: Collection[int]) -> bool:
        """Whether it belongs to a function, or to one of these modules."""
        if self.owner is not None:
            return id(self.owner()) in modules
        code = getattr(getattr(compiled, "__wrapped__", compiled), "__code__", None)
        if code is None or self.file != code.co_filename:
            return False
        # What comes behind a cut of the graph is a function of its own, named after the first.
        return self.function == code.co_name or f"_in_{code.co_name}_at_" in self.function


def report(compiled: Any) -> Reports:
    """What neocog made of a frozen model, or of what ``torch.compile(..., backend="neocog")`` gave.

    One report per graph (Dynamo may cut a model into several), of its last new shape. Empty if it
    has not been called yet. ValueError for anything else.
    """
    if isinstance(compiled, Frozen):
        return Reports(compiled.reports)
    original = getattr(compiled, "_orig_mod", getattr(compiled, "_torchdynamo_orig_callable", None))
    if original is None and not isinstance(compiled, nn.Module):
        raise ValueError(f"compiled: expected a frozen or compiled model, got {type(compiled)}")
    own: set[int] = set()
    modules: set[int] = set()
    if isinstance(compiled, nn.Module):
        own = {id(t) for t in (*compiled.parameters(), *compiled.buffers())}
        modules = {id(m) for m in compiled.modules()}
        original = compiled if original is None else original
        original = original.forward
    return Reports(
        graph.report
        for _, graph in sorted(_graphs.items())
        if any(id(tensor()) in own for tensor in graph.tensors)
        or graph.origin.is_of(original, modules)
    )
