"""Programs at the border with PyTorch: run in each way neocog knows, and compared with eager.

Both sides get copies of one model and of its arguments. Compared are results (structure, values,
strides, whether they require gradients), gradients, and what a call leaves behind: arguments,
parameters, buffers, PyTorch's stream of random numbers.
"""

from __future__ import annotations

import copy
import functools
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest
import tiny_networks as tn
import torch
import torch._dynamo  # takes seconds, which every fork of `alone` would spend anew
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import neocog

BOUND = 5e-6
"""Of the largest value: what float32 in another order of sums, and Winograd, may differ by."""
GRADIENTS = 2e-5
"""The same for gradients, which pass through every layer twice."""

WAYS = ("freeze", "compile", "train")
"""``neocog.freeze``; ``torch.compile`` without gradients; ``torch.compile``, a training step."""
ways = pytest.mark.parametrize("way", WAYS)
inference = pytest.mark.parametrize("way", WAYS[:2])


def net(flow: Callable[..., object], **layers: nn.Module) -> nn.Module:
    """Two convolutions, ``a`` from 3 to 4 channels and ``b`` from 4 to 2, others, and a flow."""
    torch.manual_seed(0)
    return tn.Net(flow, **({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 2, 1)} | layers))


def maps(*shape: int, seed: int = 3) -> Tensor:
    """Normal numbers; maps of 8x8 with 3 channels unless ``shape`` says otherwise."""
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(seed))


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """By Dynamo as it is after a reset: it counts recompilations over all of a process."""
    torch._dynamo.reset()
    return torch.compile(function, backend="neocog", **options)


