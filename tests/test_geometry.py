"""Window arithmetic against windows laid on a line of positions one by one."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import axes, windows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from neocog.geometry import ReceptiveField, Window, same_padding

Triples = set[tuple[int, int, int]]


def positions(window: Window, n: int) -> list[int | None]:
    """The padded axis written out: an input's index, or None for padding and what lies between."""
    inputs = {i * window.base_dilation: i for i in range(n)}
    end = (n - 1) * window.base_dilation + 1 + window.high
    return [inputs.get(position) for position in range(-window.low, end)]


def starts(window: Window, n: int) -> list[int]:
    """Where on that line the windows begin."""
    length = len(positions(window, n))
    found: list[int] = []
    start = 0
    while True:
        if not window.ceil and start + window.span > length:
            return found
        # A window in ceil mode may hang over by less than a stride, but not begin in the padding.
        beyond = start + window.span - length >= window.stride
        if window.ceil and (beyond or start >= length - window.high):
            return found
        found.append(start)
        start += window.stride


def triples(window: Window, n: int) -> Triples:
    """(output, tap, input) by looking at the line."""
    found: Triples = set()
    line = positions(window, n)
    for o, start in enumerate(starts(window, n)):
        for k, i in enumerate(line[start : start + window.span : window.dilation]):
            if i is not None:
                found.add((o, k, i))
    return found


@st.composite
def anywhere(draw: st.DrawFn) -> tuple[Window, int]:
    """A window and a number of inputs that leave something of the axis, if not of an output."""
    window = draw(windows())
    n = draw(st.integers(1, 12))
    while not positions(window, n):
        n += 1
    return window, n


def asked(window: Window, n: int) -> Triples:
    """The same through Window.taps."""
    return {(o, k, i) for o in range(window.out_size(n)) for k, i in window.taps(o, n)}


@given(anywhere())
def test_out_size_counts_the_windows(case: tuple[Window, int]) -> None:
    window, n = case
    assert max(window.out_size(n), 0) == len(starts(window, n))


@given(axes())
def test_taps_are_the_inputs_under_the_window(case: tuple[Window, int]) -> None:
    window, n = case
    assert asked(window, n) == triples(window, n)


@given(axes())
def test_taps_come_in_the_order_of_the_kernel(case: tuple[Window, int]) -> None:
    window, n = case
    for o in range(window.out_size(n)):
        taps = window.taps(o, n)
        assert taps == tuple(sorted(taps))


@given(axes())
def test_padded_taps_are_those_on_the_line(case: tuple[Window, int]) -> None:
    window, n = case
    length = len(positions(window, n))
    for o, start in enumerate(starts(window, n)):
        on_line = tuple(k for k in range(window.size) if start + k * window.dilation < length)
        assert window.padded_taps(o, n) == on_line
        assert window.ceil or len(on_line) == window.size


@given(axes())
def test_adjoint_reads_the_same_pairs_backwards(case: tuple[Window, int]) -> None:
    window, n = case
    adjoint, out = window.adjoint(n), window.out_size(n)
    assert adjoint.out_size(out) == n
    assert {(o, window.size - 1 - k, i) for i, k, o in asked(adjoint, out)} == asked(window, n)
    assert adjoint.adjoint(out).low == window.low


@given(axes())
def test_exchanged_has_the_taps_for_outputs(case: tuple[Window, int]) -> None:
    window, n = case
    exchanged = window.exchanged(n)
    assert exchanged.out_size(n) == window.size
    assert {(o, k, i) for k, o, i in asked(exchanged, n)} == asked(window, n)


@given(axes())
def test_phases_are_the_outputs_sorted_by_their_taps(case: tuple[Window, int]) -> None:
    window, n = case
    outputs = []
    found: Triples = set()
    for phase in window.phases(n):
        for j in range(phase.count):
            o = phase.start + phase.step * j
            outputs.append(o)
            found |= {(o, k, phase.stride * j + offset) for k, offset in phase.taps}
    assert sorted(outputs) == list(range(window.out_size(n)))
    assert {(o, k, i) for o, k, i in found if 0 <= i < n} == asked(window, n)


@given(axes(), st.integers(1, 30))
def test_phases_differ_between_sizes_in_their_counts_only(
    case: tuple[Window, int], more: int
) -> None:
    window, n = case
    for small, large in zip(window.phases(n), window.phases(n + more), strict=True):
        assert (small.start, small.step, small.stride, small.taps) == (
            large.start,
            large.step,
            large.stride,
            large.taps,
        )


def test_phases_of_an_ordinary_window_are_one() -> None:
    (phase,) = Window(3, stride=2, low=1, high=1).phases(9)
    assert (phase.start, phase.step, phase.count, phase.stride) == (0, 1, 5, 2)
    assert phase.taps == ((0, -1), (1, 0), (2, 1))


def test_phases_without_a_tap_are_listed() -> None:
    # A 1x1 kernel of stride 2 reads every other input; the gradient of the rest is zero.
    even, odd = Window(1, stride=2).adjoint(5).phases(3)
    assert (even.count, even.taps) == (3, ((0, 0),))
    assert (odd.count, odd.taps) == (2, ())


