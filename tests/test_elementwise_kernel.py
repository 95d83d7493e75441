"""The elementwise kernels against float64, on every target, in memory full of NaN."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import kernel_tools as kt
import numpy as np
import pytest
import torch
from torch_oracle import torch_activation

from neocog.activations import ACTIVATIONS
from neocog.cpu import elementwise
from neocog.cpu.elementwise import ElementwisePlan
from neocog.program import Place, Program
from neocog.steps import Act, Add, Affine, Bias, Step, read_step
from neocog.target import Target

CHANNELS = (1, 3, 16, 19, 64, 67, 128, 131)
OPERATIONS = {"copy": lambda a, b: a, "add": np.add, "mul": np.multiply}

emit = functools.cache(elementwise.emit)


@dataclass
class Memory:
    """An NHWC map with NaN between its pixels, between its rows, and around it."""

    values: np.ndarray
    gap: int
    broadcast: bool = False
    """Whether it is (N, 1, 1, C), read at every pixel."""
    tensor: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        n, h, w, c = self.values.shape
        self.tensor = torch.full((n + 2, h + bool(self.gap), w + self.gap, c + self.gap), math.nan)
        self.inside[:] = torch.tensor(self.values, dtype=torch.float32)

    @property
    def inside(self) -> torch.Tensor:
        n, h, w, c = self.values.shape
        return self.tensor[1 : n + 1, :h, :w, :c]

    def fields(self, name: str, place: Place) -> dict[str, Place | int]:
        image, row, pixel, _ = self.tensor.stride()
        if self.broadcast:
            row = pixel = 0
        return {name: place + image, f"{name}_image": image, f"{name}_row": row,
                f"{name}_pixel": pixel}  # fmt: skip


def run(
    target: Target,
    kind: str,
    maps: Sequence[Memory],
    steps: tuple[Step, ...] = (),
    vectors: dict[str, np.ndarray] | None = None,
    gap: int = 0,
    threads: int = 1,
    residual: Memory | None = None,
) -> np.ndarray:
    """The NHWC result of ``kind`` on one or two maps; nothing around it was written."""
    shape = maps[0].values.shape
    out = Memory(np.full(shape, math.nan), gap)
    known = {"a": maps[0], "b": maps[-1]} if kind != "copy" else {"a": maps[0]}
    if residual is not None:
        known["residual"] = residual
    memories = known | {"out": out}
    small = {
        name: torch.tensor(np.r_[values, math.nan], dtype=torch.float32)
        for name, values in (vectors or {}).items()
    }
    program = Program((*memories, *small))
    fields: dict[str, Place | int] = {name: program.buffer(name) for name in small}
    for name, memory in memories.items():
        fields |= memory.fields(name, program.buffer(name))
    n, rows, cols, channels = shape
    kernel = emit(ElementwisePlan(target, channels, kind, steps))
    program.step(kernel, n * rows, **fields, rows=rows, cols=cols)
    tensors = [*(m.tensor for m in memories.values()), *small.values()]
    program.run(*(t.data_ptr() for t in tensors), threads=threads)
    result = out.inside.clone().numpy()
    out.inside[:] = math.nan
    assert out.tensor.isnan().all(), "written outside of the result"
    return result


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_kind_in_every_layout(target: Target, kind: str, channels: int) -> None:
    for (n, h, w), gap, out_gap in itertools.product(
        ((1, 1, 1), (2, 3, 5), (1, 2, 17)), (0, 3), (0, 5)
    ):
        a, b = (kt.integers((n, h, w, channels), seed) for seed in (1, 2))
        ours = run(target, kind, (Memory(a, gap), Memory(b, 0)), gap=out_gap)
        np.testing.assert_array_equal(ours, OPERATIONS[kind](a, b))


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
@pytest.mark.parametrize("channels", CHANNELS)
def test_one_pixel_for_all_pixels(target: Target, channels: int) -> None:
    """Squeeze-and-excitation: b is (N, C, 1, 1)."""
    a, b = kt.integers((3, 4, 5, channels), 1), kt.integers((3, 1, 1, channels), 2)
    for kind, gap in itertools.product(("add", "mul"), (0, 3)):
        ours = run(target, kind, (Memory(a, gap), Memory(b, gap, broadcast=True)))
        np.testing.assert_array_equal(ours, OPERATIONS[kind](a, b))


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_steps_follow_in_order(target: Target, name: str) -> None:
    act = Act(name, 0.25 if ACTIVATIONS[name].takes_slope else 0.0)
    forward = ACTIVATIONS[name].forward
    for channels in (19, 64):
        a, b = (kt.integers((2, 3, 5, channels), seed) for seed in (1, 2))
        vectors = {n: kt.integers((channels,), i) for i, n in enumerate(("bias", "scale", "shift"))}
        maps = Memory(a, 0), Memory(b, 0)
        ours = run(target, "add", maps, (act,))
        np.testing.assert_allclose(ours, forward(a + b, act.slope), rtol=1e-6, atol=1e-7)
        ours = run(target, "mul", maps, (Bias(), act, Affine()), vectors)
        expected = forward(a * b + vectors["bias"], act.slope)
        expected = vectors["scale"] * expected + vectors["shift"]
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
@pytest.mark.parametrize("channels", (3, 19, 64, 67))
def test_a_residual_where_the_steps_add_it(target: Target, channels: int) -> None:
    a, b, residual = (kt.integers((2, 3, 5, channels), seed) for seed in (1, 2, 3))
    vectors = {n: kt.integers((channels,), i) for i, n in enumerate(("scale", "shift"))}
    for kind, gap in itertools.product(OPERATIONS, (0, 3)):
        maps, third = (Memory(a, 0), Memory(b, gap))[: 1 + (kind != "copy")], Memory(residual, gap)
        found = OPERATIONS[kind](a, b)
        ours = run(target, kind, maps, (Add(), Act("relu")), residual=third)
        np.testing.assert_array_equal(ours, np.maximum(found + residual, 0))
        steps = (Affine(), Act("relu"), Add())
        ours = run(target, kind, maps, steps, vectors, residual=third)
        expected = np.maximum(found * vectors["scale"] + vectors["shift"], 0) + residual
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_nan_and_infinities_pass_as_in_torch(target: Target) -> None:
    hostile = np.array([math.nan, math.inf, -math.inf, 1.0, -0.0])
    for channels, gap in itertools.product((19, 64), (0, 3)):
        a = np.resize(hostile, (2, 3, 4, channels))
        b = np.resize(np.roll(hostile, 2)[:4], a.shape)
        with np.errstate(invalid="ignore"):
            total, product = a + b, a * b
        maps = Memory(a, gap), Memory(b, gap)
        np.testing.assert_array_equal(run(target, "copy", maps[:1]), a)
        np.testing.assert_array_equal(run(target, "mul", maps), product)
        theirs = torch_activation(Act("relu"), torch.tensor(total)).detach().numpy()
        np.testing.assert_array_equal(run(target, "add", maps, (Act("relu"),)), theirs)


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_an_empty_batch_and_more_threads(target: Target) -> None:
    empty = Memory(np.zeros((0, 3, 4, 19)), 0)
    assert run(target, "add", (empty, empty)).size == 0
    a = kt.normals((3, 5, 7, 67), 1)
    one, two = (run(target, "mul", (Memory(a, 2), Memory(a, 0)), threads=n) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_what_no_kernel_does_is_refused() -> None:
    target = kt.ROWS[0]
    with pytest.raises(ValueError, match="'sub' is none of copy, add, mul"):
        ElementwisePlan(target, 3, "sub")
    pool = read_step("max 2x2 s2x2 p0,0,0,0")
    with pytest.raises(
        ValueError, match="steps: max .* is no affine, activation, residual or bias"
    ):
        ElementwisePlan(target, 3, "copy", (Add(), pool))