def ready(model: nn.Module, way: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The model in the mode of ``way``, and what is to be called instead of it."""
    model.train(way == "train")
    return neocog.freeze(model, args) if way == "freeze" else compiled(model)


# -------------------------------------------------------------------------------- a call, observed


@dataclass
class Outcome:
    """All that a call gives and leaves behind."""

    result: Any
    args: tuple[Any, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Parameters and buffers afterwards."""
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    random: Tensor | None = None


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a result."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def loss(result: Any) -> Tensor:
    """A number that depends on each value that has gradients in a way of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for i, out in enumerate(leaves(result)):
        if out.requires_grad:
            weights = torch.linspace(-1, 1 + i, out.numel(), dtype=torch.float64)
            total = total + (out.double() * weights.reshape(out.shape)).sum()
            total = total + 0.1 * (out.double() ** 2).sum()
    return total


def observe(
    call: Callable[..., Any], args: tuple[Any, ...], model: nn.Module | None, gradients: bool
) -> Outcome:
    """Call it on copies of ``args``, which may share memory with one another."""
    given = copy.deepcopy(args)
    torch.manual_seed(7)
    with torch.set_grad_enabled(gradients):
        made = Outcome(call(*given), given)
        if gradients and (total := loss(made.result)).requires_grad:
            total.backward()
    made.random = torch.get_rng_state()
    made.gradients = {f"argument {i}": a.grad for i, a in enumerate(given)
                      if isinstance(a, Tensor) and a.is_leaf}  # fmt: skip
    if model is not None:
        made.tensors = {n: t.detach() for n, t in model.state_dict().items()}
        made.gradients |= {name: p.grad for name, p in model.named_parameters()}
    return made


# -------------------------------------------------------------------------------------- comparing


def strides(t: Tensor) -> list[int]:
    """Those that say something: along axes of more than one place."""
    return [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] if t.numel() else []


def equal(
    made: Any, wanted: Any, what: str = "result", bound: float = BOUND, least: float = 1e-3
) -> None:
    """Asserts that a tensor is the other but for rounding: kind, shape, strides, values."""
    if not isinstance(wanted, Tensor) or not isinstance(made, Tensor):
        assert made is wanted or made == wanted, f"{what}: {made!r}, eager {wanted!r}"
        return
    assert type(made) is type(wanted), f"{what}: {type(made)}, eager {type(wanted)}"
    kind, eager = [(t.dtype, t.device, t.shape, t.requires_grad) for t in (made, wanted)]
    assert kind == eager, f"{what}: {kind}, eager {eager}"
    assert strides(made) == strides(wanted), f"{what}: {made.stride()}, eager {wanted.stride()}"
    if not wanted.dtype.is_floating_point:
        assert torch.equal(made, wanted), what
    elif wanted.numel():
        made, wanted = made.detach().double(), wanted.detach().double()
        assert torch.equal(made.isnan(), wanted.isnan()), f"{what}: NaN in other places"
        error = (made - wanted).abs().nan_to_num().max()
        most = wanted.abs().nan_to_num(0, 0, 0).max().clamp(min=least)
        assert error <= bound * most, f"{what}: off by {error:.2e} of {most:.2e}"


def same_results(made: Any, wanted: Any, bound: float = BOUND, what: str = "result") -> None:
    """Of one structure, and every leaf equal."""
    ours, ours_structure = pytree.tree_flatten(made)
    eager, structure = pytree.tree_flatten(wanted)
    assert ours_structure == structure
    for i, (a, b) in enumerate(zip(ours, eager, strict=True)):
        equal(a, b, f"{what} {i}", bound)


def same(made: Outcome, wanted: Outcome, bound: float = BOUND) -> None:
    """Asserts that a call has given and left behind what eager's has."""
    same_results(made.result, wanted.result, bound)
    same_results(made.args, wanted.args, bound, "argument")
    assert made.tensors.keys() == wanted.tensors.keys()
    for name, t in wanted.tensors.items():
        equal(made.tensors[name], t, name, bound)
    # A bias before a batch norm has no gradient but for the rounding of the others'.
    found = [float(g.abs().max()) for g in wanted.gradients.values() if g is not None and g.numel()]
    least = max([1e-3, *(0.02 * g for g in found)])
    for name, g in wanted.gradients.items():
        own = made.gradients[name]
        assert (own is None) == (g is None), f"gradient of {name}: {_has(own)}, eager {_has(g)}"
        equal(own, g, f"gradient of {name}", max(bound, GRADIENTS), least)
    assert made.random is not None and wanted.random is not None
    assert torch.equal(made.random, wanted.random), "the stream of random numbers"


def _has(gradient: Tensor | None) -> str:
    return "None" if gradient is None else f"one of at most {gradient.abs().max():.2g}"


def check(model: nn.Module, *args: Any, way: str, bound: float = BOUND) -> Callable[..., Any]:
    """Asserts that ``model``, run in a way, does twice what eager does; returns what was run.

    ``args`` must be leaves. The second call meets what the first one has left behind.
    """
    eager, model, gradients = copy.deepcopy(model), copy.deepcopy(model), way == "train"
    eager.train(gradients)
    call = ready(model, way, copy.deepcopy(args))
    for _ in range(2):
        wanted = observe(eager, args, eager, gradients)
        same(observe(call, args, model, gradients), wanted, bound)
        eager.zero_grad()
        model.zero_grad()
    return call


def check_function(
    function: Callable[..., Any], *args: Any, gradients: bool = True, **options: Any
) -> None:
    """The same for a function of tensors under ``torch.compile``."""
    wanted = observe(function, args, None, gradients)
    same(observe(compiled(function, **options), args, None, gradients), wanted)


def programs(call: Any) -> int:
    """How many native programs the report of its last graph or shape counts, at most."""
    return max((r.programs for r in neocog.report(call)), default=0)


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Asserts that what runs inside changes nothing of the model, nor of the random numbers."""
    before = _all_of(model)
    yield
    after = _all_of(model)
    assert after.keys() == before.keys(), after.keys() ^ before.keys()
    for name, (value, content) in before.items():
        assert after[name][0] is value, f"{name} is another object"
        assert _unchanged(after[name][1], content), f"{name} has changed"


def _all_of(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every attribute of every submodule, those in its dictionaries one by one: object, content."""
    found: dict[str, tuple[Any, Any]] = {"random": (None, torch.get_rng_state())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = (value, _content(value))
            if isinstance(value, dict):
                found |= {f"{path}.{name}.{k}": (v, _content(v)) for k, v in value.items()}
    return found


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(), value.requires_grad, value.grad
    return copy.copy(value) if isinstance(value, list | set) else None


def _unchanged(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return torch.equal(a[0], b[0]) and a[1:] == b[1:]
    return a == b


# ------------------------------------------------------------------------------------- processes


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a fork of this process: where native code crashes or hangs, one test fails.

    ``kernel_tools.in_child`` starts an interpreter instead, which takes seconds.
    """
    if not hasattr(os, "fork"):
        return test

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            _in_fork(writer, lambda: test(*args, **kwargs))
        os.close(writer)
        status = _wait(child, 60)
        with os.fdopen(reader, errors="replace") as said:
            report = said.read()
        if os.WIFSIGNALED(status):
            report = signal.Signals(os.WTERMSIG(status)).name
        assert status == 0, f"in a process of its own: {report}"

    return run


def _in_fork(writer: int, test: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        test()
        code = 0
    except BaseException:
        os.write(writer, traceback.format_exc()[-4000:].encode())
    finally:
        os._exit(code)


def _wait(child: int, seconds: float) -> int:
    """The status of a process, which is killed if it takes longer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]
