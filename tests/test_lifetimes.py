"""Scratch: buffers that are alive at the same time never share memory."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neocog.cpu import elementwise
from neocog.kernels import kernel
from neocog.lifetimes import Lent, Life, arrange
from neocog.maps import Map
from neocog.program import Place, Program
from neocog.target import host

LINE = 16
N = 48
"""Elements of a buffer of the random programs."""


@st.composite
def lives(draw: st.DrawFn, most: int = 20) -> list[Life]:
    made = []
    for _ in range(draw(st.integers(0, most))):
        first = draw(st.integers(0, 8))
        made.append(Life(LINE * draw(st.integers(1, 20)), first, first + draw(st.integers(0, 5))))
    return made


def apart(spans: list[tuple[int, Life]]) -> bool:
    return all(
        a.last < b.first or b.last < a.first or at + a.size <= other or other + b.size <= at
        for (at, a), (other, b) in itertools.combinations(spans, 2)
    )


@given(lives(), lives(4))
def test_what_meets_is_apart(found: list[Life], used: list[Life]) -> None:
    ends = list(itertools.accumulate((life.size for life in used), initial=0))
    lent = Lent(ends[-1], list(zip(ends, used, strict=False)))
    starts, size = arrange(found, lent)
    assert apart([*lent.used, *zip(starts, found, strict=True)])
    for start, life in zip(starts, found, strict=True):
        inside = start + life.size <= lent.size
        assert inside or lent.size <= start <= start + life.size <= lent.size + size


@given(lives())
def test_no_more_than_all_side_by_side_and_no_less_than_what_is_alive(found: list[Life]) -> None:
    _, size = arrange(found, Lent())
    assert size <= sum(life.size for life in found)
    assert size >= max(
        (sum(o.size for o in found if o.first <= t <= o.last) for t in range(14)), default=0
    )


def test_a_chain_takes_two_buffers() -> None:
    chain = [Life(LINE, i, i + 1) for i in range(10)]
    assert arrange(chain, Lent())[1] == 2 * LINE


def test_lent_memory_comes_first() -> None:
    lent = Lent(4 * LINE, [(0, Life(4 * LINE, 5, 9))])
    starts, size = arrange([Life(2 * LINE, 0, 4), Life(2 * LINE, 4, 5)], lent)
    assert starts[0] < lent.size <= starts[1]
    assert size == 2 * LINE


# programs


def add(p: Program, out: Place, a: Place, b: Place) -> None:
    maps = zip(("out", "a", "b"), (out, a, b), strict=True)
    fields = {}
    for name, place in maps:
        fields |= Map.dense(place, N, 1, 1).fields(name)
    plan = elementwise.ElementwisePlan(host(), N, "add", ())
    p.step(kernel(plan), 1, rows=1, cols=1, **fields)


@settings(max_examples=60)
@given(st.data())
def test_random_programs(data: st.DataObject) -> None:
    """Sums of sums, in scratch, in parts of a buffer, and in iterations on parts of the batch."""
    parts, iterations = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3))
    p = Program(("x", "kept", "out"))
    values = {"x": (p.buffer("x"), 1.0)}
    for i in range(parts):
        given = data.draw(st.booleans())
        place = p.lend(p.buffer("kept") + i * N, N, given)
        if given:
            values[f"kept{i}"] = (place, 10.0**-i)
    results = [i for i in range(parts) if f"kept{i}" not in values]
    free = dict.fromkeys(results)
    lent = {i: Place(-1 - i) for i in results}
    if iterations > 1:
        p.section(iterations)
    steps = data.draw(st.integers(1, 12))
    for number in range(steps):
        names = sorted(values)
        a, b = (values[data.draw(st.sampled_from(names))] for _ in range(2))
        if free and data.draw(st.booleans()):
            i = next(iter(free))
            del free[i]
            place = lent[i]
            values[f"result{i}"] = (place, a[1] + b[1])
        else:
            place = p.scratch(N, shared=data.draw(st.booleans()))
            values[f"scratch{number}"] = (place, a[1] + b[1])
        add(p, place, a[0], b[0])
    last = values[data.draw(st.sampled_from(sorted(values)))]
    add(p, p.buffer("out"), last[0], values["x"][0])
    x, out, kept = torch.ones(N), torch.empty(N), torch.full((4 * N + LINE,), np.nan)
    for i in range(parts):
        kept[i * N : (i + 1) * N] = 10.0**-i
    p.run(x.data_ptr(), kept.data_ptr(), out.data_ptr(), threads=data.draw(st.integers(1, 2)))
    np.testing.assert_allclose(out, last[1] + 1.0, rtol=1e-5)
    for name, (place, value) in values.items():
        if name.startswith("result"):
            number = -1 - place.buffer
            held = kept[number * N : (number + 1) * N]
            np.testing.assert_allclose(held, value, rtol=1e-5)


def test_what_one_iteration_reads_is_still_there_in_the_next() -> None:
    p = Program(("x", "kept", "out"))
    x, part = p.buffer("x"), p.lend(p.buffer("kept"), 4 * N, given=True)
    p.section(2)
    first, later = p.scratch(N), p.scratch(N, shared=True)
    add(p, first, part, x)
    add(p, later, x, x)
    add(p, p.buffer("out"), first, later)
    tensors = torch.ones(N), torch.full((4 * N,), 10.0), torch.empty(N)
    p.run(*(t.data_ptr() for t in tensors), threads=1)
    np.testing.assert_array_equal(tensors[-1], 13.0)
