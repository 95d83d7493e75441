"""Programs as data. A case prints as one line of JSON, and runs again from it."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Step = tuple[str, dict[str, Any]]
"""The name of an operation and what was chosen for it."""


@dataclass(frozen=True)
class Input:
    """A tensor that a program is called with."""

    shape: tuple[int, ...]
    layout: str = "dense"
    data: str = "normal"
    grad: bool = False


@dataclass(frozen=True)
class Case:
    """A program, and how it is called."""

    seed: int
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    mode: str
    plan: dict[str, Any] = field(default_factory=dict)
    """How the module is prepared and called: what was chosen, as for a step."""

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that prints as ``text``. ValueError if none does."""
        try:
            found = json.loads(text)
            inputs = tuple(Input(**{**i, "shape": tuple(i["shape"])}) for i in found["inputs"])
            steps = tuple((name, chosen) for name, chosen in found["steps"])
            return cls(**{**found, "inputs": inputs, "steps": steps})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"case: expected a line that the fuzzer printed, got {text!r}"
            ) from error

    @property
    def size(self) -> tuple[int, int]:
        """What shrinking makes smaller: steps, then everything that was chosen."""
        return len(self.steps), len(str(self))


class Draw:
    """Choices: made at random and recorded, or read again from a record.

    A record that says nothing about a choice, or something that is no option any more, means the
    first option: the plainest by convention. So steps can be dropped around a step.
    """

    def __init__(self, rng: random.Random | None, chosen: dict[str, Any] | None = None):
        self.rng = rng
        self.chosen: dict[str, Any] = {} if chosen is None else chosen
        self.used: dict[str, Any] = {}

    def __call__(self, name: str, options: Sequence[Any], plain: float = 0.0) -> Any:
        """One of ``options``; with probability ``plain`` the first."""
        if self.rng is None:
            # JSON knows no tuples: options are found by how they print.
            known = {json.dumps(option): option for option in options}
            value = known.get(json.dumps(self.chosen.get(name, options[0])), options[0])
        elif self.rng.random() < plain:
            value = options[0]
        else:
            value = self.rng.choice(options)
        if value != options[0]:
            self.used[name] = value
        return value

    def number(self, name: str, below: int, recent: bool = False) -> int:
        """A number from 0 to ``below`` - 1; small ones preferred if ``recent``."""
        if self.rng is None:
            value = int(self.chosen.get(name, 0)) % below
        elif recent and self.rng.random() < 0.6:
            value = 0
        else:
            value = self.rng.randrange(below)
        if value:
            self.used[name] = value
        return value

    def chance(self, name: str, probability: float) -> bool:
        """True with this probability."""
        if self.rng is None:
            value = bool(self.chosen.get(name, False))
        else:
            value = self.rng.random() < probability
        if value:
            self.used[name] = True
        return value
