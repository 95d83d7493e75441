"""Calling a program as a user would: plainly, frozen, compiled, differentiated, transformed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import neocog

from .building import module_of
from .inputs import arguments
from .observing import (
    Observation,
    leaves,
    look,
    module_state,
    process_state,
    random_state,
    sharing,
    tensors_of,
)
from .program import Case


class Invalid(Exception):
    """PyTorch itself refuses the program."""


@dataclass
class Run:
    """One run of a case by one engine."""

    case: Case
    source: str
    engine: str
    """``plain`` calls the module itself; else the name of a backend of torch.compile, and
    ``neocog`` freezes with neocog while every other one does not freeze at all."""
    dtype: torch.dtype = torch.float32
    calls: int = 99

    def __post_init__(self) -> None:
        self.plan = self.case.plan
        self.seen: Observation = {}
        self.model = self._prepared()

    def _prepared(self) -> nn.Module:
        model = module_of(self.source, self.case.seed).to(self.dtype)
        if self.plan.get("channels_last"):
            model = model.to(memory_format=torch.channels_last)
        model.train(self.plan.get("training", self.case.mode == "train"))
        if self.plan.get("still_norms"):
            for layer in model.modules():
                if isinstance(layer, nn.modules.batchnorm._NormBase):
                    layer.eval()
        parameters = list(model.parameters())
        if each := self.plan.get("freeze_some"):
            for i, parameter in enumerate(parameters):
                parameter.requires_grad_(parameter.requires_grad and i % each > 0)
        if self.plan.get("negative_weight") and parameters:
            weight = parameters[0]
            weight.data = torch.complex(weight.data, -weight.data).conj().imag
        return model

    def arguments(self, call: int) -> list[Any]:
        """The arguments of a call."""
        how = self.plan.get("calls", ["first"])[call]
        given = arguments(self.case.inputs, call, how, self.case.seed, self.dtype)
        if self.plan.get("wrapped"):
            given = [TwoTensor(x, x * 2) for x in given]
        if self.plan.get("dynamic") == "mark" and self.engine != "plain":
            for x in given:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return given

    def observe(self) -> Observation:
        """Run, and say everything that can be seen."""
        torch.manual_seed(self.case.seed + 1)
        modes: dict[str, Callable[[], None]] = {
            "freeze": self._freeze, "eval": self._eval, "train": self._train, "func": self._func,
        }  # fmt: skip
        modes[self.case.mode]()
        self.seen.update(module_state(self.model))
        self.seen.update(process_state())
        self.seen.update(random_state())
        return self.seen

    # The ways

    def _compiled(self, function: Callable[..., Any], fullgraph: bool = False) -> Any:
        if self.engine == "plain":
            return function
        dynamic = True if self.plan.get("dynamic") is True else None
        return torch.compile(function, backend=self.engine, dynamic=dynamic, fullgraph=fullgraph)

    def _each_call(self) -> Iterator[tuple[str, list[Any]]]:
        for call in range(min(self.calls, len(self.plan.get("calls", ["first"])))):
            yield f"call {call}", self.arguments(call)

    def _look(self, name: str, given: list[Any], result: Any) -> None:
        self.seen.update(look(result, f"{name}: result"))
        self.seen.update(sharing(given, result, f"{name}:"))
        for i, argument in enumerate(given):
            self.seen.update(look(argument, f"{name}: argument {i}"))

    def _around(self) -> contextlib.AbstractContextManager[Any]:
        match self.plan.get("around", "no_grad"):
            case "inference":
                return torch.inference_mode()
            case "grad" if self.engine == "neocog":
                return contextlib.nullcontext()
            case "set_grad_enabled":
                return torch.set_grad_enabled(False)
        return torch.no_grad()

    def _freeze(self) -> None:
        example = self.arguments(0)
        function: Any = self.model
        if self.engine == "neocog":
            function = neocog.freeze(self.model, example, exact=self.plan.get("exact", False))
        self.seen.update(module_state(self.model, "after freezing"))
        self.seen.update({f"after freezing, {k}": v for k, v in random_state().items()})
        for i, argument in enumerate(example):
            self.seen.update(look(argument, f"after freezing: argument {i}"))
        match self.plan.get("inside", ""):
            case "module":
                frozen, function = function, _Outer(function)
            case "compiled" | "eager" as inside if self.engine != "plain":
                frozen = function
                backend = "eager" if inside == "eager" else self.engine
                function = torch.compile(lambda *x: frozen(*x), backend=backend)
        for name, given in self._each_call():
            with self._around():
                result = function(*given)
            self._look(name, given, result)
        # The module itself is as good as before.
        with torch.no_grad():
            self.seen.update(look(self.model(*self.arguments(0)), "afterwards: result"))

    def _eval(self) -> None:
        function = self._compiled(self.model, self.plan.get("fullgraph", False))
        for name, given in self._each_call():
            with self._around():
                result = function(*given)
            self._look(name, given, result)

    def _train(self) -> None:
        backward = self.plan.get("backward", "each")
        losses: list[Tensor] = []
        inside = backward == "inside"
        function = self._compiled(self._whole_step if inside else self.model)
        optimizer = None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if backward == "sgd" and trained:
            optimizer = torch.optim.SGD(trained, lr=0.01)
        everything: list[Any] = []
        for name, given in self._each_call():
            if backward == "checkpoint":
                result = torch.utils.checkpoint.checkpoint(function, *given, use_reentrant=False)
            else:
                result = function(*given)
            self._look(name, given, result)
            everything.append((name, given))
            loss = None if inside else self._loss(result)
            if loss is None:
                continue
            if backward in ("sum", "reversed"):
                losses.append(loss)
            elif backward == "grad":
                self._gradients_of(loss, given, name)
            else:
                loss.backward(retain_graph=backward == "twice")
                if backward == "twice":
                    loss.backward()
            if optimizer:
                optimizer.step()
                optimizer.zero_grad()
        if backward == "sum" and losses:
            torch.stack(losses).sum().backward()
        for loss in reversed(losses) if backward == "reversed" else []:
            loss.backward()
        for name, given in everything:
            for i, argument in enumerate(given):
                self.seen.update(look(argument.grad, f"{name}: gradient of argument {i}"))
        for path, parameter in self.model.named_parameters():
            self.seen.update(look(parameter.grad, f"gradient of {path}"))

    def _whole_step(self, *given: Any) -> Any:
        result = self.model(*given)
        loss = sum(
            (t * 0.7).sum() for t in _differentiable(result)
        )  # no numbers drawn inside: Dynamo would draw them in another order
        if isinstance(loss, Tensor):
            loss.backward()
        return loss

    def _loss(self, result: Any) -> Tensor | None:
        """A sum of the results with random weights; None if nothing has gradients."""
        found = _differentiable(result)
        if self.plan.get("backward") == "some":
            found = found[:1]
        source = torch.Generator().manual_seed(self.case.seed)
        weighted = [(t * torch.randn(t.shape, generator=source).to(t)).sum() for t in found]
        return torch.stack([w.to(self.dtype) for w in weighted]).sum() if weighted else None

    def _gradients_of(self, loss: Tensor, given: list[Any], name: str) -> None:
        wanted = [(f"argument {i}", x) for i, x in enumerate(given) if x.requires_grad]
        wanted += [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        if not wanted:
            return
        found = torch.autograd.grad(loss, [t for _, t in wanted], allow_unused=True)
        for (of, _), gradient in zip(wanted, found, strict=True):
            self.seen.update(look(gradient, f"{name}: gradient of {of}"))

    def _func(self) -> None:
        inside = self.plan.get("where") == "inside"
        model = self.model if inside else self._compiled(self.model)
        transformed = _transformed(self.plan.get("transform", "grad"), model)
        function = self._compiled(transformed) if inside else transformed
        for name, given in self._each_call():
            given = [x.detach() for x in given]
            self.seen.update(look(function(*given), f"{name}: result"))


class _Outer(nn.Module):
    """A module around a frozen model."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any) -> Any:
        return self.inner(*given)


def _differentiable(result: Any) -> list[Tensor]:
    unique: list[Tensor] = []
    for t in tensors_of(result):
        if t.requires_grad and t.is_floating_point() and not any(t is u for u in unique):
            unique.append(t)
    return unique


def _transformed(transform: str, model: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the arguments: the model's first result, transformed by its first argument."""

    def first(*given: Any) -> Tensor:
        return tensors_of(model(*given))[0]

    def by_first(x: Tensor, *rest: Any) -> Any:
        def f(y: Tensor) -> Tensor:
            return first(y, *rest)

        match transform:
            case "vmap":
                return torch.func.vmap(lambda y: f(y[None]))(x)
            case "jvp":
                return torch.func.jvp(f, (x,), (torch.ones_like(x),))
            case "vjp":
                result, back = torch.func.vjp(f, x)
                return result, back(torch.ones_like(result))
            case "dual":
                with torch.autograd.forward_ad.dual_level():
                    dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                    both = torch.autograd.forward_ad.unpack_dual(f(dual))
                    return both.primal, both.tangent
        return torch.func.grad(lambda y: f(y).sum())(x)

    return by_first


__all__ = ["Invalid", "Run", "leaves"]
