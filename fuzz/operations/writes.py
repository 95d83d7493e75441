"""Writes: in place, through views, to what others read too."""

from __future__ import annotations

from ..building import Builder, Operation
from ..program import Draw


def write_part(b: Builder, d: Draw) -> None:
    """A part of a map is written; the map is read afterwards."""
    x = b.map(d)
    spelled = d(
        "spelled",
        (
            "{x}[:, :1] = 0.5", "{x}[:, :, 1:] += 1", "{x}[:, ::2] *= 2", "{x}[0] = 0",
            "{x}[:, 0].zero_()", "{x}[..., :1].add_(1)", "{x}.narrow(1, 0, 1).mul_(3)",
            "{x}.select(1, 0).fill_(0.25)", "{x}.transpose(2, 3)[:, :, :1].sub_(1)",
            "{x}[:, -1].neg_()", "{x}.flatten(2)[..., 0] = 1", "{x}.diagonal(0, 2, 3).fill_(2)",
            "{x}[:, :1] = {x}[:, -1:].clone()", "{x}[{x} > 0.5] = 0.5", "{x}[:, [0]] = 2",
            "F.relu({x}[:, :1], inplace=True)", "torch.sigmoid_({x}[:, :, :1])",
        ),
    )  # fmt: skip
    b.line(spelled.format(x=x.name))


def write_all(b: Builder, d: Draw) -> None:
    """A whole value is changed in place, by a method or a function."""
    x = b.pick(d)
    y = b.like(d, x)
    spelled = d(
        "spelled",
        (
            "{x}.mul_(2)", "{x}.add_(1)", "{x} += 0.5", "{x} *= {y}", "{x}.copy_({y})", "{x}.zero_()",
            "{x}.relu_()", "{x}.clamp_(-1, 1)", "{x}.sub_({y}, alpha=0.5)", "{x}.div_(2)",
            "{x}.fill_(0.5)", "torch.add({x}.detach(), 1, out={y}.detach().clone())", "{x}.neg_()",
            "{x}.tanh_()", "{x}.lerp_({y}, 0.5)", "{x}.masked_fill_({x} < 0, 0)", "{x}.t_().t_()",
            "{x}.squeeze_().unsqueeze_(0)", "{x}.transpose_(-1, -2)", "{x}.unsqueeze_(0).squeeze_(0)",
        ),
    )  # fmt: skip
    b.line(spelled.format(x=x.name, y=y.name))


def write_view(b: Builder, d: Draw) -> None:
    """A view is made, kept and written; its base is read afterwards."""
    x = b.map(d)
    made = d(
        "made",
        (
            "{x}[:, :2]", "{x}.transpose(1, 2)", "{x}.view({x}.shape[0], -1)", "{x}.permute(0, 2, 3, 1)",
            "{x}[:, :, ::2]", "{x}.flatten(2)", "{x}.detach()", "{x}.view_as({x})", "{x}.chunk(2, 1)[0]",
            "{x}.reshape(-1)", "{x}.contiguous()", "{x}.to({x}.dtype)", "{x}.as_strided((2,), (1,))",
        ),
    )  # fmt: skip
    how = d("how", ("{v} += 1", "{v}.mul_(2)", "{v}[:1] = 0.5", "{v}.zero_()", "F.relu({v}, True)"))
    v = b.let(made.format(x=x.name))
    b.line(how.format(v=v.name))


def write_input(b: Builder, d: Draw) -> None:
    """An argument of the program is written."""
    name = b.arguments[d.number("which", len(b.arguments))]
    how = d("how", ("{x}.mul_(2)", "{x}[:, :1] = 0", "{x} += 1", "{x}.clamp_(min=0)", "F.relu_({x})",
                    "{x}.copy_({x} * 2)", "{x}[0].add_(1)"))  # fmt: skip
    b.line(how.format(x=name))


def write_data(b: Builder, d: Draw) -> None:
    """Something is written behind autograd's back."""
    x = b.pick(d)
    how = d(
        "how",
        (
            "{x}.data.mul_(2)",
            "{x}.detach().add_(1)",
            "{x}.data[:1] = 0",
            "{x}.detach()[..., :1] = 1",
        ),
    )
    b.line(how.format(x=x.name))


def out_argument(b: Builder, d: Draw) -> None:
    """A result goes into memory that is there already."""
    x = b.pick(d)
    how = d(
        "how",
        (
            "torch.mul({x}.detach(), 2, out=torch.empty_like({x}))",
            "torch.add({x}.detach(), 1, out={x}.new_empty(0))",
            "torch.relu({x}.detach().clone())",
            "torch.stack([{x}, {x}]).sum(0)",
            "torch.empty_like({x}).copy_({x})",
            "torch.zeros_like({x}).index_add_(0, torch.tensor([0]), {x}[:1])",
            "torch.zeros_like({x}).add_({x})",
        ),
    )
    b.let(how.format(x=x.name))


TABLE = (
    Operation(5, write_part), Operation(4, write_all), Operation(4, write_view),
    Operation(3, write_input), Operation(2, write_data), Operation(2, out_argument),
)  # fmt: skip
