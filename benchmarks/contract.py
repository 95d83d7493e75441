"""The contract, measured: a three-layer network with a residual addition and a pool.

    python benchmarks/contract.py [--json FILE] [--rounds N]

    x -> conv 16->32 + bias + ReLU -> a -> conv 32->32 + bias + ReLU -> conv 32->32 + bias
      -> + a -> ReLU -> 2x2 max pool

Each question of docs/architecture.md ("The contract") is answered by two programs that differ in
that one thing, run alternately in one process; medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from neocog import compiler, convolutions, functional, kernels, problem
from neocog.convolutions import Weights, convolve
from neocog.cpu import copy as copies
from neocog.cpu import direct
from neocog.cpu.lanes import I64, Emitter
from neocog.maps import NHWC, Map, deliver, halo_of, read, scratch_map, written
from neocog.problem import Act, Add, Bias, Block, Conv
from neocog.program import Program
from neocog.target import host

CHANNELS, SIZE = (16, 32, 32, 32), 28
POOL = problem.pooling("max", 2)


def blocks(batch: int) -> list[Block]:
    """The three blocks of the network."""
    convs = [
        problem.conv2d_problem((batch, c, SIZE, SIZE), (k, c, 3, 3), padding=1)
        for c, k in zip(CHANNELS, CHANNELS[1:], strict=False)
    ]
    relu = Act("relu")
    tails = ((Bias(), relu), (Bias(), relu), (Bias(), Add(), relu, POOL))
    return [Block(conv, tail) for conv, tail in zip(convs, tails, strict=True)]


def tensors(batch: int) -> SimpleNamespace:
    """Input, weights and biases."""
    torch.manual_seed(0)
    x = torch.randn(batch, CHANNELS[0], SIZE, SIZE).to(memory_format=torch.channels_last)
    pairs = list(zip(CHANNELS, CHANNELS[1:], strict=False))
    weights = [torch.randn(k, c, 3, 3) / (9 * c) ** 0.5 for c, k in pairs]
    return SimpleNamespace(x=x, w=weights, b=[torch.randn(k) for _, k in pairs])


def chain(batch: int, halo_by_producer: bool) -> Program:
    """The whole network as one program.

    ``halo_by_producer``: each layer writes into the middle of the next one's halo; otherwise each
    writes a dense map that the next one copies into a halo of its own.
    """
    target, net = host(), blocks(batch)
    p = Program(("x", "w0", "w1", "w2", "b0", "b1", "b2", "out"))
    m = read(p, target, p.buffer("x"), NHWC, net[0].in_shape, halo_of(net[0].conv))
    residual = None
    for number, block in enumerate(net):
        last = number == len(net) - 1
        out_place = p.buffer("out")
        if last:
            out = written(p, out_place, NHWC, block.out_shape)
        else:
            halo = halo_of(net[number + 1].conv)
            out = _haloed(p, block, halo) if halo_by_producer else _dense(p, block)
        extra = {"bias": p.buffer(f"b{number}")}
        if residual is not None and last:
            extra |= {"residual": residual.place, "residual_image": residual.image,
                      "residual_row": residual.row, "residual_pixel": residual.pixel}  # fmt: skip
        weights = Weights.of(p.buffer(f"w{number}"), _strides(block.conv), block.conv)
        convolve(p, target, block.conv, m, weights, out, block.epilogue, extra=extra)
        residual = residual or out
        if not last and not halo_by_producer:
            m = read(p, target, out.place, NHWC, block.out_shape, halo)
        else:
            m = out
    deliver(p, target, out, out_place, NHWC, net[-1].out_shape)
    return p


def _strides(conv: Conv) -> tuple[int, int, int, int]:
    _, into, kh, kw = conv.weight_shape
    return into * kh * kw, kh * kw, kw, 1


def _dense(p: Program, block: Block) -> Map:
    batch, channels, height, width = block.out_shape
    return Map.dense(p.scratch(batch * channels * height * width), channels, height, width)


def _haloed(p: Program, block: Block, halo) -> Map:
    _, channels, height, width = block.out_shape
    m, corner = scratch_map(p, block.out_shape, halo)
    p.step(
        kernels.copy_kernel(copies.border, host()), block.conv.batch,
        out=corner, out_image=m.image, out_row=m.row, height=height,
        top=halo.top, bottom=halo.bottom, left=halo.left * channels,
        right=halo.right * channels, width_elements=width * channels,
    )  # fmt: skip
    return m


def apart(p: Program) -> list[Program]:
    """The same steps, each a program (and a parallel region) of its own."""
    singles = []
    for step in p.steps:
        single = copy.copy(p)
        single.steps, single._built = [step], {}
        singles.append(single)
    return singles


@contextmanager
def baked(values: dict[str, int]):
    """Within: direct kernels are compiled with these fields as constants."""

    class Baked(Emitter):
        @contextmanager
        def kernel(self, fields):
            with super().kernel(fields) as (f, *rest):
                for name, value in values.items():
                    if hasattr(f, name):
                        setattr(f, name, I64(value))
                yield (f, *rest)

    kernels.kernel.cache_clear()
    direct.Emitter = Baked
    try:
        yield
    finally:
        direct.Emitter = Emitter
        kernels.kernel.cache_clear()


def fully_specialised(p: Program) -> tuple[Program, float]:
    """The program with every direct kernel's integers compiled in, and the seconds that took."""
    plans = {id(kernels.kernel(plan)): plan for plan in _plans()}
    special = copy.copy(p)
    special.steps, special._built, seconds = [], {}, 0.0
    for step in p.steps:
        plan = plans.get(id(step.kernel))
        made = copy.copy(step)
        if plan is not None:
            integers = {k: v for k, v in step.fields.items() if isinstance(v, int)}
            start = time.perf_counter()
            with baked(integers):
                made.kernel = direct.emit(plan)
            seconds += time.perf_counter() - start
        special.steps.append(made)
    special._thread_scratch = [
        (special.steps[p.steps.index(step)], *rest) for step, *rest in p._thread_scratch
    ]
    return special, seconds


