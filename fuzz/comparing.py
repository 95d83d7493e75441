"""What differs between PyTorch's run of a case and another engine's."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .acting import Run
from .drawing import coarseness, source_of
from .observing import Observation, Seen
from .program import Case

SHARE = 2e-5
"""Share of a tensor's largest value by which a result may be off: Winograd's rounding over some
ten layers. ``EAGER`` times PyTorch's own error in float32 is allowed too, where that is more."""

EAGER = 8.0

OTHERS = 0.1
"""Gradients whose terms cancel (of a bias before a batch norm, zero but for rounding) are judged by
this share of the largest of all gradients of the run."""

ILL = 1e-2
"""A value that PyTorch itself gets wrong by this share in float32 is not compared."""


@dataclass(frozen=True)
class Finding:
    """A difference."""

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} | {self.where} | {self.detail}"


@dataclass(frozen=True)
class Verdict:
    """What became of a case: ``ok``, ``findings``, or ``invalid`` with PyTorch's reason."""

    findings: tuple[Finding, ...] = ()
    invalid: str = ""


def judge(case: Case, engine: str = "neocog", confirm: bool = True) -> Verdict:
    """Run a case in PyTorch, in float64, and by an engine, and compare.

    A wrong number counts if it is wrong for other weights and inputs too: a maximum or a kink may
    fall on either side of rounding by chance, and then on the other side by chance.
    """
    verdict = _judge_once(case, engine)
    if not confirm or not verdict.findings:
        return verdict
    if all(f.kind in ("numbers", "gradient") for f in verdict.findings):
        for other in (1, 2):
            again = _judge_once(replace(case, seed=case.seed + 7919 * other), engine)
            if not again.findings:
                return Verdict()
    return verdict


def judge_fairly(case: Case, engine: str = "neocog") -> Verdict:
    """The same, without what Dynamo alone does to a program: that is PyTorch's own."""
    verdict = judge(case, engine)
    compiled = case.mode != "freeze" or case.plan.get("inside") in ("compiled", "eager")
    if engine == "eager" and any(f.kind == "raises" for f in verdict.findings):
        return Verdict(invalid="Dynamo refuses it")
    if not verdict.findings or not compiled or engine == "eager":
        return verdict
    own = {f.kind for f in judge(case, "eager", confirm=False).findings}
    if "raises" in own:
        return Verdict(invalid="Dynamo refuses it")
    return Verdict(tuple(f for f in verdict.findings if f.kind not in own))


def _judge_once(case: Case, engine: str) -> Verdict:
    with _quiet():
        try:
            source = source_of(case)
            eager, calls = _valid(case, source)
            exact = exactly(case, source, calls)
        except Exception as error:
            return Verdict(invalid=f"{type(error).__name__}: {str(error).splitlines()[:1]}")
        finally:
            _restore()
        if any(_broken(seen) for seen in eager.values()):
            return Verdict(invalid="not finite")
        torch._dynamo.reset()
        try:
            run = Run(case, source, engine, calls=calls)
            other = run.observe()
        except Exception as error:
            if case.plan.get("backward") == "penalty":  # may be refused, must not be wrong
                return Verdict(invalid="no second gradients")
            return Verdict((Finding("raises", _place(error), _first_line(error)),))
        finally:
            _restore()
    found = tuple(differences(case, eager, other, exact))
    if not found and (ill := _ill(case, eager, exact)):
        return Verdict(invalid=f"ill-conditioned: {ill}")
    return Verdict(found)


def _ill(case: Case, eager: Observation, exact: Observation) -> str:
    """The name of a result whose numbers say nothing, if there is one."""
    if coarseness(case):
        return ""
    for name, value in eager.items():
        truth = exact.get(name)
        if ": result" in name and isinstance(value, Seen) and isinstance(truth, Seen):
            if value.data is None or truth.data is None or value.shape != truth.shape:
                return name
            off = float((value.data - truth.data).abs().max()) if value.data.numel() else 0.0
            if off > ILL * _largest(truth):
                return "a result"
    return ""


def _valid(case: Case, source: str) -> tuple[Observation, int]:
    """PyTorch's run, and how many of the calls it can do."""
    planned = len(case.plan.get("calls", ["first"]))
    for calls in range(planned, 1, -1):
        try:
            return Run(case, source, "plain", calls=calls).observe(), calls
        except Exception:
            _restore()
    return Run(case, source, "plain", calls=1).observe(), 1


