"""What compiled kernels keep and what they must leave alone; NaN, infinities, empty batches.

State: machine code and programs kept by problem, scratch kept by thread, the modes of the
floating-point unit.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import resource
import sys
from typing import Any

import kernel_tools as kt
import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_tools import LAYOUTS, NCHW
from torch import Tensor

from neocog import compiler, execution, functional, kernels, reference
from neocog.problem import Block, Pool, parse, pooling

# --------------------------------------------------------------------------------- odd values


def test_the_modes_of_the_floating_point_unit_are_left_alone() -> None:
    """Numbers below float32's normal range are neither flushed nor is that switched on."""
    problem = parse("conv n2 c19x5x5 k19 3x3 p1 | bias | relu | max 2x2")
    assert isinstance(problem, Block)
    tiny = 2.0**-149
    inputs = kt.block_inputs(problem)
    for name in ("x", "bias"):
        inputs[name] = inputs[name] * tiny
    truth = reference.block(problem, **kt.operands(inputs)).out
    assert 0 < np.abs(truth).max() < 2.0**-126
    before = control_bits()
    out, context = kt.forward(problem, inputs)
    context.check("out", out["out"], truth)
    assert control_bits() == before
    if torch.set_flush_denormal(True):
        try:
            flushing = control_bits()
            kt.forward(problem, inputs)
            assert control_bits() == flushing != before
        finally:
            torch.set_flush_denormal(False)


def control_bits() -> int:
    """The control half of x86's MXCSR: rounding, masks, flush to zero, denormals are zero."""
    if "sse" not in {f for f, on in llvm.get_host_cpu_features().items() if on}:
        pytest.skip("the register that holds the modes is x86's MXCSR")
    read = """
        declare void @llvm.x86.sse.stmxcsr(ptr)
        define void @read(ptr %to) { call void @llvm.x86.sse.stmxcsr(ptr %to) ret void }
    """
    triple = llvm.Target.from_triple(llvm.get_process_triple())
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(read), triple.create_target_machine())
    value = ctypes.c_uint32()
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("read"))(
        ctypes.addressof(value)
    )
    status = 0x3F  # exceptions seen so far: arithmetic sets these
    return value.value & ~status


ACTIVATIONS = (("identity", {}), ("relu", {}), ("leaky_relu", {"negative_slope": 0.5}))
SPECIAL = (float("nan"), float("inf"), -float("inf"))


