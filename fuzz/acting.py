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
    look,
    module_state,
    process_state,
    random_state,
    sharing,
    tensors_of,
)
from .program import Case


@dataclass
class Run:
    """One run of a case by one engine."""

    case: Case
    source: str
    engine: str
    """``plain`` calls the module itself; else the name of a backend of torch.compile, and
    ``neocog`` freezes with neocog while every other one does not freeze at all."""
    dtype: torch.dtype | None = None
    """None for the type that the case says, mostly float32."""
    calls: int = 99

    def __post_init__(self) -> None:
        self.plan = self.case.plan
        self.dtype = self.dtype or getattr(torch, self.plan.get("dtype", "float32"))
        self.seen: Observation = {}
        self.model = self._prepared()

    def _prepared(self) -> nn.Module:
        model = module_of(self.source, self.case.seed).to(self.dtype)
        # Not where numbers are judged by: PyTorch 2.13 computes a wrong gradient of instance_norm
        # of one image where the gradient that comes is in channels_last.
        if self.plan.get("channels_last") and self.dtype == torch.float32:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        assert self.dtype is not None
        given = arguments(self.case.inputs, call, how, self.case.seed, self.dtype)
        tensors = [i for i, x in enumerate(given) if isinstance(x, Tensor)]
        if len(tensors) > 1 and self.plan.get("aliased"):
            first = given[tensors[0]]
            given[tensors[1]] = first if self.plan["aliased"] == "same" else first.detach()[:, :3]
        if self.plan.get("wrapped"):
            given = [TwoTensor(x, x * 2) if isinstance(x, Tensor) else x for x in given]
        if self.plan.get("dynamic") == "mark" and self.engine != "plain":
            for x in (given[i] for i in tensors):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return given

    def observe(self) -> Observation:
        """Run, and say everything that can be seen."""
        torch.manual_seed(self.case.seed + 1)
        torch.set_num_threads(self.plan.get("threads", 1))
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
            if call:
                meddle(self.model, self.plan.get("between"))
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
            for _ in range(1 + self.plan.get("again", False)):
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
            if loss is None or not loss.requires_grad:
                continue
            if backward in ("sum", "reversed"):
                losses.append(loss)
            elif backward == "grad":
                self._gradients_of(loss, given, name)
            elif backward == "penalty":
                self._gradients_of(loss, given, name, penalty=True)
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
                if isinstance(argument, Tensor) and argument.is_leaf:
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
        numbers = [torch.randn(t.shape, generator=source, dtype=torch.float32) for t in found]
        weighted = [(t * n.to(t)).sum() for t, n in zip(found, numbers, strict=True)]
        return torch.stack([w.to(self.dtype) for w in weighted]).sum() if weighted else None

    def _gradients_of(
        self, loss: Tensor, given: list[Any], name: str, penalty: bool = False
    ) -> None:
        """Gradients by themselves; with a penalty, of a loss that has gradients in it."""
        wanted = [(f"argument {i}", x) for i, x in enumerate(given) if _has_gradient(x)]
        wanted += [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        if not wanted:
            return
        leaves = [t for _, t in wanted]
        found = torch.autograd.grad(loss, leaves, create_graph=penalty, allow_unused=True)
        again = [g.square().sum() for g in found if g is not None and g.requires_grad]
        if penalty and again:
            torch.stack(again).sum().backward()
        for (of, _), gradient in zip(wanted, found, strict=True):
            self.seen.update(look(gradient, f"{name}: gradient of {of}"))

    def _func(self) -> None:
        inside = self.plan.get("where") == "inside"
        model = self.model if inside else self._compiled(self.model)
        transform, of_weight = self.plan.get("transform", "grad"), self.plan.get("of") == "weight"
        transformed = (_of_weight if of_weight else _of_argument)(transform, model)
        function = self._compiled(transformed) if inside else transformed
        for name, given in self._each_call():
            given = [x.detach() for x in given]
            if of_weight:
                given = [next(self.model.parameters()).detach(), *given]
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


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def meddle(model: nn.Module, how: str | None) -> None:
    """Change a module between calls, as training, loading and users do."""
    parameters = dict(model.named_parameters())
    match how:
        case "data":
            for parameter in parameters.values():
                parameter.data.mul_(1.25)
        case "copy":
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.copy_(parameter * 0.75)
        case "load":
            held = {
                k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()
            }
            model.load_state_dict(held)
        case "replace":
            for layer in list(model.modules()):
                if isinstance(layer, nn.Conv2d | nn.Linear) and "weight" in layer._parameters:
                    layer.weight = nn.Parameter(layer.weight.detach() * 0.5)
        case "mode":
            model.train(not model.training)
        case "thaw":
            for parameter in parameters.values():
                parameter.requires_grad_(not parameter.requires_grad)
        case "buffers":
            for buffer in model.buffers():
                buffer.mul_(2)


def _of_argument(transform: str, model: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the arguments: the model's first result, transformed by the first argument."""

    def by_first(x: Tensor, *rest: Any) -> Any:
        one = transform == "vmap"
        return transformed(transform, lambda y: first(model(y[None] if one else y, *rest)), x)

    return by_first


def _of_weight(transform: str, model: nn.Module) -> Callable[..., Any]:
    """The same, transformed by the model's first parameter, which comes first."""

    def by_weight(weight: Tensor, *given: Any) -> Any:
        name = next(n for n, _ in model.named_parameters())

        def f(w: Tensor) -> Tensor:
            return first(torch.func.functional_call(model, {name: w}, given))

        return transformed(transform, f, weight[None] if transform == "vmap" else weight)

    return by_weight


def first(result: Any) -> Tensor:
    """The first tensor of a result."""
    return tensors_of(result)[0]


def transformed(transform: str, f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """One of PyTorch's transformations of a function, applied."""
    match transform:
        case "vmap":
            return torch.func.vmap(f)(x)
        case "jvp":
            return torch.func.jvp(f, (x,), (torch.ones_like(x),))
        case "vjp":
            result, back = torch.func.vjp(f, x)  # type: ignore[misc]
            return result, back(torch.ones_like(result))
        case "dual":
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                both = torch.autograd.forward_ad.unpack_dual(f(dual))
                return both.primal, both.tangent
    return torch.func.grad(lambda y: f(y).sum())(x)
