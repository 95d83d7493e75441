"""One engine of the training race, in a process of its own.

    python -m neocog.training_contenders ENGINE NETWORK BATCH THREADS FOLDER

builds the network in training mode, with fixed weights, pictures and labels, and then answers
requests as :mod:`neocog.answering` says:

    {"do": "prepare"}               {"prepare_s", "first_step_s"}
    {"do": "time", "seconds": s}    {"ms": median of the steps of about s seconds, "calls": n}
    {"do": "limit"}                 {"peak": multiply-adds per second, "multiply_adds": of a step}
    {"do": "kept"}                  {"kept_bytes", "allocated_bytes"}: see :meth:`Contender.kept`
    {"do": "peak"}                  {"peak_bytes", "gradient_bytes", "held_bytes"}: see
                                    :meth:`Contender.peak`
    {"do": "losses", "steps": n}    {"losses": of the first steps from the fixed weights}
    {"do": "reference", "steps": n} the same in float64 PyTorch; nothing else can be asked then

A step is zero_grad(set_to_none=True), forward, cross entropy, backward, SGD without momentum.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .answering import (
    Mode,
    answering,
    forget_peak,
    median_call,
    processor_peak,
    resident,
    serve,
)
from .architectures import ARCHITECTURES, Shape
from .contenders import Task
from .memory import POOL
from .program import free_memory, held_memory

Forward = Callable[[Tensor], Tensor]
"""From pictures to logits, to be differentiated."""

SEED, LEARNING_RATE, CLASSES = 0, 0.01, 10

WARM = 3
"""Steps before memory is measured: by then everything is compiled and every cache is filled."""

EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment of a process in which each tensor has pages of its own, which go when it does. What
is freed inside a heap stays resident, and would count as if it were still needed."""

PEAKS = 3
"""Steps whose peak is taken; their median counts."""


@dataclass(frozen=True)
class Workload:
    """How a network is trained in the race."""

    batches: tuple[int, ...]
    in_shape: Shape


WORKLOADS = {
    "digits": Workload((64, 256), (1, 28, 28)),
    "vgg11": Workload((8,), (3, 64, 64)),
    "resnet18": Workload((8,), (3, 224, 224)),
    "mobilenet_v2": Workload((8,), (3, 224, 224)),
}
"""By the name in :data:`neocog.architectures.ARCHITECTURES`."""


@dataclass(frozen=True)
class Engine:
    """How one engine computes a network that is to be differentiated.

    ``prepare`` returns the forward pass and the pictures as the engine likes them best.
    """

    prepare: Callable[[nn.Module, Tensor], tuple[Forward, Tensor]]
    includes: str


