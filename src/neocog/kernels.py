"""Compiled kernels, kept by plan, and how many of them one model may have.

Kernels that are made for one size are faster than those for any. The first sizes that a model meets
get kernels of their own; with the third, those for any size are compiled too, and from the fourth
on nothing is: see :class:`Sizes`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

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


OWN_SIZES = 2
"""Sizes of a model that get kernels of their own."""

Value = TypeVar("Value")


@functools.lru_cache(KERNELS_KEPT)
def kernel(plan: Any) -> Kernel:
    """The compiled kernel of a plan."""
    return cached(EMITTERS[type(plan)], plan)


@functools.lru_cache(KERNELS_KEPT)
def copy_kernel(kind: Callable[..., Kernel], *args: Any) -> Kernel:
    """A compiled copy kernel: ``kind`` is a function of :mod:`neocog.cpu.copy`."""
    return cached(kind, *args)


def compiled() -> int:
    """How many kernels this process has asked for that were not there yet."""
    return kernel.cache_info().misses + copy_kernel.cache_info().misses


@dataclass
class Sizes:
    """The sizes of its inputs that one model has met, and what it got for the first of them."""

    met: dict[Hashable, int] = field(default_factory=dict)
    """The number of each size, from 1 on."""
    own: set[Hashable] = field(default_factory=set)
    """Plans of kernels that were made for one size."""
    settled: dict[Hashable, Any] = field(default_factory=dict)
    """Choices that later sizes share."""

    @contextmanager
    def size(self, key: Hashable) -> Iterator[None]:
        """Programs made inside are for this size, which may have been met before.

        It then gets the same kernels as then, and the same bits.
        """
        with self.again(self.met.setdefault(key, len(self.met) + 1)):
            yield

    @contextmanager
    def again(self, number: int) -> Iterator[None]:
        """Programs made inside are for the size that came as number ``number``, from 1 on."""
        before = _now()
        _local.now = (self, number)
        try:
            yield
        finally:
            _local.now = before


_local = threading.local()


def _now() -> tuple[Sizes, int] | None:
    """Whose programs are being made in this thread, and for which of its sizes."""
    found: tuple[Sizes, int] | None = getattr(_local, "now", None)
    return found


@dataclass(frozen=True)
class Moment:
    """A size of a model, for programs that are made later."""

    sizes: Sizes
    number: int

    @classmethod
    def now(cls) -> Moment | None:
        """The size whose programs are being made in this thread."""
        found = _now()
        return None if found is None else cls(*found)


@contextmanager
def at(moment: Moment | None) -> Iterator[None]:
    """Programs made inside are for this size."""
    if moment is None:
        yield
        return
    with moment.sizes.again(moment.number):
        yield


def many_sizes() -> bool:
    """Whether programs are being made for a size that gets no kernels of its own."""
    now = _now()
    return now is not None and now[1] > OWN_SIZES


def serves_any_size(own: Hashable, prepare: Callable[[], object]) -> bool:
    """Whether kernels for any size take the place of those of the plans ``own``.

    Not for the first sizes of a model, nor where it has them. ``prepare``: compiles those for any
    size, so that no later size has to.
    """
    now = _now()
    if now is None:
        return False
    sizes, number = now
    if number <= OWN_SIZES:
        sizes.own.add(own)
        return False
    prepare()
    return own not in sizes.own


def settle(about: Hashable, decide: Callable[[], Value]) -> Value:
    """A choice that depends on the size: from the third one on what the third one got."""
    now = _now()
    if now is None or not many_sizes():
        return decide()
    settled = now[0].settled
    if about not in settled:
        settled[about] = decide()
    found: Value = settled[about]
    return found
