"""How the tests of the kernels run a program: tensors of given layouts in, checked arrays out.

Inputs are small whole numbers, whose sums are exact in float32 in any order, so that a result is
compared with ``==``. Where an average divides, the bound of ``dtypes.FLOAT32`` takes its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neocog import compiler, execution, reference
from neocog.dtypes import FLOAT32
from neocog.problem import Act, Add, Affine, Bias, Block, Pool, Pooling
from neocog.program import Program
from neocog.target import TARGETS, Target, host, host_features

# Two test processes with two threads each would wait for each other: tests that are about threads
# ask for them.
torch.set_num_threads(1)

Array = NDArray[np.float64]
Arrays = dict[str, Array]

NCHW, NHWC = LAYOUTS = tuple(execution.FORMATS)
ROWS = [t for t in TARGETS if t.requires <= host_features()]
"""Every row of the table of targets that this machine can run."""
OTHERS = [t for t in ROWS if t is not host()]
STALE = 0xEE
"""What winners hold before they are written: no tap of a window of the tables."""


def integers(shape: Sequence[int], seed: int) -> Array:
    """Small whole numbers, ties and zeros among them."""
    return np.random.default_rng(seed).integers(-4, 5, tuple(shape)).astype(np.float64)


def normals(shape: Sequence[int], seed: int) -> Array:
    """Numbers that float32 holds exactly, but not their sums."""
    made = np.random.default_rng(seed).standard_normal(tuple(shape))
    return made.astype(np.float32).astype(np.float64)


def block_inputs(problem: Block, fill: Callable[[Sequence[int], int], Array] = integers) -> Arrays:
    """What the steps of a block need, and ``grad``, a gradient of its result."""
    channels = (problem.conv.out_channels,)
    shapes: dict[str, Sequence[int]] = {"x": problem.in_shape, "w": problem.conv.weight_shape}
    for step in problem.epilogue:
        if isinstance(step, Bias):
            shapes["bias"] = channels
        elif isinstance(step, Affine):
            shapes |= {"scale": channels, "shift": channels}
        elif isinstance(step, Add):
            shapes["residual"] = problem.conv_shape
    shapes["grad"] = problem.out_shape
    return {name: fill(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def operands(inputs: Arrays) -> Arrays:
    """The inputs without the gradient."""
    return {name: value for name, value in inputs.items() if name != "grad"}


def tensor(array: Array | NDArray[Any], layout: str = NCHW) -> Tensor:
    """float32 in the given layout, strides of sizes of 1 included; vectors have none."""
    values = torch.tensor(np.asarray(array), dtype=torch.float32)
    if values.dim() != 4:
        return values
    return torch.empty(values.shape, memory_format=execution.FORMATS[layout]).copy_(values)


def unwritten(shape: Sequence[int], layout: str = NCHW, dtype: Any = torch.float32) -> Tensor:
    """A result's tensor, full of what no kernel writes: NaN, or winners that do not exist."""
    format = execution.FORMATS[layout] if len(shape) == 4 else torch.contiguous_format
    made = torch.empty(tuple(shape), dtype=dtype, memory_format=format)
    return made.fill_(float("nan") if dtype.is_floating_point else STALE)


def reads(program: Program, results: Iterable[str]) -> list[str]:
    """The call buffers that the program reads."""
    return [name for name in program.names if name not in results]


Runner = Callable[[Program, dict[str, Tensor], dict[str, Tensor], int], dict[str, Tensor]]
"""Runs a program on inputs, by name, and fills its results, on a number of threads."""


def run_twice(
    program: Program, inputs: dict[str, Tensor], results: dict[str, Tensor], threads: int
) -> dict[str, Tensor]:
    """First on NaN, then on the inputs: what the first run leaves in scratch must not matter."""
    given = {name: inputs[name] for name in reads(program, results)}
    poison = {
        name: torch.full_like(t, float("nan")) if t.dtype == torch.float32 else t
        for name, t in given.items()
    }
    for tensors in (poison, given):
        for t in results.values():
            t.fill_(float("nan") if t.is_floating_point() else STALE)
        both = tensors | results
        program.run(*(both[name].data_ptr() for name in program.names), threads=threads)
    return results


# ------------------------------------------------------------------------------------ comparing


@dataclass
class Context:
    """What a failure prints: the problem's line, which reruns it, how it was run, the program."""

    problem: Any
    how: str
    program: Program

    def check(self, name: str, ours: Tensor, theirs: Array, bound: Array | None = None) -> None:
        """``ours`` equals ``theirs``, or is no further from it than ``bound``."""
        got = ours.numpy().astype(np.float64)
        assert got.shape == theirs.shape, (name, got.shape, theirs.shape)
        if bound is None:
            same = (got == theirs) | (np.isnan(got) & np.isnan(theirs))
        else:
            same = np.abs(got - theirs) <= bound  # false for NaN
        if same.all():
            return
        wrong = np.argwhere(~same)
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{name}: {len(wrong)} of {got.size} elements are wrong, the first at {first}: "
            f"{got[first]} instead of {theirs[first]}\n{self.problem}\n{self.how}\n{self.program}"
        )


