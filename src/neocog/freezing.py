"""neocog.freeze: a model whose weights will not change, compiled for good."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Captured, capture
from .errors import InvalidModel, Unsupported
from .kernels import Sizes
from .parameters import Parameters
from .running import Plan, Plans, layout_of
from .target import host


class Frozen:
    """What :func:`freeze` returns: call it like the model."""

    def __init__(
        self,
        model: nn.Module,
        example: Sequence[Tensor],
        exact: bool = False,
        tune: bool = False,
    ):
        self.model, self.exact, self.tune = model, exact, tune
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(t): name for name, t in tensors}
        self._parameters = Parameters({name: t for name, t in tensors}, host())
        self._plans: Plans[Plan] = Plans()
        self._sizes = Sizes()
        self.plan_for(example)

    @property
    def plans(self) -> list[Plan]:
        """The plans of the shapes it has met, the latest used last."""
        return list(self._plans)

    def plan_for(self, args: Sequence[Tensor]) -> Plan:
        """The plan for arguments of these shapes and layouts; made when they are new."""
        key = tuple([(a.shape, a.stride(), a.dtype) for a in args])
        plan = self._plans.find(key, lambda: self._make(args, key))
        assert plan is not None
        return plan

    def _make(self, args: Sequence[Tensor], key: Hashable) -> Plan:
        if any(m.training for m in self.model.modules()):
            raise InvalidModel("model is in training mode; call model.eval() before neocog.freeze")
        captured = self._capture(args)
        # Tensors a model makes for itself have no name; they are the captured call's own.
        known = self._parameters.tensors
        extra = {n: t for n, t in captured.parameters.items() if n not in known}
        parameters = self._parameters
        if extra:
            parameters = Parameters({**known, **extra}, self._parameters.target)
        with self._sizes.size(key):
            return Plan.of(captured, layout_of(args), parameters, self.exact, self.tune)

    def _capture(self, args: Sequence[Tensor]) -> Captured:
        buffers = dict(self.model.named_buffers())
        replaced = []
        try:
            captured = capture(self.model, args, self._names)
        finally:
            for name, tensor in list(self.model.named_buffers()):
                if buffers.get(name) is not tensor:  # but a tensor without data
                    owner, _, own = name.rpartition(".")
                    setattr(self.model.get_submodule(owner), own, buffers.get(name))
                    replaced.append(name)
        if replaced:
            raise Unsupported(f"the model replaces its buffers {', '.join(replaced)}")
        return captured

    def __call__(self, *args: Tensor) -> Any:
        """The model's result."""
        for i, a in enumerate(args):
            if not isinstance(a, Tensor) or not a.is_cpu:
                raise Unsupported(f"argument {i}: expected a tensor on the CPU, got {a!r}")
        if torch.is_autocast_enabled("cpu"):
            raise Unsupported("autocast: a frozen model computes float32; call it outside")
        return self.plan_for(args).run(args)


def freeze(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    *,
    exact: bool = False,
    tune: bool = False,
) -> Frozen:
    """Compile ``model`` for inference; its weights must not change any more.

    ``model``: in eval mode (InvalidModel otherwise). ``example``: an argument, or a sequence of
    all of them: float32 tensors on the CPU of the shape the model is used with; other shapes are
    compiled when they come. The result takes what the model takes and returns what it returns;
    it computes no gradients. ``exact``: no Winograd, which rounds more (networks' results are off
    by up to some 3e-6 of the largest value instead of 1e-6) and spreads NaN and infinity over tiles
    of up to 6x6; and long sums are cut short. ``tune``: each layer is run with every algorithm that
    covers it, for a second or so in all, and the fastest is kept on disk. Layers that have no
    kernel run in PyTorch: see ``neocog.report``. Unsupported if the model's control flow depends on
    the values of tensors.
    """
    examples = [example] if isinstance(example, Tensor) else list(example)
    return Frozen(model, examples, exact, tune)
