"""Which algorithm computes a convolution of a frozen or live network: the cheapest by estimate."""

from __future__ import annotations

from . import convolutions, winograd_steps
from .convolutions import Weights
from .maps import Halo, halo_of
from .problem import Conv, Pool, Step
from .program import Place, Program
from .target import Target

DIRECT = "direct"

SHORT_SUMS = "short sums"
"""Direct convolution that rounds less."""

WINOGRAD = {"winograd6": 6, "winograd4": 4, "winograd2": 2}
"""Name -> m, the side of an output tile."""

COARSE = ("winograd6",)
"""Single results are off by up to 1e-5 of the largest, those of other algorithms by 3e-6: only for
values of which later layers take long sums, which average the errors."""

AVERAGED = 256
"""Terms of a sum that is long enough for that."""

PLANES = 4
"""Up to so many channels of an input are read as the planes they come as."""

DIRECT_SHARE = 0.9
"""Share of the processor's peak that direct convolution reaches on layers Winograd covers."""


def algorithm(
    target: Target,
    conv: Conv,
    epilogue: tuple[Step, ...] = (),
    exact: bool = False,
    averaged: int = 0,
) -> str:
    """The algorithm for ``conv``; ``exact``: direct convolution, long sums cut short.

    ``averaged``: terms of the sums that take its values, see ``network.Layer``.
    """
    if exact and convolutions.shortens(conv, epilogue):
        return SHORT_SUMS
    if exact or not winograd_steps.covers(conv, epilogue) or not conv.multiply_adds:
        return DIRECT
    costs = {
        name: winograd_steps.cost(target, conv, m)
        for name, m in WINOGRAD.items()
        if winograd_steps.has_tiles(conv, m) and (averaged >= AVERAGED or name not in COARSE)
    }
    costs[DIRECT] = _direct_cost(target, conv)
    return min(costs, key=lambda name: costs[name])


def _direct_cost(target: Target, conv: Conv) -> float:
    """In multiply-adds at the peak, like :func:`winograd_steps.cost`; whole vectors count."""
    lanes = -(-conv.out_channels // target.lanes) * target.lanes
    return conv.multiply_adds * lanes / conv.out_channels / DIRECT_SHARE


def fuses_pool(
    target: Target, conv: Conv, epilogue: tuple[Step, ...], pool: Pool, exact: bool = False
) -> bool:
    """Whether to pool in the epilogue; not where that would cost the faster algorithm."""
    without = algorithm(target, conv, epilogue, exact, AVERAGED)
    return algorithm(target, conv, (*epilogue, pool.step), exact, AVERAGED) == without


def halo(conv: Conv, chosen: str) -> Halo:
    """What the algorithm reads around its input, in zeros."""
    if chosen in WINOGRAD and winograd_steps.folds(conv):
        return Halo()
    return halo_of(conv)


def reads_planes(conv: Conv, chosen: str) -> bool:
    """Whether the algorithm reads inputs of few channels as the planes that NCHW has."""
    if conv.in_channels > PLANES or conv.groups != 1:
        return False
    return chosen == DIRECT or winograd_steps.folds(conv)


def packed_elements(target: Target, conv: Conv, chosen: str) -> int:
    """float32 elements of the packed weights."""
    if chosen in WINOGRAD:
        plan = winograd_steps.plan_of(target, conv, m=WINOGRAD[chosen])
        return winograd_steps.packed_elements(plan)
    return convolutions.packed_elements(target, conv)


def pack(
    p: Program, target: Target, conv: Conv, chosen: str, weights: Weights, packed: Place
) -> None:
    """The step that packs the weights."""
    if chosen in WINOGRAD:
        winograd_steps.pack(p, target, conv, weights, packed, WINOGRAD[chosen])
    else:
        convolutions.pack(p, target, conv, weights, packed)


def convolve(p: Program, target: Target, conv: Conv, chosen: str, x, packed: Place, out, epilogue,
             extra, plane: int = 0) -> None:  # fmt: skip
    """The steps of one convolution with its epilogue on packed weights.

    ``plane``: elements between the channels of ``x`` where they are planes, as :func:`reads_planes`
    allows.
    """
    if chosen in WINOGRAD:
        m = WINOGRAD[chosen]
        winograd_steps.convolve(p, target, conv, x, packed, out, epilogue, extra, m, plane)
    else:
        convolutions.convolve_packed(
            p, target, conv, x, packed, out, epilogue, None, extra, plane=plane,
            short=chosen == SHORT_SUMS,
        )  # fmt: skip
