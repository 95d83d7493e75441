"""Convolutions on packed weights, as frozen networks run them, over shapes that break tiles apart.

These kernels are made for a width: other register tiles, rows joined to longer ones, weights taken
chunk by chunk, depthwise layers several rows at a time. Weights are packed once, by a program of
their own; maps lie in buffers with halos of their own width, whose margins nobody may touch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import kernel_tools as kt
import numpy as np
import pytest
import torch
from torch import Tensor

from neocog import convolutions, reference
from neocog.activations import ACTIVATIONS
from neocog.convolutions import Weights, convolve_packed, pack, packed_elements
from neocog.cpu import epilogue as ep
from neocog.cpu.tiling import all_sizes, best_blocks, cover, even_sizes
from neocog.maps import Halo, Map, halo_of
from neocog.problem import Block, parse
from neocog.program import Place, Program
from neocog.target import Target

MARGIN = 7.5
"""What stands around results before they are written, and afterwards."""


@dataclass(frozen=True)
class Layout:
    """A map in a call buffer: its halo, and channels of other maps beside its own."""

    halo: Halo = Halo()
    beside: int = 0

    def map(self, place: Place, shape: Any) -> tuple[Map, int]:
        """The map, and the elements of its buffer."""
        batch, channels, height, width = shape
        pixel = channels + self.beside
        row = (width + self.halo.left + self.halo.right) * pixel
        image = (height + self.halo.top + self.halo.bottom) * row
        first = self.halo.top * row + self.halo.left * pixel
        return Map(place + first, image, row, pixel), batch * image

    def interior(self, buffer: Tensor, shape: Any) -> Tensor:
        """The map's elements (N, C, H, W) as a view of its buffer."""
        batch, channels, height, width = shape
        h = self.halo
        sizes = (batch, height + h.top + h.bottom, width + h.left + h.right, channels + self.beside)
        whole = buffer.view(sizes)
        part = whole[:, h.top : h.top + height, h.left : h.left + width, :channels]
        return part.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Frozen:
    """A block whose weights are packed once."""

    block: Block
    target: Target | None = None
    out: Layout = Layout()
    beside: int = 0
    """Channels that stand between the pixels of the input."""
    planes: bool = False
    """Whether the input's channels are planes."""

    def run(self, inputs: kt.Arrays, threads: int = 1) -> tuple[Tensor, kt.Context]:
        """The result (N, K, OH, OW); asserts that nothing around it was written."""
        block, conv = self.block, self.block.conv
        target = self.target or kt.host()
        packed = torch.full((packed_elements(target, conv),), float("nan"))
        w = kt.tensor(inputs["w"])
        packer = Program(("w", "packed"))
        weights = Weights.of(packer.buffer("w"), w.stride(), conv)
        pack(packer, target, conv, weights, packer.buffer("packed"))
        packer.run(w.data_ptr(), packed.data_ptr(), threads=threads)

        parameters = ep.parameters(block.epilogue)
        residual = ("residual",) if ep.adds_residual(block.epilogue) else ()
        p = Program(("x", "packed", "out", *parameters, *residual))
        lying = Layout(halo_of(conv), self.beside)
        x, x_size = lying.map(p.buffer("x"), conv.in_shape)
        out, out_size = self.out.map(p.buffer("out"), block.out_shape)
        extra: dict[str, Place | int] = {name: p.buffer(name) for name in parameters}
        given = {name: kt.tensor(inputs[name]) for name in parameters}
        if residual:
            m = Map.dense(p.buffer("residual"), *block.conv_shape[1:])
            extra |= {"residual": m.place, "residual_image": m.image, "residual_row": m.row,
                      "residual_pixel": m.pixel}  # fmt: skip
            given["residual"] = kt.tensor(inputs["residual"], kt.NHWC)
        plane = x.image if self.planes else 0
        if plane:
            x, x_size = lying.map(
                p.buffer("x"), (conv.batch * conv.in_channels, 1, *conv.in_shape[2:])
            )
            plane, x = x.image, replace(x, image=x.image * conv.in_channels)
        convolve_packed(p, target, conv, x, p.buffer("packed"), out, block.epilogue, None, extra,
                        plane=plane)  # fmt: skip

        given["x"] = torch.full((x_size,), float("nan")) if self.beside else torch.zeros(x_size)
        if self.beside:  # halos are zero, other maps' channels anything
            whole = Layout(beside=self.beside)
            h = lying.halo
            shape = (conv.batch, conv.in_channels, conv.height + h.top + h.bottom,
                     conv.width + h.left + h.right)  # fmt: skip
            whole.interior(given["x"], shape).zero_()
        if plane:
            shape = (conv.batch * conv.in_channels, 1, *conv.in_shape[2:])
            lying.interior(given["x"], shape).copy_(kt.tensor(inputs["x"]).view(shape))
        else:
            lying.interior(given["x"], conv.in_shape).copy_(kt.tensor(inputs["x"]))
        given |= {"packed": packed, "out": torch.full((out_size,), MARGIN)}
        p.run(*(given[name].data_ptr() for name in p.names), threads=threads)
        result = self.out.interior(given["out"], block.out_shape)
        made = result.clone()
        result.fill_(MARGIN)
        assert (given["out"] == MARGIN).all(), f"written around the result\n{p}"
        return made, kt.Context(block, f"frozen {self} threads={threads}", p)

    def check(self) -> None:
        """The reference's result, on one thread and on three."""
        inputs = kt.block_inputs(self.block)
        truth = reference.block(self.block, **kt.operands(inputs)).out
        for threads in (1, 3):
            ours, context = self.run(inputs, threads)
            context.check(
                "out", ours, truth, None if kt.is_exact(self.block) else kt.rounded(truth)
            )