def _plans() -> list[direct.DirectPlan]:
    return [direct_plan(block) for block in blocks(1)]


def direct_plan(block: Block) -> direct.DirectPlan:
    """The plan that ``chain`` uses for a block."""
    return convolutions.plan_of(host(), block.conv, block.epilogue)


def compare(rounds: int, **contenders: Callable[[], object]) -> dict[str, float]:
    """Median milliseconds of each contender, run alternately."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 3):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if number >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def inference_runs(batch: int) -> dict[str, Callable[[], object]]:
    """The network as one program, in its variants, and as three operator calls."""
    t, net = tensors(batch), blocks(batch)
    out = torch.empty(net[-1].out_shape, memory_format=torch.channels_last)
    buffers = (t.x, *t.w, *t.b, out)
    halo, packing = chain(batch, True), chain(batch, False)
    special, _ = fully_specialised(halo)
    steps = apart(halo)

    def ops() -> torch.Tensor:
        with torch.inference_mode():
            return _operators(t)

    def run(p: Program) -> Callable[[], object]:
        def call() -> None:
            p.run(*(b.data_ptr() for b in buffers))

        call()
        torch.testing.assert_close(out, ops(), rtol=1e-5, atol=1e-5)
        return call

    def separate() -> None:
        threads = torch.get_num_threads()
        addresses = [b.data_ptr() for b in buffers]
        for step in steps:
            step.run(*addresses, threads=threads)

    separate()
    return {
        "one program, halos by producers, sizes at run time": run(halo),
        "same, each layer copies its input into a halo": run(packing),
        "same, all sizes compiled in": run(special),
        "same, one parallel region per step": separate,
        "three operator calls": ops,
    }


def _operators(t: SimpleNamespace) -> torch.Tensor:
    block = functional.conv_block
    a = block(t.x, t.w[0], t.b[0], padding=1, activation="relu")
    y = block(a, t.w[1], t.b[1], padding=1, activation="relu")
    return block(y, t.w[2], t.b[2], padding=1, activation="relu", pool=POOL, residual=a)


def training_runs(batch: int) -> dict[str, Callable[[], object]]:
    """Forward and backward: through autograd, and only the native programs it runs."""
    t = tensors(batch)
    parameters = [v.requires_grad_() for v in (*t.w, *t.b)]
    torch_block = torch.nn.functional

    def with_neocog() -> None:
        _operators(t).sum().backward()

    def with_torch() -> None:
        a = torch_block.relu(torch_block.conv2d(t.x, t.w[0], t.b[0], padding=1))
        y = torch_block.relu(torch_block.conv2d(a, t.w[1], t.b[1], padding=1))
        y = torch_block.conv2d(y, t.w[2], t.b[2], padding=1) + a
        torch_block.max_pool2d(torch_block.relu(y), 2).sum().backward()

    def gradients(step: Callable[[], None]) -> list[torch.Tensor]:
        for p in parameters:
            p.grad = None
        step()
        return [p.grad for p in parameters]

    for ours, theirs in zip(gradients(with_neocog), gradients(with_torch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
    return {"neocog": with_neocog, "native part of neocog": native_part(batch), "torch": with_torch}


def native_part(batch: int) -> Callable[[], None]:
    """The forward and backward programs of all blocks, without autograd and allocation."""
    work = []
    for block in blocks(batch):
        p = compiler.forward(block, NHWC, _strides(block.conv), NHWC, True)
        back = compiler.backward(
            block, NHWC, NHWC, _strides(block.conv), NHWC, NHWC,
            ("x", "w", "bias", "residual")[: 4 if Add() in block.epilogue else 3],
        )  # fmt: skip
        for program in (p, back):
            shapes = {
                "x": block.in_shape, "gx": block.in_shape, "w": block.conv.weight_shape,
                "gw": block.conv.weight_shape, "residual": block.conv_shape,
                "gresidual": block.conv_shape, "bias": (block.conv.out_channels,),
                "gbias": (block.conv.out_channels,),
            }  # fmt: skip
            buffers = [torch.zeros(shapes.get(n, block.out_shape)) for n in program.names]
            work.append((program, buffers))

    def run() -> None:
        for program, buffers in work:
            program.run(*(b.data_ptr() for b in buffers))

    return run


def compile_seconds() -> dict[str, float]:
    """What a kernel costs once, and what a new batch size costs with it."""

    def programs(batch: int) -> float:
        start = time.perf_counter()
        for block in blocks(batch):
            compiler.forward(block, NHWC, _strides(block.conv), NHWC)
        return time.perf_counter() - start

    return {"three blocks, with their kernels": programs(1), "a new batch size": programs(7)}


def main() -> None:
    """Print (and keep) all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {"compile, s": compile_seconds()}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch in (1, 16):
            title = f"inference, batch {batch}, {threads} threads, ms"
            results[title] = compare(args.rounds, **inference_runs(batch))
        results[f"training, batch 16, {threads} threads, ms"] = compare(
            args.rounds // 4, **training_runs(16)
        )
    for title, row in results.items():
        print(title)
        base = next(iter(row.values()))
        for name, value in row.items():
            print(f"  {value:9.4f}  {value / base:6.2f}x  {name}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
