"""Whose a parameter is: which modules count as layers, and which layer counts each weight.

Every parameter is counted once, by the first layer that an input passes and that holds it: weights
that layers share, those a parametrisation keeps in parts (``torch.nn.utils.parametrizations``), and
those of attention, whose projections are no layers of their own. What a model holds beside its
layers, in itself or in a ``ParameterList``, is listed by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize

from . import nn as neocog_nn

_HOLDERS = (nn.ParameterList, nn.ParameterDict)
"""Modules that only keep parameters for the module they are in; nobody calls them."""


@dataclass(frozen=True)
class Held:
    """A parameter that belongs to no layer: its name, shape and how many numbers it is."""

    name: str
    shape: tuple[int, ...]
    count: int

    @property
    def is_bias(self) -> bool:
        """Whether it is added and not multiplied, by its name."""
        return _is_bias(self.name)


@dataclass(frozen=True)
class Count:
    """The numbers a layer is the first to hold, and the layer whose weights it shares, if any."""

    weights: int
    biases: int
    shared_with: int | None


@dataclass
class Ledger:
    """Which layer, by its number, counted each parameter first."""

    _by: dict[int, int] = field(default_factory=dict)
    _entered: set[nn.Module] = field(default_factory=set)

    def take(self, module: nn.Module, index: int) -> Count:
        """Counts what the layer holds and nobody has counted yet."""
        counts, shared = {True: 0, False: 0}, None
        for name, parameter in module.named_parameters():
            by, bias = self._by.setdefault(id(parameter), index), _is_bias(name)
            if by == index:
                counts[bias] += parameter.numel()
            elif not bias and shared is None:
                shared = by
        self._entered.add(module)
        return Count(counts[False], counts[True], shared)

    def held(self, model: nn.Module) -> list[Held]:
        """What no layer holds, of the modules that the input passed."""
        passed = {model}
        for name, module in model.named_modules():
            if any(part in self._entered for part in module.modules()):
                passed.add(module)
            if isinstance(module, _HOLDERS) and model.get_submodule(_parent(name)) in passed:
                passed.add(module)
        return [
            Held(name, tuple(parameter.shape), parameter.numel())
            for name, parameter in model.named_parameters()
            if id(parameter) not in self._by and model.get_submodule(_parent(name)) in passed
        ]


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that count as layers, with their names, each once."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        whole = _is_whole(module)
        if whole:
            inside.update(part for part in module.modules() if part is not module)
        elif parametrize.is_parametrized(module):
            inside.update(module.parametrizations.modules())
        if whole and module not in inside and not isinstance(module, _HOLDERS):
            yield name or type(module).__name__, module


def _is_whole(module: nn.Module) -> bool:
    """Whether a module is a layer as it stands, whatever it is made of."""
    if isinstance(module, neocog_nn.ConvBlock | nn.MultiheadAttention):
        return True
    parts: Sequence[tuple[str, nn.Module]] = [
        (name, part) for name, part in module.named_children() if not isinstance(part, _HOLDERS)
    ]
    return all(name == "parametrizations" for name, _ in parts)


def _is_bias(name: str) -> bool:
    """By the name of the parameter, or of what a parametrisation makes of it."""
    parts = name.split(".")
    own = parts.index("parametrizations") + 1 if "parametrizations" in parts else len(parts) - 1
    return parts[own].startswith("bias") or parts[own].endswith("bias")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