def block_of(line: str) -> Block:
    problem = parse(line)
    assert isinstance(problem, Block), line
    return problem


TAILS = (
    *(f"conv n1 c3x4x{width} k64 3x3 p1 | bias | relu" for width in (1, 2, 5, 6, 7, 13, 16, 29)),
    *(f"conv n2 c5x3x9 k{k} 3x3 p1 | bias" for k in (1, 15, 19, 24, 33, 48, 63, 80, 96, 160)),
    *(f"conv n1 c{c}x3x8 k20 2x2 | affine | relu" for c in (1, 7, 8, 9, 24, 31)),
    "conv n2 c3x19x17 k40 7x7 s2 p3 | bias | relu",
    "conv n2 c6x9x11 k64 3x3 s2 p1 | bias",
    "conv n2 c6x9x11 k20 3x3 d2 p2 | bias",
    "conv n2 c9x6x7 k33 3x3 p1 g3 | bias | leaky_relu(0.5)",
    "conv n2 c3x4x5 k20 3x3 b2 p1 | bias",
    "conv n1 c3x1x1 k20 4x4 b3 p3 | bias",
    "conv n2 c3x4x5 k20 3x3 b2 p1 | bias | add",
    "conv n0 c8x4x4 k16 3x3 p1 | bias",
)

JOINED = (
    *(f"conv n{n} c24x1x1 k70 1x1 | bias | relu" for n in (1, 2, 6, 7, 8, 13, 16, 17, 29)),
    "conv n5 c6x4x3 k19 4x3 | bias | relu",
    "conv n3 c6x4x5 k19 4x3 | bias",
    "conv n3 c6x6x3 k19 4x3 | bias",
    "conv n3 c24x7x7 k48 1x1 | bias | add | relu",
    "conv n1 c24x13x13 k160 1x1 | relu | affine | add",
    "conv n2 c19x14x14 k24 1x1 | bias",
    "conv n2 c19x9x9 k24 1x1 s2 | bias",
    "conv n2 c8x5x6 k16 1x1 p1 | bias",
    "conv n2 c8x5x7 k32 1x1 g2 | bias | add",
    "conv n0 c8x1x1 k16 1x1 | bias",
)

DEPTHWISE = (
    *(f"conv n2 c{c}x5x9 k{c} 3x3 p1 g{c} | bias | relu" for c in (2, 15, 16, 19, 32, 33, 64)),
    *(f"conv n1 c19x{h}x8 k19 3x3 p1 g19 | bias" for h in (1, 2, 3, 4)),
    *(f"conv n1 c16x4x{w} k16 3x3 p1 g16 | bias" for w in (1, 2, 6, 7, 8, 15, 29)),
    "conv n2 c33x9x11 k33 3x3 s2 p1 g33 | bias | relu",
    "conv n2 c33x8x8 k33 3x3 s2 p1 g33 | affine | add | relu",
    "conv n1 c20x9x10 k20 5x5 p2 g20 | bias | leaky_relu(0.5)",
    "conv n1 c20x9x10 k20 5x5 s2 p2 g20 | add | bias",
    "conv n1 c20x9x10 k20 3x3 s1x2 p1 g20 | relu | bias",
    "conv n1 c20x9x10 k20 3x3 d2 p2 g20 | bias",
    "conv n1 c20x9x12 k20 3x3 d1x3 s2x1 p1,1,3,3 g20 |",
    "conv n1 c20x9x12 k20 1x5 p0,0,2,2 g20 | bias",
    "conv n1 c20x9x9 k20 2x2 s3 g20 | bias",
    "conv n1 c20x7x8 k20 3x3 p-1,0,2,1 g20 | bias",
    "conv n1 c20x4x5 k20 3x3 b2 p1 g20 | bias",
    "conv n2 c33x4x9 k33 3x3 b2 p1,2,1,2 g33 | bias | add | relu",
    "conv n1 c20x5x6 k20 5x4 b3x2 d2 p2 g20 | affine",
    "conv n1 c20x6x7 k20 3x3 b2 s3 p2 g20 | add",
    "conv n1 c20x9x6 k20 3x3 b2 s4x2 p1 g20 | bias",
    "conv n1 c20x2x3 k20 2x2 b4 p3 g20 | bias | add",
    "conv n1 c20x2x3 k20 3x3 b5 p1 g20 | add | bias",
    "conv n1 c20x8x8 k20 3x3 p1 g20 | bias | relu | max 2x2",
    "conv n0 c20x8x8 k20 3x3 p1 g20 | bias",
)

