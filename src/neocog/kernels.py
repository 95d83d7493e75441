"""Compiled kernels, kept by plan: a new batch or image size finds all of them compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .cpu import (
    batch_norm,
    checksum,
    depthwise,
    depthwise_gradient,
    direct,
    elementwise,
    linear,
    pool,
    pool_backward,
    scatter,
    weight_gradient,
    winograd_gradient,
)
from .cpu.runtime import Kernel, cached

KERNELS_KEPT = 512

EMITTERS: dict[type, Callable[[Any], Kernel]] = {
    batch_norm.MomentsPlan: batch_norm.emit_lines,
    batch_norm.StatisticsPlan: batch_norm.emit_statistics,
    batch_norm.NormGradientPlan: batch_norm.emit_lines,
    batch_norm.CoefficientsPlan: batch_norm.emit_coefficients,
    checksum.ChecksumPlan: checksum.emit,
    direct.DirectPlan: direct.emit,
    elementwise.ElementwisePlan: elementwise.emit,
    linear.LinearPlan: linear.emit,
    depthwise.DepthwisePlan: depthwise.emit,
    depthwise_gradient.DepthwiseGradientPlan: depthwise_gradient.emit,
    pool.PoolPlan: pool.emit,
    pool_backward.PoolBackwardPlan: pool_backward.emit,
    scatter.ScatterPlan: scatter.emit,
    weight_gradient.WeightGradientPlan: weight_gradient.emit,
    winograd_gradient.WinogradGradientPlan: winograd_gradient.emit,
}


@functools.lru_cache(KERNELS_KEPT)
def kernel(plan: Any) -> Kernel:
    """The compiled kernel of a plan."""
    return cached(EMITTERS[type(plan)], plan)


@functools.lru_cache(KERNELS_KEPT)
def copy_kernel(kind: Callable[..., Kernel], *args: Any) -> Kernel:
    """A compiled copy kernel: ``kind`` is a function of :mod:`neocog.cpu.copy`."""
    return cached(kind, *args)