def rounded(values: Array) -> Array:
    """The bound for an exact sum divided once."""
    return FLOAT32.error_bound(1, np.abs(values))


def is_exact(problem: Block) -> bool:
    """Whether nothing is divided."""
    return problem.pool is None or problem.pool.kind != "mean"


def gradient_bounds(problem: Block, inputs: Arrays) -> Arrays:
    """How far float32 gradients behind an average may be from the true ones, by name."""
    pool, conv = problem.pool, problem.conv
    assert pool is not None
    # The gradient of the convolution's output is that of a residual added to it: with |grad| and
    # divisors without a sign, the size of everything that is summed into it.
    steps = [step for step in problem.epilogue[:-1] if not isinstance(step, Add)]
    divisor = pool.divisor_override
    step = pool.step if divisor is None else type(pool.step)(
        pool.kind, pool.rows, pool.cols, pool.count_include_pad, abs(divisor)
    )  # fmt: skip
    given = operands(inputs)
    given.setdefault("residual", np.zeros(problem.conv_shape))
    whole = Block(conv, (Add(), *steps, step))
    g = reference.block_grad(whole, np.abs(inputs["grad"]), **given)["residual"]
    windows = pool.rows.size * pool.cols.size
    taps = conv.rows.size * conv.cols.size
    pixels = conv.batch * conv.out_shape[2] * conv.out_shape[3]
    terms = {
        "x": taps * conv.out_channels // conv.groups + windows,
        "w": pixels + windows,
        "bias": pixels + windows,
        "residual": windows,
    }
    sizes = {
        "x": reference.convolution_grad_input(conv, g, np.abs(inputs["w"])),
        "w": reference.convolution_grad_weight(conv, g, np.abs(inputs["x"])),
        "bias": g.sum(axis=(0, 2, 3)),
        "residual": g,
    }
    return {name: FLOAT32.error_bound(terms[name] + 1, sizes[name]) for name in sizes}


def winners_agree(context: Context, ours: Tensor, theirs: NDArray[np.int64]) -> None:
    """The stored winners are the reference's, except where a window meets no input."""
    met = theirs != -1
    context.check("winners", ours, np.where(met, theirs, ours.numpy()).astype(np.float64))


# --------------------------------------------------------------------------------------- blocks


def outputs_of(problem: Block, save: bool, layout: str) -> dict[str, Tensor]:
    """The call buffers that a forward pass writes."""
    made = {"out": unwritten(problem.out_shape, layout)}
    for name in compiler.saved_names(problem, save):
        if name == "winners":
            assert problem.pool is not None
            kind = execution.winner_dtype(problem.pool.step)
            made[name] = unwritten(problem.out_shape, NHWC, kind)
        else:
            made[name] = unwritten(problem.conv_shape, NHWC)
    return made


def forward(
    problem: Block,
    inputs: Arrays,
    layouts: tuple[str, str, str] = (NCHW, NCHW, NCHW),
    save: bool = False,
    target: Target | None = None,
    threads: int = 1,
    run: Runner = run_twice,
) -> tuple[dict[str, Tensor], Context]:
    """Run a block; ``layouts`` are those of x, w and the output."""
    x_layout, w_layout, out_layout = layouts
    tensors = {name: tensor(value) for name, value in inputs.items()}
    tensors |= {"x": tensor(inputs["x"], x_layout), "w": tensor(inputs["w"], w_layout)}
    if "residual" in inputs:
        tensors["residual"] = tensor(inputs["residual"], NHWC)
    program = compiler.forward(problem, x_layout, tensors["w"].stride(), out_layout, save, target)
    how = f"forward x, w, out {layouts} save={save} threads={threads} {target and target.name}"
    results = run(program, tensors, outputs_of(problem, save, out_layout), threads)
    return results, Context(problem, how, program)


def needed(problem: Block) -> tuple[str, ...]:
    """Everything that can get a gradient."""
    kinds = [type(step) for step in problem.epilogue]
    return ("x", "w", *(["bias"] if Bias in kinds else []), *(["residual"] if Add in kinds else []))


