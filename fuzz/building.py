"""From a program's steps to the source of a module.

Each step is executed plainly while it is written down, so that later steps know the shapes of what
they read; a step that fails is left out. What comes out is ordinary source text, as a person would
write it: no interpreter stands between the program and what is tested.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import parts
from .program import Draw

LARGEST = 20_000
"""Elements of the largest tensor in a program."""


class Skip(Exception):
    """This step does not fit here."""


@dataclass(frozen=True)
class Operation:
    """A kind of step."""

    weight: float
    write: Callable[[Builder, Draw], None]
    coarse: float = 0.0
    """How far apart right results may be, as a share of the largest value: where numbers are
    rounded to fewer bits on the way."""

    @property
    def name(self) -> str:
        """The name by which steps call it."""
        return self.write.__name__


@dataclass(frozen=True)
class Value:
    """A variable of the program, and what it holds in the trial."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        """Its shape in the trial."""
        return self.tensor.shape


@dataclass
class Region:
    """A ``with`` block that is open, and how many steps are still to go into it."""

    manager: contextlib.AbstractContextManager[Any]
    left: int
    empty: bool = True


class Builder:
    """A module that is being written."""

    def __init__(self, inputs: dict[str, Any], training: bool):
        self.training = training
        self.module = nn.Module().train(training)
        self.scope: dict[str, Any] = {
            "torch": torch, "nn": nn, "F": nn.functional, "parts": parts, "self": self.module,
            **inputs,
        }  # fmt: skip
        self.arguments = list(inputs)
        self.values = [Value(n, t) for n, t in inputs.items() if isinstance(t, Tensor)]
        self.numbers = [name for name, value in inputs.items() if isinstance(value, float)]
        self.setup: list[str] = []
        self.body: list[str] = []
        self.layers: list[str] = []
        self.regions: list[Region] = []
        self._count = 0

    # What steps ask

    def pick(
        self, d: Draw, name: str = "of", fits: Callable[[Tensor], bool] = lambda t: True
    ) -> Value:
        """A value that fits, later ones preferred. Skip if none does."""
        found = [
            v for v in reversed(self.values) if v.tensor.is_floating_point() and fits(v.tensor)
        ]
        if not found:
            raise Skip
        return found[d.number(name, len(found), recent=True)]

    def map(self, d: Draw, name: str = "of", least: int = 1) -> Value:
        """A value of shape (N, C, H, W), at least ``least`` pixels high and wide."""
        return self.pick(d, name, lambda t: t.dim() == 4 and min(t.shape[2:]) >= least)

    def like(self, d: Draw, value: Value, name: str = "with_") -> Value:
        """A value of the same shape and type, itself last."""
        want = value.tensor
        found = [
            v for v in reversed(self.values)
            if v.shape == want.shape and v.tensor.dtype == want.dtype and v.name != value.name
        ] + [value]  # fmt: skip
        return found[d.number(name, len(found))]

    def layer_of(self, d: Draw, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> str:
        """A layer of this kind that exists already. Skip if there is none."""
        found = [n for n in reversed(self.layers) if isinstance(self.get(n), kind)]
        if not found:
            raise Skip
        return found[d.number("layer", len(found))]

    def get(self, expression: str) -> Any:
        """What an expression is in the trial."""
        return eval(expression, self.scope)

    # What steps write

    def name(self, prefix: str) -> str:
        """A name nobody has yet."""
        self._count += 1
        return f"{prefix}{self._count}"

    def prepare(self, line: str) -> None:
        """A line of ``__init__``."""
        exec(line, self.scope)
        self.module.train(self.training)
        self.setup.append(line)

    def layer(self, expression: str) -> str:
        """A new submodule; the expression that reads it."""
        name = f"self.{self.name('m')}"
        self.prepare(f"{name} = {expression}")
        self.layers.append(name)
        return name

    def line(self, line: str) -> None:
        """A line of ``forward``; it may span several."""
        exec(line, self.scope)
        indent = "    " * len(self.regions)
        self.body += [indent + part for part in line.split("\n")]

    def let(self, expression: str) -> Value:
        """A new variable. Skip if its value is too large or no tensor."""
        name = self.name("v")
        self.line(f"{name} = {expression}")
        return self.keep(name)

    def keep(self, name: str) -> Value:
        """A variable that lines have set becomes a value for other steps."""
        tensor = self.scope[name]
        if not isinstance(tensor, Tensor) or not 0 < tensor.numel() <= LARGEST:
            raise Skip
        self.values.append(Value(name, tensor))
        return self.values[-1]

    def open(self, header: str, manager: str, steps: int) -> None:
        """A ``with`` block around the next ``steps`` steps."""
        entered = self.get(manager)
        entered.__enter__()
        self.body.append("    " * len(self.regions) + header)
        self.regions.append(Region(entered, steps + 1))

    # What the program does

    def attempt(self, operation: Operation, d: Draw) -> bool:
        """Write a step. False, and nothing written, if it does not fit or PyTorch refuses it."""
        marks = [(held, len(held)) for held in (self.setup, self.body, self.layers, self.values)]
        depth = len(self.regions)
        try:
            operation.write(self, d)
        except Exception:  # whatever PyTorch says of a step that does not fit
            for held, length in marks:
                del held[length:]
            return False
        for region in self.regions[:depth]:
            region.empty = False
        self._count_down()
        return True

    def _count_down(self) -> None:
        for region in self.regions:
            region.left -= 1
        while self.regions and self.regions[-1].left <= 0:
            self._close()

    def _close(self) -> None:
        region = self.regions.pop()
        region.manager.__exit__(None, None, None)
        if region.empty:
            self.body.append("    " * (len(self.regions) + 1) + "pass")

    def finish(self, result: str) -> str:
        """The source, with what ``forward`` returns."""
        while self.regions:
            self._close()
        setup = ["super().__init__()", *self.setup]
        body = [*self.body, f"return {result}"]
        return "\n".join(
            [
                "class Program(nn.Module):",
                "    def __init__(self):",
                *(f"        {line}" for line in setup),
                "",
                f"    def forward(self, {', '.join(self.arguments)}):",
                *(f"        {line}" for line in body),
                "",
            ]
        )


@contextlib.contextmanager
def clean_state() -> Iterator[None]:
    """Grad mode and the random state are afterwards as they were, whatever failed inside."""
    random_state, mode = torch.get_rng_state(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_rng_state(random_state)
        torch.set_grad_enabled(mode)


def module_of(source: str, seed: int) -> nn.Module:
    """The module that a source defines, with weights drawn from ``seed``."""
    home = types.ModuleType("fuzz_program")  # Dynamo looks a function's globals up by this name
    home.__file__ = f"<program {zlib.crc32(source.encode()):08x}>"
    home.__dict__.update({"torch": torch, "nn": nn, "F": nn.functional, "parts": parts})
    sys.modules[home.__name__] = home
    linecache.cache[home.__file__] = (len(source), None, source.splitlines(True), home.__file__)
    exec(compile(source, home.__file__, "exec"), home.__dict__)
    torch.manual_seed(seed)
    module: nn.Module = home.Program()
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            for parameter in layer.parameters(recurse=False):
                nn.init.uniform_(parameter, 0.5, 1.5)
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None:
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return module