POOLED = (
    "conv n2 c3x15x13 k40 3x3 p1 | bias | relu | max 2x2",
    "conv n2 c3x17x18 k64 7x7 s2 p3 | bias | relu | max 3x3 s2 p1",
    "conv n1 c24x8x9 k19 1x1 | bias | mean 2x2",
)

CHUNKED = (
    "conv n1 c16x7x7 k64 3x3 p1 | bias | relu",
    "conv n2 c24x5x5 k33 3x3 p1 | bias | add | relu",
    "conv n1 c40x9x9 k96 1x1 | affine | relu",
    "conv n3 c32x1x1 k70 1x1 | bias | relu",
    "conv n1 c32x1x1 k70 1x1 | bias | relu",
    "conv n29 c32x1x1 k70 1x1 | bias | relu",
    "conv n1 c16x9x9 k32 5x5 s2 p2 g2 | bias",
    "conv n1 c12x7x7 k64 3x3 p1 | bias | relu",
    "conv n1 c16x4x5 k32 3x3 b2 p1 | bias",
)

HALO = Halo(1, 2, 3, 1)


@pytest.mark.parametrize("line", TAILS + JOINED + DEPTHWISE + POOLED)
def test_shapes(line: str) -> None:
    Frozen(block_of(line)).check()


@pytest.mark.parametrize("line", TAILS[:3] + JOINED[9::2] + DEPTHWISE[::3] + POOLED)
def test_results_inside_a_halo(line: str) -> None:
    """Rows end where the next begins after a gap; results of other layers stand beside."""
    for layout in (Layout(HALO), Layout(beside=5), Layout(HALO, 3)):
        Frozen(block_of(line), out=layout).check()


@pytest.mark.parametrize("line", TAILS[::5] + JOINED[::3] + DEPTHWISE[::3])
def test_inputs_that_are_a_part_of_a_map(line: str) -> None:
    """What stands in the channels beside, NaN here, is not read into any result."""
    Frozen(block_of(line), beside=5).check()


PLANES = (
    "conv n2 c3x9x13 k40 3x3 s2 p1 | bias | relu",
    "conv n2 c3x17x18 k64 7x7 s2 p3 | bias | relu | max 3x3 s2 p1",
    "conv n1 c1x8x8 k16 3x3 p1 | bias",
    "conv n3 c5x1x1 k24 1x1 | bias",
    "conv n2 c4x5x6 k34 3x3 p1 g2 | bias",
    "conv n1 c16x5x5 k16 3x3 p1 | bias",
)


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
@pytest.mark.parametrize("line", PLANES)
def test_inputs_in_planes(line: str, target: Target) -> None:
    Frozen(block_of(line), target, planes=True).check()