def backward(
    problem: Block,
    inputs: Arrays,
    saved: dict[str, Tensor],
    needs: tuple[str, ...],
    layouts: tuple[str, str, str, str, str] = (NCHW,) * 5,
    target: Target | None = None,
    threads: int = 1,
    run: Runner = run_twice,
) -> tuple[dict[str, Tensor], Context]:
    """Gradients of a block; ``layouts`` are those of grad, x, w, the gradient of x, the result.

    ``saved`` is what :func:`forward` with ``save`` gave.
    """
    grad_layout, x_layout, w_layout, gx_layout, result_layout = layouts
    result = saved.get("before", saved["out"])
    if "before" in saved:
        result_layout = NHWC
    tensors = {
        "grad": tensor(inputs["grad"], grad_layout),
        "x": tensor(inputs["x"], x_layout),
        "w": tensor(inputs["w"], w_layout),
        "result": result.contiguous(memory_format=execution.FORMATS[result_layout]),
        "winners": saved.get("winners", torch.empty(0, dtype=torch.uint8)),
    }
    shapes = {
        "x": problem.in_shape,
        "w": problem.conv.weight_shape,
        "bias": (problem.conv.out_channels,),
        "residual": problem.conv_shape,
    }
    given = {"x": gx_layout, "residual": NHWC}
    made = {f"g{n}": unwritten(shapes[n], given.get(n, NCHW)) for n in needs}
    program = compiler.backward(
        problem,
        grad_layout,
        x_layout,
        tensors["w"].stride(),
        gx_layout,
        result_layout,
        needs,
        target,
    )
    how = f"backward grad, x, w, gx, result {layouts} {needs} threads={threads}"
    how += f" {target and target.name}"
    results = run(program, tensors, made, threads)
    return {name[1:]: t for name, t in results.items()}, Context(problem, how, program)


def is_trainable(problem: Block) -> bool:
    """Whether the kernels have its gradient: nothing but a pool after the activation.

    A convolution with a base dilation is itself a gradient, of which there is none.
    """
    if is_spread(problem):
        return False
    kinds = [type(step) for step in problem.epilogue]
    behind = kinds[kinds.index(Act) + 1 :] if Act in kinds else []
    return Affine not in kinds and not {Bias, Add} & set(behind)


def is_spread(problem: Block) -> bool:
    """Whether it has a base dilation, as the gradients of strided convolutions do."""
    return (problem.conv.rows.base_dilation, problem.conv.cols.base_dilation) != (1, 1)


def is_covered(problem: Block) -> bool:
    """Whether the kernels have it at all."""
    if is_spread(problem) and any(isinstance(s, (Add, Pooling)) for s in problem.epilogue):
        return False
    return not any(isinstance(step, Act) and step.slope < 0 for step in problem.epilogue)


def with_exact_slopes(problem: Block) -> Block:
    """The same with slopes that multiply small whole numbers without rounding."""
    steps = (
        replace(step, slope=round(4 * step.slope) / 4) if isinstance(step, Act) else step
        for step in problem.epilogue
    )
    return Block(problem.conv, tuple(steps))


# ---------------------------------------------------------------------------------------- pools


def pool_forward(
    problem: Pool,
    x: Array,
    layouts: tuple[str, str] = (NCHW, NCHW),
    save: bool = False,
    target: Target | None = None,
    threads: int = 1,
    run: Runner = run_twice,
) -> tuple[dict[str, Tensor], Context]:
    """Run a pooling layer; ``layouts`` are those of x and the output."""
    program = compiler.pool_forward(problem, *layouts, save, target)
    made = {"out": unwritten(problem.out_shape, layouts[1])}
    if save and problem.kind == "max":
        kind = execution.winner_dtype(problem.step)
        made["winners"] = unwritten(problem.out_shape, NHWC, kind)
    how = f"forward x, out {layouts} save={save} threads={threads} {target and target.name}"
    results = run(program, {"x": tensor(x, layouts[0])}, made, threads)
    return results, Context(problem, how, program)


def pool_backward(
    problem: Pool,
    grad: Array,
    saved: dict[str, Tensor],
    layouts: tuple[str, str] = (NCHW, NCHW),
    target: Target | None = None,
    threads: int = 1,
    run: Runner = run_twice,
) -> tuple[Tensor, Context]:
    """The gradient of a pooling layer's input; ``layouts`` are those of grad and the result."""
    program = compiler.pool_backward_program(problem, *layouts, target)
    winners = saved.get("winners", torch.empty(0, dtype=torch.uint8))
    inputs = {"grad": tensor(grad, layouts[0]), "winners": winners}
    how = f"backward grad, gx {layouts} threads={threads} {target and target.name}"
    results = run(program, inputs, {"gx": unwritten(problem.in_shape, layouts[1])}, threads)
    return results["gx"], Context(problem, how, program)


# ------------------------------------------------------------------------------------ processes


def in_child(module: str, function: str, timeout: float = 120, **environment: str) -> str:
    """Run ``module.function()`` in an interpreter of its own, which may crash or hang.

    Returns what it printed; fails unless it exits with code 0 and silent stderr.
    """
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", f"import {module}; {module}.{function}()"],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert not done.stderr, done.stderr
    return done.stdout
