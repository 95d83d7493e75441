"""The steps of a pool and of its gradient, inside a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from .cpu import pool, pool_backward
from .kernels import kernel, serves_any_size
from .maps import Map
from .problem import Act, Pool, Pooling, Step
from .program import Place, Program
from .target import Target


def pool_steps(
    p: Program, target: Target, problem: Pool, x: Map, out: Map, winners: Place | None,
    before: tuple[Step, ...] = (), parameters: Mapping[str, Place] = MappingProxyType({}),
) -> None:  # fmt: skip
    """One pool from map to map; ``winners`` says where to keep them (max), dense NHWC.

    ``before``: what happens to each value that is read, with its ``parameters``.
    """
    _, channels, rows, cols = problem.out_shape
    fields: dict[str, Place | int] = {**parameters}
    if winners is not None:
        fields |= {"winners": winners, "winners_row": cols * channels, "winners_pixel": channels}
    plan = pool.PoolPlan(target, problem.step, channels, winners is not None, before)
    if problem.whole and winners is None:
        any_size = replace(plan, pool=pool.of_one_tap(plan.pool), whole=True)
        plan = _bounded(plan, any_size)
    p.step(
        kernel(plan),
        problem.batch * rows,
        **x.fields("x"), height=problem.height, width=problem.width,
        **out.fields("out"), rows=rows, cols=cols, **fields,
    )  # fmt: skip
    p.work += problem.batch * channels * problem.height * problem.width


Plan = TypeVar("Plan", bound=pool.PoolPlan | pool_backward.PoolBackwardPlan)


def _bounded(plan: Plan, any_size: Plan) -> Plan:
    """The plan for one window that is the whole map; only small ones get kernels of their own."""
    assert plan.pool is not None
    large = plan.pool.rows.size * plan.pool.cols.size > pool.UNROLLED_TAPS
    if large or serves_any_size(plan, lambda: kernel(any_size)):
        return any_size
    return plan


def unpool(
    p: Program,
    target: Target,
    pooling: Pooling | None,
    act: Act,
    shape: Sequence[int],
    pooled_shape: Sequence[int],
    grad: Map,
    out: Map,
    result: Map | None,
    winners: Place | None,
) -> None:
    """The gradient ``out`` of a map of ``shape`` from that of its activated and pooled result.

    ``result``: the activation's, pooled if the pool selects, where the activation needs it;
    ``winners``: of a max pool.
    """
    batch, channels, height, width = shape
    _, _, rows, cols = pooled_shape
    plan = pool_backward.PoolBackwardPlan(target, channels, act, pooling)
    if pooling and pooling.kind == "mean" and Pool.of(pooling, *shape).whole:
        any_size = replace(plan, pool=pool.of_one_tap(pooling), whole=True)
        plan = _bounded(plan, any_size)
    fields: dict[str, Place | int] = {}
    if plan.reads_result:
        assert result is not None
        fields |= result.fields("result")
    if pooling and plan.selects:
        assert winners is not None
        fields |= {"winners": winners, "winners_row": cols * channels,
                   "winners_pixel": channels}  # fmt: skip
    p.step(
        kernel(plan), pool_backward.items(plan, batch, rows),
        **grad.fields("grad"), rows=rows, cols=cols,
        **out.fields("out"), height=height, width=width, **fields,
    )  # fmt: skip
    p.work += batch * channels * height * width
