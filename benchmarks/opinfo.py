"""PyTorch's own samples of conv2d, max_pool2d and avg_pool2d, through neocog.

    pip install expecttest
    python benchmarks/opinfo.py [--every N] [--json FILE]

Every sample of ``torch.testing._internal``'s OpInfo for the three functions, as ``sample_inputs``
and ``reference_inputs`` give them, and every one of ``error_inputs``:

- ``functional``: ``neocog.functional`` in float32, forward and gradients, all samples;
- ``other types``: the same in other data types, against PyTorch, bit for bit;
- ``errors``: what PyTorch refuses is refused with the same kind of exception, in float32 as well;
- ``freeze``, ``compile``, ``compile, gradients``: a module of one layer, all samples of conv2d and
  one in N of the pools' (``--every``).

Shapes, data types, strides and indices are PyTorch's. Maxima are PyTorch's bit for bit. A sum is
right if it is off from float64 by at most 8 units in the last place of what the absolute values of
its terms sum up to, the largest such sum of the tensor: in any order a sum of n terms is off by up
to n/2 of them, but roundings cancel, and no sample has more than a few hundred terms.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from real_model_checks import processor
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

import neocog
import neocog.functional

ULPS = 8
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "nn.functional.conv2d": (F.conv2d, neocog.functional.conv2d),
    "nn.functional.max_pool2d": (F.max_pool2d, neocog.functional.max_pool2d),
    "nn.functional.avg_pool2d": (F.avg_pool2d, neocog.functional.avg_pool2d),
}


@dataclass(frozen=True)
class Sample:
    """One call: its tensors, and how the arguments look around them."""

    name: str
    tensors: list[Tensor]
    spec: Any
    plain: list[Any]
    "The leaves; None where a tensor stands."

    @staticmethod
    def of(name: str, sample: Any) -> Sample:
        leaves, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return Sample(
            name, tensors, spec, [None if isinstance(v, Tensor) else (v,) for v in leaves]
        )

    def call(self, function: Callable[..., Any], tensors: list[Tensor]) -> Any:
        """The function's result for these tensors instead."""
        left = iter(tensors)
        leaves = [next(left) if v is None else v[0] for v in self.plain]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return function(*args, **kwargs)

    def __str__(self) -> str:
        shapes = [tuple(t.shape) for t in self.tensors]
        return f"{self.name}{self.call(lambda *a, **k: (a[1:], k), shapes)} on {shapes[0]}"


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def fresh(tensors: list[Tensor], dtype: torch.dtype | None = None, grad: bool = False):
    """Copies of the same strides."""
    made = [torch.empty_strided(t.shape, t.stride(), dtype=dtype or t.dtype) for t in tensors]
    for new, t in zip(made, tensors, strict=True):
        new.copy_(t.detach()).requires_grad_(grad and new.is_floating_point())
    return made


def gradients(out: Any, tensors: list[Tensor], seed: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(first(out), tensors, seed.to(first(out).dtype)))


def differs(ours: Tensor, theirs: Tensor) -> str:
    """How a result's shape, type and strides differ from PyTorch's; empty if they do not."""
    for what in ("shape", "dtype"):
        mine, right = getattr(ours, what), getattr(theirs, what)
        if mine != right:
            return f"{what} {mine} instead of {right}"
    # Even strides that address nothing, of dimensions of size 1, are what a user sees.
    if ours.stride() != theirs.stride():
        return f"strides {ours.stride()} instead of {theirs.stride()} of shape {tuple(ours.shape)}"
    return ""


def off(ours: Tensor, truth: Tensor, amount: Tensor) -> str:
    """How far a sum is off, if it is too far."""
    if not truth.numel():
        return ""
    bound = ULPS * torch.finfo(torch.float32).eps * amount.abs().max()
    error = (ours.double() - truth).abs().max()
    return "" if error <= bound else f"off by {error:.2e}, bound {bound:.2e}"  # NaN is off