def spoiled(shape: tuple[int, ...], seed: int) -> Tensor:
    """Whole numbers, and here and there a NaN or an infinity in every region of the channels."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-4, 5, shape).astype(np.float32)
    for value in SPECIAL:
        values[rng.random(shape) < 0.01] = value
    return torch.tensor(values)


def torch_block(x: Tensor, w: Tensor, b: Tensor, activation: str, pool: Any) -> Tensor:
    y = F.conv2d(x, w, b, padding=1)
    y = {"relu": F.relu, "identity": lambda v: v, "leaky_relu": lambda v: F.leaky_relu(v, 0.5)}[
        activation
    ](y)
    return y if pool is None else F.max_pool2d(y, pool.rows.size, pool.rows.stride, pool.rows.low)


@pytest.mark.parametrize("channels", [19, 35, 64])
@pytest.mark.parametrize(("activation", "options"), ACTIVATIONS, ids=lambda v: str(v))
@pytest.mark.parametrize("pool", [None, pooling("max", 2), pooling("max", 3, 2, 1)], ids=str)
def test_nan_and_infinities_spread_as_in_torch(
    channels: int, activation: str, options: Any, pool: Any
) -> None:
    """In whole vectors of channels and in what is left over, forward and backward."""
    x, b = spoiled((2, 3, 9, 9), 0).requires_grad_(), spoiled((channels,), 1).requires_grad_()
    w = torch.tensor(kt.integers((channels, 3, 3, 3), 2), dtype=torch.float32).requires_grad_()
    # In float64, where torch multiplies padding out: its float32 kernels skip some products of
    # padding with infinity (NaN by IEEE 754) and not others, depending on the channels.
    theirs = torch_block(x.double(), w.double(), b.double(), activation, pool).float()
    ours = functional.conv_block(x, w, b, padding=1, activation=activation, pool=pool, **options)
    grad = spoiled(tuple(theirs.shape), 3)
    assert theirs.isnan().any() and not theirs.isnan().all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    pairs = zip(*(torch.autograd.grad(y, (x, w, b), grad) for y in (ours, theirs)), strict=True)
    for our, their in pairs:
        torch.testing.assert_close(our, their, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels", [1, 19, 67])
@pytest.mark.parametrize("window", [(2,), (3, 2, 1), (3, 1, 1), (2, 1, 0, 2), (2, 3)], ids=str)
def test_nan_and_infinities_in_pools(channels: int, window: tuple[int, ...]) -> None:
    x = spoiled((2, channels, 9, 8), 0)
    x[0, 0] = -float("inf")
    for layout in LAYOUTS:
        pair = []
        for pool in (functional.max_pool2d, F.max_pool2d):
            leaf = x.clone(memory_format=execution.FORMATS[layout]).requires_grad_()
            y = pool(leaf, *window)
            y.backward(spoiled(tuple(y.shape), 1))
            pair.append((y.detach(), leaf.grad))
        for ours, theirs in zip(*pair, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("line", [
    "conv n0 c19x5x5 k35 3x3 p1 | bias | relu | max 2x2",
    "conv n0 c19x5x5 k35 3x3 s2 p1 | bias | leaky_relu(0.5) | mean 2x2",
    "conv n0 c4x5x5 k4 3x3 g4 | bias | add",
])  # fmt: skip
def test_an_empty_batch(line: str) -> None:
    """Nothing comes out; the gradients of weights and bias are zeros, not leftovers."""
    problem = parse(line)
    assert isinstance(problem, Block)
    inputs = kt.block_inputs(problem)
    for layout, threads in itertools.product(LAYOUTS, (1, 2)):
        saved, _ = kt.forward(problem, inputs, (layout,) * 3, True, threads=threads)
        assert saved["out"].shape == problem.out_shape
        needs = kt.needed(problem)
        grads, _ = kt.backward(problem, inputs, saved, needs, (layout,) * 5, threads=threads)
        assert grads["x"].shape == problem.in_shape
        assert torch.equal(grads["w"], torch.zeros(problem.conv.weight_shape))
        assert torch.equal(grads["bias"], torch.zeros(problem.conv.out_channels))


def test_an_empty_batch_through_a_pool() -> None:
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    for y in (functional.max_pool2d(x, 2), functional.avg_pool2d(x, 2)):
        y.sum().backward()
        assert (y.shape, x.grad.shape) == ((0, 3, 2, 2), x.shape)


# -------------------------------------------------------------------------------------- caches


def train_once(batch: int, height: int, width: int, layout: str) -> None:
    """Two blocks and two pools, forward and backward, on one size of picture."""
    x = torch.ones(batch, 3, height, width).contiguous(memory_format=execution.FORMATS[layout])
    w, v = torch.ones(5, 3, 3, 3, requires_grad=True), torch.ones(5, 5, 3, 3, requires_grad=True)
    x.requires_grad_()
    y = functional.conv_block(x, w, padding=1, activation="relu", pool=pooling("max", 2))
    y = functional.conv_block(y, v, stride=2, padding=2, dilation=2, activation="leaky_relu")
    y = functional.avg_pool2d(functional.max_pool2d(y, 3, 2, 1), 2, 1, 1)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def compiled() -> int:
    """How many kernels were compiled so far."""
    return kernels.kernel.cache_info().misses + kernels.copy_kernel.cache_info().misses


def test_other_sizes_compile_nothing() -> None:
    for layout in LAYOUTS:
        train_once(2, 12, 12, layout)
    before = compiled()
    assert before > 0
    for batch, height, width in itertools.product((0, 1, 5), (9, 10, 17, 32), (9, 16, 31)):
        for layout in LAYOUTS:
            train_once(batch, height, width, layout)
    assert compiled() == before


CACHES = (
    kernels.kernel,
    kernels.copy_kernel,
    compiler.forward,
    compiler.backward,
    compiler.pool_forward,
    compiler.pool_backward_program,
    execution.block_of,
    execution.pool_of,
    execution.parse_steps,
)


def test_every_cache_is_bounded() -> None:
    for cache in CACHES:
        size = cache.cache_info().maxsize
        assert size is not None and size <= 2048, cache


def child_sees_many_sizes() -> None:
    peaks = []
    for n in range(700):
        train_once(1 + n % 3, 9 + n % 37, 9 + n // 37, NCHW)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    full = compiler.forward.cache_info()
    assert full.currsize == full.maxsize < 300
    print(peaks[-1] - peaks[300])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts KiB on Linux")
def test_many_sizes_do_not_grow_the_process() -> None:
    grown = float(kt.in_child("test_kernel_state", "child_sees_many_sizes"))
    assert grown < 8, f"{grown} MiB for 400 further sizes, of which no program was kept"


def test_machine_code_lives_as_long_as_its_programs() -> None:
    problem = parse("conv n1 c5x6x6 k7 3x3 p1 | bias | relu | max 2x2")
    assert isinstance(problem, Block)
    inputs = kt.block_inputs(problem)
    truth = reference.block(problem, **kt.operands(inputs)).out
    _, context = kt.forward(problem, inputs)
    for cache in CACHES:
        cache.cache_clear()
    gc.collect()
    out = kt.unwritten(problem.out_shape)
    tensors = {n: kt.tensor(v) for n, v in inputs.items()}
    kt.run_twice(context.program, tensors, {"out": out}, 1)
    context.check("out", out, truth)


def test_results_do_not_share_memory() -> None:
    """A later call leaves the result of an earlier one alone, also where scratch is shared."""
    problem = parse("max n2 c19x8x8 3x3 s2 p1")
    assert isinstance(problem, Pool)
    w = torch.ones(4, 19, 3, 3)
    first = torch.ones(2, 19, 8, 8)
    pooled, convolved = functional.max_pool2d(first, 3, 2, 1), functional.conv2d(first, w)
    for scale in (2, 3):
        functional.max_pool2d(scale * first, 3, 2, 1)
        functional.conv2d(scale * first, w)
    assert torch.equal(pooled, torch.ones(problem.out_shape))
    assert torch.equal(convolved, torch.full((2, 4, 6, 6), 9.0 * 19))


def test_weights_changed_in_place_are_seen() -> None:
    """Packed weights are not kept: whatever way the tensor was written to."""
    x, w = torch.ones(1, 3, 5, 5), torch.ones(4, 3, 3, 3)
    assert functional.conv2d(x, w)[0, 0, 0, 0] == 27
    w.data.fill_(2)
    assert functional.conv2d(x, w)[0, 0, 0, 0] == 54
    w.numpy()[...] = 3  # raises no version counter
    assert functional.conv2d(x, w)[0, 0, 0, 0] == 81


def test_one_tensor_in_two_places() -> None:
    """The residual is the input, the input is the weight."""
    x = torch.tensor(kt.integers((4, 4, 3, 3), 0), dtype=torch.float32)
    ours = functional.conv_block(x, x, padding=1, residual=x, activation="relu")
    assert torch.equal(ours, F.relu(F.conv2d(x, x, padding=1) + x))