def _channels_last(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, x.contiguous(memory_format=torch.channels_last)


def _inductor_channels_last(model: nn.Module, x: Tensor) -> tuple[Forward, Tensor]:
    _, moved = _channels_last(model, x)
    return torch.compile(model), moved


ENGINES: dict[str, Engine] = {
    "eager": Engine(lambda model, x: (model, x), "PyTorch's modules, all contiguous"),
    "eager-channels-last": Engine(_channels_last, "model and pictures in channels_last"),
    "inductor": Engine(lambda model, x: (torch.compile(model), x), "torch.compile, all contiguous"),
    "inductor-channels-last": Engine(
        _inductor_channels_last, "torch.compile, model and pictures in channels_last"
    ),
    "neocog": Engine(
        lambda model, x: (torch.compile(model, backend="neocog"), x),
        'torch.compile(backend="neocog"), all contiguous',
    ),
}


# --------------------------------------------------------------------------------- the answers


class Contender:
    """Answers the requests for one task."""

    mode: Mode = torch.enable_grad

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        self.task = task
        self.engine = ENGINES[task.engine]
        torch.manual_seed(SEED)
        self.model = ARCHITECTURES[task.network].make().train()
        self.start = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.x = torch.randn(task.batch, *WORKLOADS[task.network].in_shape)
        self.labels = torch.randint(CLASSES, (task.batch,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        self.forward: Forward = self.model

    def prepare(self) -> dict[str, Any]:
        """Seconds until there is something to call, and of the first step."""
        start = time.perf_counter()
        self.forward, self.x = self.engine.prepare(self.model, self.x)
        ready = time.perf_counter()
        self.step()
        return {"prepare_s": ready - start, "first_step_s": time.perf_counter() - ready}

    def loss(self) -> Tensor:
        """The forward pass: a scalar to be differentiated."""
        return F.cross_entropy(self.forward(self.x), self.labels)

    def step(self) -> Tensor:
        """A whole step of training: its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def time(self, seconds: float) -> dict[str, Any]:
        """The median step among those of about so many seconds, from the fixed weights on."""
        self._start_over()
        return median_call(self.step, seconds)

    def limit(self) -> dict[str, Any]:
        """What the processor could do at most, and what one step asks of it by definition."""
        return {"peak": processor_peak(self.task.threads), "multiply_adds": self._multiply_adds}

    def kept(self) -> dict[str, Any]:
        """What is alive between forward and backward because autograd keeps it.

        ``kept_bytes``: the distinct storages that ``saved_tensors_hooks`` sees, but for those of
        parameters and buffers; what is kept of the pictures counts. ``allocated_bytes``: what the
        forward pass took from PyTorch's allocator and did not give back. That leaves out pictures
        and labels, which were there before, and counts what an engine keeps unseen by the hooks.
        """
        self._warm_up()
        hold_nothing()
        kept = kept_bytes(self.model, self.loss)
        self.optimizer.zero_grad(set_to_none=True)
        return {"kept_bytes": kept, "allocated_bytes": allocated_bytes(self.loss)}

    def peak(self) -> dict[str, Any]:
        """How far resident memory grows during a step, less the gradients that stay.

        ``held_bytes``: what neocog, training as ever, holds ready from step to step. It is memory
        that the step needs anyhow, so none of it is held while that is measured.
        """
        POOL.holds = True
        self._warm_up()
        held = held_memory()
        hold_nothing()

        def gone() -> None:
            self.optimizer.zero_grad(set_to_none=True)

        grown = [peak_growth(self.step, gone) for _ in range(PEAKS)]
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        return {
            "peak_bytes": int(statistics.median(grown)) - gradients,
            "gradient_bytes": gradients,
            "held_bytes": held,
        }

    def losses(self, steps: int) -> dict[str, Any]:
        """The losses of the first steps from the fixed weights, dropout switched off.

        Engines draw different masks: with dropout, no two could be compared.
        """
        without_dropout(self.model)
        self._start_over()
        return {"losses": [self.step().item() for _ in range(steps)]}

    def reference(self, steps: int) -> dict[str, Any]:
        """:meth:`losses` by PyTorch in float64."""
        self.model.double()
        self.x = self.x.double()
        return self.losses(steps)

    def _warm_up(self) -> None:
        for _ in range(WARM):
            self.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _start_over(self) -> None:
        """Otherwise the loss of the one batch would go to zero in a long race."""
        self.model.load_state_dict(self.start)

    @functools.cached_property
    def _multiply_adds(self) -> int:
        """Of a step: each layer's for its result and the gradients of its weight and its input."""
        found = []

        def count(layer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            times = 3 if given[0].requires_grad else 2
            found.append(times * result.numel() * layer.weight[0].numel())

        layers = [m for m in self.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        self.model(self.x)
        for hook in hooks:
            hook.remove()
        return sum(found)


def without_dropout(model: nn.Module) -> None:
    """Switches off the dropout of a model that stays in training mode otherwise."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


# -------------------------------------------------------------------------------------- memory


class _Held:
    """A tensor for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps behind ``forward()``, a loss.

    Storages of the model's own parameters and buffers, views of them included, do not count.
    """
    own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        made = _Held(tensor)
        held.add(made)
        return made

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        loss = forward()
    found = {_storage(one.tensor): one.tensor.untyped_storage().nbytes() for one in held}
    loss.backward()  # as in a step: it gives back what is kept
    return sum(size for place, size in found.items() if place not in own)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def allocated_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that ``forward()``, a loss, takes from PyTorch's allocator and does not give back."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        loss = forward()
    loss.backward()
    return sum(event.self_cpu_memory_usage for event in profile.function_events or ())


def hold_nothing() -> None:
    """From now on, whatever neocog frees goes back at once, as with :data:`EXACT_MEMORY`."""
    POOL.holds = False
    free_memory()


def peak_growth(run: Callable[[], Any], before: Callable[[], Any]) -> int:
    """Bytes by which resident memory at its highest during ``run()`` exceeds that before it.

    ``before()`` drops what shall not be there at the start. What this process has freed but not
    given back to the system is given back first: whoever needs it again grows. Exact in a process
    with :data:`EXACT_MEMORY`; elsewhere for tensors of over 32 MB.
    """
    before()
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    thp_disable = 41  # a huge page would count whole for the sake of a few bytes
    libc.prctl(thp_disable, 1, 0, 0, 0)
    start = resident("VmRSS")
    forget_peak()
    run()
    grown = resident("VmHWM") - start
    libc.prctl(thp_disable, 0, 0, 0, 0)
    return grown


def main(arguments: Sequence[str] | None = None) -> None:
    """The process: see the module's docstring."""
    engine, network, batch, threads, folder = sys.argv[1:] if arguments is None else arguments
    task = Task(engine, network, int(batch), int(threads), Path(folder))
    with answering() as answers:
        serve(Contender(task), sys.stdin, answers)


if __name__ == "__main__":
    main()