def judge(
    sample: Sample, run: Callable[[list[Tensor]], Any], grad: bool, strides: bool = True
) -> str:
    """What is wrong with what ``run`` computes from the sample's tensors; empty if nothing is."""
    theirs = FUNCTIONS[sample.name][0]
    largest = sample.name.endswith("max_pool2d")
    given = fresh(sample.tensors, grad=grad)
    reference = fresh(sample.tensors, grad=grad)
    exact = fresh(sample.tensors, torch.float64, grad)
    sizes = fresh(sample.tensors if largest else [t.abs() for t in exact], torch.float64, grad)
    expected, truth = sample.call(theirs, reference), sample.call(theirs, exact)
    amount = sample.call(theirs, sizes)
    out = run(given)
    if type(out) is not type(expected):
        return f"returns {type(out).__name__} instead of {type(expected).__name__}"
    if isinstance(out, tuple) and not torch.equal(out[1], expected[1]):
        return "other indices"
    wrong = differs(first(out), first(expected)) if strides else ""
    if not wrong and largest and not torch.equal(first(out), first(expected)):
        wrong = "other maxima"
    wrong = wrong or off(first(out), first(truth), first(amount))
    if wrong or not grad:
        return wrong
    if not first(out).requires_grad:
        return "no gradient"
    torch.manual_seed(0)
    seed = torch.randn(first(expected).shape, dtype=torch.float64)
    seed = seed.float().double()
    right = gradients(truth, exact, seed)
    bounds = gradients(amount, sizes, seed.abs())
    for i, (g, r, b) in enumerate(zip(gradients(out, given, seed), right, bounds, strict=True)):
        wrong = off(g, r, b)
        if wrong:
            return f"gradient {i}: {wrong}"
    return ""


class Layer(nn.Module):
    """The sample's function as a model of its first tensor; the other tensors are parameters."""

    def __init__(self, sample: Sample, tensors: list[Tensor]):
        super().__init__()
        self.sample = sample
        self.weights = nn.ParameterList([nn.Parameter(t.detach()) for t in tensors[1:]])

    def forward(self, x: Tensor) -> Any:
        return self.sample.call(FUNCTIONS[self.sample.name][0], [x, *self.weights])


def functional(sample: Sample) -> Callable[[list[Tensor]], Any]:
    return lambda tensors: sample.call(FUNCTIONS[sample.name][1], tensors)


def frozen(sample: Sample, tally: Tally) -> Callable[[list[Tensor]], Any]:
    def run(tensors: list[Tensor]) -> Any:
        model = neocog.freeze(Layer(sample, tensors).eval(), tensors[0])
        out = model(tensors[0])
        tally.natives += bool(neocog.report(model)[0].layers)
        return out

    return run


def compiled(sample: Sample) -> Callable[[list[Tensor]], Any]:
    def run(tensors: list[Tensor]) -> Any:
        torch._dynamo.reset()
        model = torch.compile(lambda *given: sample.call(FUNCTIONS[sample.name][0], list(given)),
                              backend="neocog")  # fmt: skip
        return model(*tensors)

    return run


def outcome(judged: Callable[[], str]) -> str:
    try:
        return judged()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def samples(dtype: torch.dtype, grad: bool) -> Iterator[Sample]:
    """All samples of all variants of the three functions."""
    for op in op_db:
        if op.name in FUNCTIONS and dtype in op.supported_dtypes("cpu"):
            torch.manual_seed(0)
            for sample in op.sample_inputs("cpu", dtype, requires_grad=grad):
                yield Sample.of(op.name, sample)
            if op.name == "nn.functional.conv2d":  # those of the pools are the same once more
                for sample in op.reference_inputs("cpu", dtype, requires_grad=grad):
                    yield Sample.of(op.name, sample)


def other_types(sample: Sample) -> str:
    """What is wrong with a sample that is not float32; PyTorch may refuse it, then so must we."""
    theirs, ours = FUNCTIONS[sample.name]
    try:
        expected = sample.call(theirs, sample.tensors)
    except Exception as error:
        return refused(sample, ours, type(error))
    out = sample.call(ours, sample.tensors)
    wrong = differs(first(out), first(expected))
    same = torch.equal(first(out), first(expected))
    return wrong or ("" if same else "other numbers")