def exactly(case: Case, source: str, calls: int) -> Observation:
    """The same in float64, with the same weights."""
    run = Run(case, source, "plain", torch.float64, calls)
    torch.set_default_dtype(torch.float64)  # for what the program makes while it runs
    try:
        return run.observe()
    finally:
        torch.set_default_dtype(torch.float32)


def differences(
    case: Case, eager: Observation, other: Observation, exact: Observation
) -> Iterator[Finding]:
    """All that ``other`` has unlike PyTorch's run; numbers are judged by float64's."""
    gradients = max((_largest(v) for k, v in exact.items() if "gradient of" in k), default=0.0)
    coarse = coarseness(case)
    # Whether a checkpoint runs the end of a forward again is nobody's promise.
    twice = case.plan.get("backward") == "checkpoint"
    for name in sorted(eager.keys() | other.keys()):
        if twice and name.startswith("model"):
            continue
        if name not in other or name not in eager:
            missing = "missing" if name not in other else "should not be there"
            yield Finding(_group(name, "structure"), name, missing)
            continue
        want, have = eager[name], other[name]
        if not isinstance(want, Seen) or not isinstance(have, Seen):
            if type(want) is not type(have) or want != have:
                said = tuple(_short(v) for v in (have, want))
                yield Finding(_group(name, "value"), name, f"{said[0]} instead of {said[1]}")
            continue
        for what in ("kind", "shape", "dtype", "device", "strides", "requires_grad"):
            if (
                what == "requires_grad"
                and case.mode == "freeze"
                and case.plan.get("around") == "grad"
            ):
                continue
            one, two = getattr(have, what), getattr(want, what)
            if one != two:
                yield Finding(_group(name, what), name, f"{what} {one} instead of {two}")
        far = _far(name, have, want, exact.get(name), coarse, gradients)
        if far:
            yield Finding(_group(name, "numbers"), name, far)


def _group(name: str, kind: str) -> str:
    """The kind of a finding, by what it is about."""
    if name.startswith("process:"):
        return "process"
    if name.startswith(("model", "after freezing")):
        return "model"
    if ": argument" in name:
        return "argument"
    if "gradient of" in name:
        return "gradient" if kind == "numbers" else f"gradient {kind}"
    if name.endswith((" identity", " memory")):
        return "sharing"
    return kind


def _far(name: str, have: Seen, want: Seen, exact: Any, coarse: float, gradients: float) -> str:
    """By how much numbers are off; empty if they are right."""
    if have.data is None or want.data is None or have.shape != want.shape:
        return ""
    if not want.data.is_floating_point():
        if torch.equal(have.data, want.data):
            return ""
        return f"{int((have.data != want.data).sum())} of {want.data.numel()} differ"
    truth = exact.data if isinstance(exact, Seen) and exact.shape == want.shape else None
    if truth is None or not truth.is_floating_point():
        truth = want.data
    if not want.data.numel():
        return ""
    if not bool(torch.isfinite(have.data).all()):
        return f"{int((~torch.isfinite(have.data)).sum())} of {have.data.numel()} not finite"
    scale = float(truth.abs().max())
    eagers = float((want.data - truth).abs().max())
    ours = float((have.data - truth).abs().max())
    if "gradient of" in name:
        scale, coarse = max(scale, OTHERS * gradients), 5 * coarse
    if not coarse and eagers > ILL * scale:
        return ""
    allowed = max(SHARE * scale, EAGER * eagers, coarse * scale, 1e-30)
    if ours <= allowed:
        return ""
    return f"off by {ours:.2g} of {scale:.2g}, eager by {eagers:.2g}"


def _largest(value: Any) -> float:
    usable = isinstance(value, Seen) and value.data is not None and value.data.numel()
    return float(value.data.abs().max()) if usable else 0.0


def _broken(value: Any) -> bool:
    data: Tensor | None = value.data if isinstance(value, Seen) else None
    return data is not None and data.is_floating_point() and not bool(torch.isfinite(data).all())


def _short(value: Any) -> str:
    text = f"tensor {value.shape}" if isinstance(value, Seen) else str(value)
    return text if len(text) < 120 else text[:117] + "..."


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _place(error: Exception) -> str:
    """The innermost line of neocog that an error passed through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/neocog/" in frame.filename:
            return f"{frame.filename.rpartition('/neocog/')[2]} {frame.name}"
    return "PyTorch"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _restore() -> None:
    """What a run that failed may have left switched on or off."""
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_autocast_enabled("cpu", False)
    torch.set_num_threads(1)
