"""Which algorithm computes a convolution of a frozen or live network: the cheapest by estimate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import convolutions, winograd_steps
from .convolutions import Weights
from .kernels import many_sizes, settle
from .maps import FEW, Halo, Map, halo_of
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

AVERAGED = 1024
"""Terms of a sum that is long enough for that.

Errors of ResNet-18 with seen statistics (benchmarks/network_errors.py), over PyTorch's: up to 5.7
with coarse layers before sums of 576 terms, 3.6 with such before 1152 and more, 3 without any.
Where a map is returned no sum is long enough (see :mod:`neocog.fusion`): errors of a U-Net were 13
times PyTorch's, and 5 with this limit alone.
"""

DIRECT_SHARE = 0.9
"""Share of the processor's peak that direct convolution reaches on layers Winograd covers."""


Choice = Callable[[Conv, tuple[Step, ...], int], str]
"""(conv, epilogue, averaged) -> the name of an algorithm; see :func:`algorithm`."""


def candidates(conv: Conv, epilogue: tuple[Step, ...] = (), averaged: int = 0) -> list[str]:
    """The algorithms for ``conv``.

    ``averaged``: terms of the sums that take its values, see ``network.Layer``.
    """
    if not winograd_steps.covers(conv, epilogue) or not conv.multiply_adds:
        return [DIRECT]
    return [DIRECT] + [
        name
        for name, m in WINOGRAD.items()
        if winograd_steps.has_tiles(conv, m) and (averaged >= AVERAGED or name not in COARSE)
    ]


def algorithm(
    target: Target, conv: Conv, epilogue: tuple[Step, ...] = (), averaged: int = 0
) -> str:
    """The algorithm for ``conv`` that is estimated to be the fastest."""
    found = candidates(conv, epilogue, averaged)
    if len(found) == 1:
        return found[0]

    def cheapest() -> str:
        return min(found, key=lambda name: cost(target, conv, name))

    return settle((layer(conv), epilogue, averaged >= AVERAGED), cheapest)


def layer(conv: Conv) -> Conv:
    """``conv`` without its sizes: the smallest with these channels and windows."""
    rows, cols = (replace(window, low=0, high=0) for window in (conv.rows, conv.cols))
    return replace(conv, batch=1, height=rows.span, width=cols.span, rows=rows, cols=cols)


def exact(conv: Conv, epilogue: tuple[Step, ...] = (), averaged: int = 0) -> str:
    """The algorithm for ``conv`` that rounds least: direct, long sums cut short."""
    return SHORT_SUMS if convolutions.shortens(conv, epilogue) else DIRECT


def cost(target: Target, conv: Conv, name: str) -> float:
    """The time of an algorithm on one thread, in multiply-adds at the processor's peak."""
    if name == DIRECT:
        return _direct_cost(target, conv)
    return winograd_steps.cost(target, conv, WINOGRAD[name])


def _direct_cost(target: Target, conv: Conv) -> float:
    """In multiply-adds at the peak, like :func:`winograd_steps.cost`; whole vectors count."""
    lanes = -(-conv.out_channels // target.lanes) * target.lanes
    return conv.multiply_adds * lanes / conv.out_channels / DIRECT_SHARE


def fuses_pool(choose: Choice, conv: Conv, epilogue: tuple[Step, ...], pool: Pool) -> bool:
    """Whether to pool in the epilogue; not where that would cost the better algorithm."""
    if pool.whole and many_sizes():
        return False  # its window is another one in every size
    without = choose(conv, epilogue, AVERAGED)
    return choose(conv, (*epilogue, pool.step), AVERAGED) == without


def halo(conv: Conv, chosen: str) -> Halo:
    """What the algorithm reads around its input, in zeros."""
    if chosen in WINOGRAD and winograd_steps.folds(conv):
        return Halo()
    return halo_of(conv)


def reads_planes(conv: Conv, chosen: str) -> bool:
    """Whether the algorithm reads inputs of few channels as the planes that NCHW has."""
    if conv.in_channels > FEW or conv.groups != 1:
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
             extra, plane: int = 0, winners: Map | None = None) -> None:  # fmt: skip
    """The steps of one convolution with its epilogue on packed weights.

    ``plane``: elements between the channels of ``x`` where they are planes, as :func:`reads_planes`
    allows. ``winners``: where direct convolution keeps those of a max pool.
    """
    if chosen in WINOGRAD:
        m = WINOGRAD[chosen]
        winograd_steps.convolve(p, target, conv, x, packed, out, epilogue, extra, m, plane)
    else:
        convolutions.convolve_packed(
            p, target, conv, x, packed, out, epilogue, winners, extra, plane=plane,
            short=chosen == SHORT_SUMS,
        )  # fmt: skip


def convolve_packing(
    p: Program, target: Target, conv: Conv, chosen: str, weights: Weights, x, out, epilogue, extra,
    winners: Map | None = None,
) -> None:  # fmt: skip
    """:func:`pack` and :func:`convolve` for weights that serve once."""
    if chosen in WINOGRAD:
        winograd_steps.convolve_packing(
            p, target, conv, weights, x, out, epilogue, extra, WINOGRAD[chosen]
        )
        return
    packed = p.scratch(packed_elements(target, conv, chosen))
    pack(p, target, conv, chosen, weights, packed)
    convolve(p, target, conv, chosen, x, packed, out, epilogue, extra, winners=winners)