def refused(sample: Sample, ours: Callable[..., Any], kind: type[Exception]) -> str:
    try:
        out = sample.call(ours, sample.tensors)
    except kind:
        return ""
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        return f"{type(error).__name__} instead of {kind.__name__}: {text}"
    return f"returns {tuple(first(out).shape)} instead of raising {kind.__name__}"


def errors() -> Iterator[tuple[Sample, str]]:
    """What PyTorch refuses, as it stands and with its floating tensors in float32."""
    for op in op_db:
        if op.name not in FUNCTIONS or op.error_inputs_func is None:
            continue
        for error in op.error_inputs("cpu"):
            sample = Sample.of(op.name, error.sample_input)
            single = [t.float() if t.is_floating_point() else t for t in sample.tensors]
            for tensors in (sample.tensors, single):
                now = Sample(sample.name, tensors, sample.spec, sample.plain)
                try:
                    now.call(FUNCTIONS[now.name][0], tensors)
                except Exception as theirs:
                    yield now, refused(now, FUNCTIONS[now.name][1], type(theirs))


class Tally:
    """Passed and failed, by way and function; failures by cause."""

    def __init__(self) -> None:
        self.natives = 0
        self.passed: collections.Counter[tuple[str, str]] = collections.Counter()
        self.failed: dict[tuple[str, str], list[tuple[str, str]]] = collections.defaultdict(list)

    def add(self, way: str, sample: Sample, wrong: str) -> None:
        if wrong:
            self.failed[way, sample.name].append((str(sample), wrong))
        else:
            self.passed[way, sample.name] += 1

    def rows(self) -> list[dict[str, Any]]:
        keys = dict.fromkeys([*self.passed, *self.failed])
        return [
            {
                "way": way, "function": name.rpartition(".")[2], "passed": self.passed[way, name],
                "failed": len(self.failed[way, name]), "failures": self.failed[way, name],
            }
            for way, name in keys
        ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--every", type=int, default=12, help="one sample of so many is compiled")
    options = parser.parse_args()
    logging.getLogger("neocog").setLevel(logging.ERROR)
    tally = Tally()
    for grad in (False, True):
        for sample in samples(torch.float32, grad):
            way = "functional, gradients" if grad else "functional"
            tally.add(way, sample, outcome(lambda s=sample, g=grad: judge(s, functional(s), g)))
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64):
        for sample in samples(dtype, False):
            tally.add("other types", sample, outcome(lambda s=sample: other_types(s)))
    for sample, wrong in errors():
        tally.add("errors", sample, wrong)
    for grad in (False, True):
        for i, sample in enumerate(samples(torch.float32, grad)):
            if i % options.every and sample.name.endswith("pool2d"):
                continue
            way = "compile, gradients" if grad else "compile"
            tally.add(way, sample, outcome(lambda s=sample, g=grad: judge(s, compiled(s), g)))
            if not grad:
                wrong = outcome(lambda s=sample: without_gradients(s, tally))
                tally.add("freeze", sample, wrong)
    for row in tally.rows():
        print(f"{row['way']}, {row['function']}: {row['passed']} passed, {row['failed']} failed")
        for sample, wrong in row["failures"][:4]:
            print(f"  {wrong}: {sample}")
    print(f"freeze: {tally.natives} of these are compiled, the others run in PyTorch")
    if options.json is not None:
        about = {
            "processor": processor(), "torch": torch.__version__, "every": options.every,
            "frozen_and_compiled": tally.natives, "rows": tally.rows(),
        }  # fmt: skip
        options.json.write_text(json.dumps(about, indent=1) + "\n")


def without_gradients(sample: Sample, tally: Tally) -> str:
    with torch.no_grad():
        return judge(sample, frozen(sample, tally), False)


if __name__ == "__main__":
    main()
