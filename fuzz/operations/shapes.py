"""Views, slices and other ways to look at a tensor."""

from __future__ import annotations

from ..building import Builder, Operation
from ..program import Draw

VIEWS = (
    "{x}.flatten(1)", "{x}.flatten(2)", "{x}.reshape({x}.shape[0], -1)",
    "{x}.view({x}.shape[0], -1)", "{x}.view({x}.shape[0], {x}.shape[1], -1)",
    "{x}.permute(0, 2, 3, 1)", "{x}.transpose(2, 3)", "{x}.transpose(1, 2)", "{x}.mT",
    "{x}.permute(0, 2, 3, 1).reshape({x}.shape[0], -1, {x}.shape[1])",
    "{x}.permute(0, 3, 1, 2)", "{x}.flip(2)", "{x}.roll(1, 3)", "{x}.unsqueeze(1).squeeze(1)",
    "{x}[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2)", "F.pixel_shuffle({x}, 2)",
    "F.pixel_unshuffle({x}, 2)", "{x}.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)",
    "{x}.contiguous()", "{x}.contiguous(memory_format=torch.channels_last)",
    "{x}.to(memory_format=torch.channels_last)", "{x}.clone()", "{x}.view_as({x})",
    "{x}.expand_as({x})", "{x}.repeat(1, 2, 1, 1)", "{x}.repeat_interleave(2, 2)",
    "F.unfold({x}, 2)", "{x}.unfold(2, 2, 1).sum(-1)", "{x}.movedim(1, 3)",
    "{x}.tile((1, 1, 1, 2))", "{x}.reshape({x}.shape)", "{x}.swapaxes(0, 1)",
    "{x}.clone(memory_format=torch.contiguous_format)", "{x}.squeeze()",
)  # fmt: skip

SLICES = (
    "{x}[:, :2]", "{x}[:, 1:]", "{x}[:, ::2]", "{x}[:, :, 1:-1, 1:-1]", "{x}[:, :, ::2, ::2]",
    "{x}[..., 1:]", "{x}[:1]", "{x}[0:]", "{x}.narrow(1, 0, 2)", "{x}.select(1, 0)", "{x}[:, 0]",
    "{x}.chunk(2, 1)[0]", "{x}.chunk(2, 1)[1]", "{x}.split(1, 1)[0]", "{x}.unbind(1)[0]",
    "{x}[:, [0, 1]]", "{x}[:, torch.arange(2)]", "{x}.index_select(1, torch.tensor([1, 0]))",
    "{x}.tensor_split(2, 2)[0]", "{x}[..., None, :, :].squeeze(-3)", "{x}.diagonal(0, 2, 3)",
)  # fmt: skip


def view(b: Builder, d: Draw) -> None:
    """The same numbers in another shape or layout."""
    x = b.map(d)
    b.let(d("spelled", VIEWS).format(x=x.name))


def slice_(b: Builder, d: Draw) -> None:
    """A part."""
    x = b.pick(d, fits=lambda t: t.dim() >= 2)
    b.let(d("spelled", SLICES).format(x=x.name))


def halves(b: Builder, d: Draw) -> None:
    """A map cut into two that are used apart."""
    x = b.map(d)
    first, second = b.name("v"), b.name("v")
    how = d("how", ("chunk(2, 1)", "split([1, {r}], 1)", "chunk(2, 0)", "chunk(2, 3)"))
    b.line(f"{first}, {second} = {x.name}.{how.format(r=x.shape[1] - 1)}")
    b.keep(first)
    b.keep(second)


def strided(b: Builder, d: Draw) -> None:
    """as_strided: what it reads depends on the layout PyTorch would have chosen."""
    x = b.map(d, least=2)
    spelled = d(
        "spelled",
        (
            "{x}.as_strided({x}.shape, {x}.stride())",
            "{x}.as_strided(({x}.numel() // 2,), (2,))",
            "{x}.as_strided(({x}.shape[0], {x}.shape[1], {x}.shape[2] // 2, {x}.shape[3]), {x}.stride())",
            "{x}.as_strided(({x}.numel(),), (1,))",
            "{x}.new_empty_strided({x}.shape, {x}.stride()).copy_({x})",
        ),
    )
    b.let(spelled.format(x=x.name))


def pad(b: Builder, d: Draw) -> None:
    """Padding by itself."""
    x = b.map(d, least=2)
    spelled = d(
        "spelled",
        (
            "F.pad({x}, (1, 1, 1, 1))", "F.pad({x}, (0, 1, 2, 0))", "F.pad({x}, (1, 1, 1, 1), value=0.5)",
            "F.pad({x}, (1, 1, 1, 1), mode='reflect')", "F.pad({x}, (1, 0, 1, 0), mode='circular')",
            "F.pad({x}, (1, 2, 0, 1), mode='replicate')", "F.pad({x}, (-1, 0, 0, -1))",
            "F.pad({x}, (0, 0, 0, 0, 1, 1))", "F.pad({x}, (1, 1, 1, 1), value=float('-inf')).clamp(min=-2)",
        ),
    )  # fmt: skip
    b.let(spelled.format(x=x.name))


def resize(b: Builder, d: Draw) -> None:
    """Interpolation."""
    x = b.map(d)
    spelled = d(
        "spelled",
        (
            "F.interpolate({x}, scale_factor=2)", "F.interpolate({x}, size=(5, 7))",
            "F.interpolate({x}, scale_factor=2, mode='bilinear')",
            "F.interpolate({x}, scale_factor=2, mode='bilinear', align_corners=True)",
            "F.interpolate({x}, size=(4, 4), mode='bicubic')",
            "F.interpolate({x}, size={x}.shape[2:])", "F.interpolate({x}, scale_factor=0.5)",
            "F.interpolate({x}, size=(6, 6), mode='area')",
            "F.interpolate({x}, size=(5, 5), mode='nearest-exact')",
        ),
    )  # fmt: skip
    b.let(spelled.format(x=x.name))


TABLE = (
    Operation(4, view), Operation(3, slice_), Operation(1.5, halves), Operation(0.8, strided),
    Operation(1.5, pad), Operation(1.2, resize),
)  # fmt: skip
