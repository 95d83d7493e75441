"""Activations inside a program: NHWC maps with halos, and the tensors at a program's border.

A convolution reads its input through a halo of zeros, so that no kernel knows about borders.
Tensors come in PyTorch's two layouts; :func:`read` and :func:`deliver` add the steps that pack and
unpack them where they are not already what a kernel needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from .cpu import copy
from .geometry import Window
from .kernels import copy_kernel
from .problem import Conv
from .program import Place, Program
from .target import Target

FEW = 4
"""Up to so many channels would fill too small a part of a vector: they are read plane by plane, or
copied one by one."""

NCHW, NHWC = "nchw", "nhwc"
"""Layouts at the border: PyTorch's contiguous and channels_last."""


@dataclass(frozen=True)
class Map:
    """An activation in NHWC: element (n, y, x, c) at ``place + n*image + y*row + x*pixel + c``."""

    place: Place
    image: int
    row: int
    pixel: int

    @classmethod
    def dense(cls, place: Place, channels: int, height: int, width: int) -> Map:
        """Without a halo."""
        return cls(place, height * width * channels, width * channels, channels)

    def fields(self, name: str) -> dict[str, Place | int]:
        """What a kernel that calls this map ``name`` wants to know: where it is, its strides."""
        return {name: self.place, f"{name}_image": self.image, f"{name}_row": self.row,
                f"{name}_pixel": self.pixel}  # fmt: skip


@dataclass(frozen=True)
class Halo:
    """Rows and columns of zeros around a map."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    @property
    def empty(self) -> bool:
        """Whether there is none."""
        return not (self.top or self.bottom or self.left or self.right)


def halo_of(conv: Conv) -> Halo:
    """The halo that the taps of ``conv`` reach, which may be less than its padding."""
    top, bottom = _reach(conv.rows, conv.height)
    left, right = _reach(conv.cols, conv.width)
    return Halo(top, bottom, left, right)


FAR_ELEMENTS = 1 << 26
"""float32 elements of a map up to which its halo may take any part of it: 256 MB."""

FAR_SHARE = 16
"""Times the input and output that a larger map with its halo may take."""


def too_far(conv: Conv) -> str | None:
    """Why the halo of ``conv`` is out of proportion, if it is.

    Halos are memory. Taps far apart, or much padding under a wide stride, can reach through more of
    it than input and output take together, by any factor.
    """
    halo = halo_of(conv)
    size = elements_with_halo(conv.in_shape, halo)
    if size <= max(
        FAR_ELEMENTS, FAR_SHARE * (math.prod(conv.in_shape) + math.prod(conv.out_shape))
    ):
        return None
    return (
        f"taps that reach {max(halo.top, halo.bottom)} rows and {max(halo.left, halo.right)} "
        f"columns beyond a map of {conv.height}x{conv.width}: with its halo it would take "
        f"{4 * size / 1e9:,.1f} GB"
    )


def _reach(window: Window, n: int) -> tuple[int, int]:
    low = high = 0
    for phase in window.phases(n):
        offsets = [offset for _, offset in phase.taps]
        if phase.count and offsets:
            low = max(low, -min(offsets))
            high = max(high, phase.stride * (phase.count - 1) + max(offsets) - (n - 1))
    return low, high


def scratch_map(
    p: Program, shape: Sequence[int], halo: Halo, shared: bool = False
) -> tuple[Map, Place]:
    """A map in scratch with room for its halo, and the halo's corner.

    ``shared``: it outlives an iteration of the program's section.
    """
    corner = p.scratch(elements_with_halo(shape, halo), shared)
    return map_with_halo(corner, shape, halo), corner


def elements_with_halo(shape: Sequence[int], halo: Halo) -> int:
    """float32 elements of a map of this shape (N, C, H, W) and its halo."""
    batch, channels, height, width = shape
    return batch * (height + halo.top + halo.bottom) * (width + halo.left + halo.right) * channels


def map_with_halo(corner: Place, shape: Sequence[int], halo: Halo) -> Map:
    """The map of this shape (N, C, H, W) whose halo begins at ``corner``."""
    _, channels, height, width = shape
    row = (width + halo.left + halo.right) * channels
    image = (height + halo.top + halo.bottom) * row
    return Map(corner + (halo.top * row + halo.left * channels), image, row, channels)


def clear_halo(
    p: Program, target: Target, m: Map, corner: Place, shape: Sequence[int], halo: Halo
) -> None:
    """Zero the halo of a map from :func:`scratch_map`, whose interior the next step writes."""
    if halo.empty:
        return
    batch, channels, height, width = shape
    step = p.step(
        copy_kernel(copy.border, target), batch,
        out=corner, out_image=m.image, out_row=m.row, height=height,
        top=halo.top, bottom=halo.bottom, left=halo.left * channels,
        right=halo.right * channels, width_elements=width * channels,
    )  # fmt: skip
    step.alongside = True


def clear(p: Program, target: Target, m: Map, shape: Sequence[int]) -> None:
    """Zero the interior of a map whose pixels stand side by side."""
    batch, channels, height, width = shape
    p.step(
        copy_kernel(copy.border, target), batch,
        out=m.place, out_image=m.image, out_row=m.row, height=height,
        top=0, bottom=0, left=width * channels, right=0, width_elements=0,
    )  # fmt: skip


def residual_map(extra: Mapping[str, Place | int]) -> Map:
    """The residual's map among the fields of an epilogue."""
    strides = (cast(int, extra[f"residual_{name}"]) for name in ("image", "row", "pixel"))
    return Map(cast(Place, extra["residual"]), *strides)


