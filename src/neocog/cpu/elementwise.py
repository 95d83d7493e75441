"""Maps element by element: out = steps(a), steps(a + b) or steps(a * b).

A residual that the steps add is one map more.

All maps are NHWC with strides that arrive at run time. b may be an (N, C, 1, 1) map that every
pixel reads again (row and pixel strides of 0): the product of squeeze-and-excitation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from llvmlite import ir

from ..steps import Act, Add, Affine, Bias, Step
from ..target import Target
from . import epilogue as ep
from .lanes import Emitter, Int
from .pool import VECTORS, channel_blocks
from .runtime import Kernel, compile_kernel

KINDS = ("copy", "add", "mul")
"""a, a + b, a * b."""


@dataclass(frozen=True)
class ElementwisePlan:
    """Everything an elementwise kernel is specialised on.

    ValueError for a kind that is none of KINDS and for a pool among the steps.
    """

    target: Target
    channels: int
    kind: str
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r} is none of {', '.join(KINDS)}")
        for step in self.steps:
            if not isinstance(step, Affine | Act | Add | Bias):
                raise ValueError(f"steps: {step} is no affine, activation, residual or bias")

    @property
    def maps(self) -> tuple[str, ...]:
        """The maps it reads and, last, the one it writes."""
        second = () if self.kind == "copy" else ("b",)
        residual = ("residual",) if ep.adds_residual(self.steps) else ()
        return ("a", *second, *residual, "out")

    @property
    def name(self) -> str:
        """A name for the listing."""
        return f"{self.kind}_c{self.channels}{ep.spelled(self.steps)}"


def fields(plan: ElementwisePlan) -> tuple[str, ...]:
    """What a step of this plan passes. Strides count in elements. Items: images x rows."""
    places = ("*", "_image", "_row", "_pixel")
    names = [f"{m}{place}" for m in plan.maps for place in places]
    return (*names, "rows", "cols", *(f"{p}*" for p in ep.parameters(plan.steps)))


def emit(plan: ElementwisePlan) -> Kernel:
    """Compile the kernel of a plan."""
    e = Emitter(plan.target, plan.name)
    names = fields(plan)
    with e.kernel(names) as (f, begin, end, _):

        def item(number: ir.Value) -> None:
            image, row = e.divmod(number, f.rows)

            def start(name: str) -> ir.Value:
                strides = getattr(f, f"{name}_image"), getattr(f, f"{name}_row")
                offset = e.add(e.mul(image, strides[0]), e.mul(row, strides[1]))
                return e.at(getattr(f, name), offset)

            places = {name: start(name) for name in plan.maps}
            if plan.channels % e.lanes == 0 or ep.parameters(plan.steps):
                _pixels(e, plan, f, places)
                return
            # Tails in every pixel are slow; dense rows without them are one long vector.
            dense = [e.equal(getattr(f, f"{name}_pixel"), plan.channels) for name in plan.maps]
            every = dense[0]
            for other in dense[1:]:
                every = e.b.and_(every, other)
            length = e.mul(f.cols, plan.channels)
            e.choose(
                every,
                lambda: _run(e, plan, places, length),
                lambda: _pixels(e, plan, f, places),
            )

        e.loop(begin, end, item)
    return compile_kernel(e, names)


def _pixels(e: Emitter, plan: ElementwisePlan, f: SimpleNamespace, places: dict) -> None:
    """A row, pixel by pixel."""

    def pixel(p: Int) -> None:
        here = {
            name: e.at(place, e.mul(p, getattr(f, f"{name}_pixel")))
            for name, place in places.items()
        }

        def block(first: Int, vectors: int, masks: Sequence[ir.Value | None]) -> None:
            for j in range(vectors):
                offset = e.add(first, j * e.lanes)
                loaded = ep.load_parameters(e, plan.steps, f, offset, masks[j])
                _vector(e, plan, here, offset, masks[j], loaded)

        channel_blocks(e, plan.channels, block)

    e.loop(0, f.cols, pixel)


def _run(e: Emitter, plan: ElementwisePlan, places: dict, length: Int) -> None:
    """``length`` neighbouring elements, without parameters."""
    block = VECTORS * e.lanes
    whole = e.sub(length, e.divmod(length, block)[1])

    def several(first: Int) -> None:
        for j in range(VECTORS):
            _vector(e, plan, places, e.add(first, j * e.lanes), None, {})

    def one(first: Int) -> None:
        _vector(e, plan, places, first, e.lane_mask(e.sub(length, first)), {})

    e.loop(0, whole, several, step=block)
    e.loop(whole, length, one, step=e.lanes)


def _vector(
    e: Emitter, plan: ElementwisePlan, places: dict, offset: Int, mask, parameters: dict
) -> None:
    value = e.vload(places["a"], offset, mask)
    if plan.kind != "copy":
        operation = e.b.fadd if plan.kind == "add" else e.b.fmul
        value = operation(value, e.vload(places["b"], offset, mask))

    def residual(_: int) -> ir.Value:
        return e.vload(places["residual"], offset, mask)

    (value,) = ep.finish(e, plan.steps, [value], parameters, residual)
    e.vstore(value, places["out"], offset, mask)