@given(axes())
def test_unused_inputs_are_those_under_no_window(case: tuple[Window, int]) -> None:
    window, n = case
    reached = {i for _, _, i in triples(window, n)}
    assert window.unused(n) == tuple(i for i in range(n) if i not in reached)


@given(anywhere())
def test_the_formula_is_true(case: tuple[Window, int]) -> None:
    window, n = case
    left, right = window.formula(n).split(" = ")
    # The remark on a window dropped in ceil mode is words, not arithmetic.
    left = re.sub(r" \([a-z ]+\)$", "", left)
    value = eval(left, {"floor": math.floor, "ceil": math.ceil})
    assert value == int(right) == window.out_size(n)


def test_the_formula_reads_as_in_the_manual() -> None:
    assert Window(3, low=1, high=1).formula(28) == "floor((28 - 1*(3-1) - 1 + 1 + 1)/1) + 1 = 28"
    assert Window(2, stride=2, ceil=True).formula(7) == (
        "ceil((7 - 1*(2-1) - 1 + 0 + 0)/2) + 1 = 4"
    )
    assert Window(2, stride=4, low=1, high=1, ceil=True).formula(5) == (
        "ceil((5 - 1*(2-1) - 1 + 1 + 1)/4) + 1 - 1 (the last would start past the input) = 2"
    )


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_out_size_is_torchs(size: int, stride: int, dilation: int, ceil: bool) -> None:
    for padding in range(size // 2 + 1):
        window = Window(size, stride, dilation, low=padding, high=padding, ceil=ceil)
        for n in range(1, 16):
            if window.out_size(n) < 1:
                continue
            line = torch.zeros(1, 1, n)
            out = torch.nn.functional.max_pool1d(line, size, stride, padding, dilation, ceil)
            assert window.out_size(n) == out.shape[-1], (window, n)


def symbolic(n: int) -> tuple[Any, ShapeEnv]:
    """A size as fake kernels see it."""
    env = ShapeEnv()
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    mode = FakeTensorMode(shape_env=env)
    fake = mode.from_tensor(torch.empty(n), symbolic_context=context)
    size = fake.shape[0]
    assert isinstance(size, torch.SymInt)
    return size, env


def test_out_size_of_a_symbol_is_an_expression_that_decides_nothing() -> None:
    n, env = symbolic(29)
    out = Window(3, stride=2, dilation=2, low=1, high=2, base_dilation=3).out_size(n)
    assert isinstance(out, torch.SymInt)
    assert not env.guards
    assert int(out) == Window(3, stride=2, dilation=2, low=1, high=2, base_dilation=3).out_size(29)


def test_out_size_of_a_symbol_in_ceil_mode() -> None:
    n, _ = symbolic(29)
    window = Window(3, stride=2, low=1, high=1, ceil=True)
    out = window.out_size(n)
    assert isinstance(out, torch.SymInt)
    assert int(out) == window.out_size(29)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 20))
def test_same_padding_keeps_the_size(size: int, dilation: int, n: int) -> None:
    low, high = same_padding(size, dilation)
    assert Window(size, dilation=dilation, low=low, high=high).out_size(n) == n
    assert high - low in (0, 1)


def test_zero_padding_that_keeps_the_size() -> None:
    assert same_padding(3) == (1, 1)
    assert same_padding(5) == (2, 2)
    assert same_padding(2) == (0, 1)


def dependencies(stack: list[Window], n: int) -> list[set[int]]:
    """For each output of the stack, the inputs it depends on, followed layer by layer."""
    seen = [{i} for i in range(n)]
    for window in stack:
        size = len(seen)
        seen = [
            set().union(*(seen[i] for _, i in window.taps(o, size)))
            for o in range(window.out_size(size))
        ]
    return seen


@given(st.lists(windows(spread=False, padding=2), min_size=1, max_size=4), st.integers(1, 40))
def test_receptive_field_holds_all_that_an_output_depends_on(stack: list[Window], n: int) -> None:
    field = ReceptiveField()
    for window in stack:
        field = field.through(window)
    for o, inputs in enumerate(dependencies(stack, n)):
        first, stop = field.interval(o, n)
        assert 0 <= first <= stop <= n
        assert inputs <= set(range(first, stop))


@given(
    st.lists(windows(spread=False, padding=0, ceil=False), min_size=1, max_size=3),
    st.integers(20, 60),
)
def test_receptive_field_is_tight_without_padding(stack: list[Window], n: int) -> None:
    field = ReceptiveField()
    for window in stack:
        field = field.through(window)
    for o, inputs in enumerate(dependencies(stack, n)):
        assert (min(inputs), max(inputs) + 1) == field.interval(o, n)
        assert max(inputs) + 1 - min(inputs) == field.size
        assert min(inputs) == field.start + o * field.jump


def test_receptive_field_of_the_first_network() -> None:
    conv, pool = Window(3, low=1, high=1), Window(2, stride=2)
    field = ReceptiveField().through(conv).through(pool).through(conv).through(pool)
    assert field == ReceptiveField(size=10, jump=4, start=-3)
    assert field.interval(0, 28) == (0, 7)
    assert field.interval(6, 28) == (21, 28)


def test_receptive_field_refuses_spread_inputs() -> None:
    with pytest.raises(ValueError, match="base dilation 1, got Window.*base_dilation=2"):
        ReceptiveField().through(Window(3, base_dilation=2))