def test_depthwise_layers_read_no_planes() -> None:
    with pytest.raises(ValueError, match="plane: a depthwise layer"):
        Frozen(block_of("conv n1 c4x5x5 k4 3x3 g4 | bias"), planes=True).check()


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches so small that the weights of small layers come in chunks of 8 channels."""
    for name, elements in (("PANEL", 600), ("CHUNK", 512), ("SUMS", 1500)):
        monkeypatch.setattr(convolutions, name, elements)
    yield


@pytest.mark.usefixtures("small_caches")
@pytest.mark.parametrize("line", CHUNKED)
def test_weights_in_chunks(line: str) -> None:
    Frozen(block_of(line)).check()
    Frozen(block_of(line), out=Layout(HALO)).check()


@pytest.mark.usefixtures("small_caches")
@pytest.mark.parametrize("target", kt.OTHERS, ids=lambda t: t.name)
@pytest.mark.parametrize("line", CHUNKED[::2])
def test_weights_in_chunks_on_other_targets(line: str, target: Target) -> None:
    Frozen(block_of(line), target).check()


@pytest.mark.parametrize("target", kt.OTHERS, ids=lambda t: t.name)
@pytest.mark.parametrize("line", TAILS[::3] + JOINED[::4] + DEPTHWISE[::2] + POOLED[:2])
def test_shapes_on_other_targets(line: str, target: Target) -> None:
    Frozen(block_of(line), target).check()


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str) -> None:
    """In whole vectors, in half a vector (24 and 20 channels), and channels in the lanes."""
    step = f"{name}(0.25)" if ACTIVATIONS[name].takes_slope else name
    for line in ("c9x3x7 k24 1x1", "c9x3x7 k20 3x3 p1", "c24x5x7 k24 3x3 p1 g24"):
        block = block_of(f"conv n1 {line} | bias | {step} | affine")
        inputs = kt.block_inputs(block)
        truth = reference.block(block, **kt.operands(inputs)).out
        ours, context = Frozen(block).run(inputs)
        # A few roundings in the activation, on values of the size of its sums.
        bound = kt.FLOAT32.error_bound(16, np.abs(truth) + 100)
        context.check("out", ours, truth, bound)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    (
        "conv n1 c512x7x7 k512 3x3 p1 | bias | relu",
        "conv n2 c512x7x7 k2048 1x1 | bias | add | relu",
        "conv n16 c2304x1x1 k500 1x1 | bias",
        "conv n1 c256x14x14 k256 3x3 s2 p1 | bias | relu",
        "conv n2 c96x28x28 k96 3x3 s2 p1 g96 | bias | relu",
        "conv n1 c3x65x67 k64 7x7 s2 p3 | bias | relu | max 3x3 s2 p1",
    ),
)
def test_any_number_of_threads_gives_the_same_bits(line: str) -> None:
    block = block_of(line)
    inputs = kt.block_inputs(block, kt.normals)
    size = reference.convolution(block.conv, np.abs(inputs["x"]), np.abs(inputs["w"]))
    results = [Frozen(block).run(inputs, threads)[0] for threads in (1, 2, 3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    truth = reference.block(block, **kt.operands(inputs)).out
    channels, taps = block.conv.weight_shape[1], block.conv.rows.size * block.conv.cols.size
    bound = kt.FLOAT32.error_bound(channels * taps + 3, np.full_like(truth, size.max() + 8))
    assert (np.abs(results[0].numpy() - truth) <= bound).all()


def test_packing_knows_neither_batch_nor_map() -> None:
    """A frozen network packs once, whatever it is called with."""
    block = block_of("conv n1 c24x7x7 k160 3x3 p1 | bias")
    inputs = kt.block_inputs(block)
    w = kt.tensor(inputs["w"])

    def packed(**sizes: int) -> Tensor:
        conv = replace(block.conv, **sizes)
        made = torch.zeros(packed_elements(kt.host(), conv))
        p = Program(("w", "packed"))
        pack(p, kt.host(), conv, Weights.of(p.buffer("w"), w.stride(), conv), p.buffer("packed"))
        p.run(w.data_ptr(), made.data_ptr(), threads=1)
        return made

    assert torch.equal(packed(), packed(batch=5, height=30, width=16))


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_tiles_cover_every_row(target: Target) -> None:
    for _, limit in target.tiles:
        for pixels in range(200):
            for sizes in (even_sizes(pixels, limit), all_sizes(limit)):
                wide, tail = cover(pixels, sizes)
                assert wide * sizes[0] + sum(tail) == pixels
                assert set(tail) <= set(sizes[1:])
                assert sizes[0] <= limit
            if pixels:
                first, *others = even_sizes(pixels, limit)
                assert others in ([], [first - 1])
                count = -(-pixels // limit)
                assert first == -(-pixels // count)
    with pytest.raises(ValueError, match="8 are no sum of tiles of"):
        cover(8, (7, 6))


@pytest.mark.parametrize("target", kt.ROWS, ids=lambda t: t.name)
def test_blocks_waste_few_channels(target: Target) -> None:
    for channels in range(1, 300):
        blocks = best_blocks(target, channels)
        width = blocks * target.lanes
        assert blocks in dict(target.tiles)
        assert -(-channels // width) * width < channels + max(width, target.lanes)
    whole = 12 * target.max_blocks * target.lanes
    assert best_blocks(target, whole) == target.max_blocks