def row_of(m: Map, row: int) -> Map:
    """The map from a row on, which may be one of its halo."""
    return replace(m, place=m.place + row * m.row)


def read(
    p: Program,
    target: Target,
    place: Place,
    layout: str,
    shape: Sequence[int],
    halo: Halo = Halo(),
    own: bool = False,
) -> Map:
    """A tensor as NHWC with a halo: itself if it is that already (unless ``own``), else packed."""
    batch, channels, height, width = shape
    if layout == NHWC and halo.empty and not own:
        return Map.dense(place, channels, height, width)
    made, corner = scratch_map(p, shape, halo)
    _pack(p, target, place, layout, shape, halo, made, corner)
    return made


def read_rows(
    p: Program, target: Target, place: Place, layout: str, conv: Conv
) -> tuple[Map, Conv]:
    """The input of ``conv`` with its halo, and the convolution that reads it as it lies.

    Where most rows lie between two windows, only those that windows read are packed.
    """
    halo, window = halo_of(conv), conv.rows
    packed = layout != NHWC or not halo.empty
    apart = window.stride >= 2 * window.span and max(window.low, window.high) <= 0
    if not packed or not apart or window.base_dilation > 1:
        return read(p, target, place, layout, conv.in_shape, halo), conv
    batch, channels, _, width = conv.in_shape
    rows, span = conv.out_shape[2], window.span
    first = place + -window.low * width * (channels if layout == NHWC else 1)
    window = replace(window, stride=span, low=0, high=0)
    dense = replace(conv, height=rows * span, rows=window)
    made, corner = scratch_map(p, dense.in_shape, halo)
    for number in range(span):  # of every window
        row = number * width * (channels if layout == NHWC else 1)
        to, every = corner + number * made.row, replace(made, row=span * made.row)
        _pack(p, target, first + row, layout, (batch, channels, rows, width), halo, every, to,
              conv.height, conv.rows.stride)  # fmt: skip
    return made, dense


def _pack(
    p: Program, target: Target, place: Place, layout: str, shape: Sequence[int], halo: Halo,
    to: Map, corner: Place, own_height: int | None = None, every: int = 1,
) -> None:  # fmt: skip
    """Copy a tensor of ``shape`` into a map with a halo.

    It may be every so many-th row of one that has ``own_height``.
    """
    batch, channels, height, width = shape
    own = height if own_height is None else own_height
    transpose = layout == NCHW and channels > 1
    if transpose:
        image, row, channel = channels * own * width, width, own * width
    else:
        image, row, channel = own * width * channels, width * channels, 1
    rows = height + halo.top + halo.bottom
    p.step(
        copy_kernel(copy.pack, target, transpose, channels * (transpose and channels <= FEW)),
        batch * rows,
        x=place, x_image=image, x_row=every * row, x_channel=channel,
        out=corner, out_image=to.image, out_row=to.row,
        height=height, width=width, channels=channels,
        top=halo.top, left=halo.left, right=halo.right, padded_height=rows,
    )  # fmt: skip


def written(p: Program, place: Place, layout: str, shape: Sequence[int]) -> Map:
    """The map a kernel writes for an output tensor: the tensor itself, or scratch."""
    _, channels, height, width = shape
    if layout == NHWC or channels == 1:
        return Map.dense(place, channels, height, width)
    return scratch_map(p, shape, Halo())[0]


def deliver(p: Program, target: Target, m: Map, place: Place, layout: str, shape) -> None:
    """Bring a written map to its output tensor, if it was scratch."""
    batch, channels, height, width = shape
    if layout == NHWC or channels == 1:
        return
    p.step(
        copy_kernel(copy.transpose, target), batch * height,
        x=m.place, x_image=m.image, x_row=m.row, x_pixel=m.pixel,
        out=place, out_image=channels * height * width, out_row=width,
        out_channel=height * width, height=height, width=width, channels=channels,
    )  # fmt: skip


def copy_out(p: Program, target: Target, m: Map, place: Place, shape: Sequence[int]) -> None:
    """Copy the interior of a map to a dense NHWC tensor."""
    batch, channels, height, width = shape
    out = Map.dense(place, channels, height, width)
    p.step(
        copy_kernel(copy.pack, target, False), batch * height,
        x=m.place, x_image=m.image, x_row=m.row, x_channel=1,
        out=out.place, out_image=out.image, out_row=out.row,
        height=height, width=width, channels=channels,
        top=0, left=0, right=0, padded_height=height,
    )  # fmt: skip
