"""Smaller cases with the same finding: steps and choices are dropped as long as it stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .program import Case, Input


def shrink(case: Case, holds: Callable[[Case], bool], attempts: int = 200) -> Case:
    """The smallest case found for which ``holds`` is true, as it is for ``case``."""
    search = _Search(case, holds, attempts)
    before = None
    while before != search.case and search.left:
        before = search.case
        search.steps()
        search.rest()
    return search.case


@dataclass
class _Search:
    case: Case
    holds: Callable[[Case], bool]
    left: int

    def __post_init__(self) -> None:
        self.tried = {str(self.case)}

    def take(self, smaller: Case) -> bool:
        """Go on with ``smaller`` if it will do."""
        if not self.left or str(smaller) in self.tried:
            return False
        self.tried.add(str(smaller))
        self.left -= 1
        if self.holds(smaller):
            self.case = smaller
            return True
        return False

    def steps(self) -> None:
        """Drop runs of steps, long ones first, from the end."""
        size = max(1, len(self.case.steps) // 2)
        while size:
            start = len(self.case.steps) - size
            while start >= 0:
                steps = self.case.steps
                self.take(replace(self.case, steps=steps[:start] + steps[start + size :]))
                start -= size
            size //= 2

    def rest(self) -> None:
        """Drop everything else that was chosen."""
        if self.case.plan and not self.take(replace(self.case, plan={})):
            for name in self.case.plan:
                self.take(replace(self.case, plan=_without(self.case.plan, name)))
        for fewer in range(1, len(self.case.inputs)):
            if self.take(replace(self.case, inputs=self.case.inputs[:fewer])):
                break
        for i, given in enumerate(self.case.inputs):
            for plainer in _plainer(given):
                inputs = (*self.case.inputs[:i], plainer, *self.case.inputs[i + 1 :])
                if self.take(replace(self.case, inputs=inputs)):
                    break
        for i, (_, chosen) in enumerate(self.case.steps):
            if chosen and not self._step(i, {}):
                for name in chosen:
                    self._step(i, _without(self.case.steps[i][1], name))

    def _step(self, i: int, chosen: dict[str, Any]) -> bool:
        steps = self.case.steps
        return self.take(
            replace(self.case, steps=(*steps[:i], (steps[i][0], chosen), *steps[i + 1 :]))
        )


def _without(chosen: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in chosen.items() if key != name}


def _plainer(given: Input) -> Iterator[Input]:
    plain = Input(given.shape)
    if given != plain:
        yield plain
    for name in ("layout", "data", "grad"):
        changed = replace(given, **{name: getattr(plain, name)})
        if changed != given:
            yield changed
