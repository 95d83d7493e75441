"""Where gradients go, and where they do not."""

from __future__ import annotations

from torch import nn

from ..building import Builder, Operation
from ..program import Draw
from .layers import WIDTHS, _channels

MODES = (
    "torch.no_grad()", "torch.enable_grad()", "torch.set_grad_enabled(False)",
    "torch.set_grad_enabled(True)", "torch.set_grad_enabled(self.training)",
    "torch.inference_mode()",
)  # fmt: skip


def grad_mode(b: Builder, d: Draw) -> None:
    """A region with gradients switched on or off."""
    mode = d("mode", MODES, plain=0.4)
    b.open(f"with {mode}:", mode, 1 + d.number("steps", 4))


def grad_switch(b: Builder, d: Draw) -> None:
    """A teacher: a layer run without gradients."""
    x = b.map(d)
    layer = b.layer(f"nn.Conv2d({_channels(x)}, {d('out', WIDTHS)}, 3, padding=1)")
    v = b.name("v")
    b.line(
        f"with {d('mode', MODES[:3])}:\n    {v} = {d('act', ('torch.relu', 'torch.tanh', ''))}({layer}({x.name}))"
    )
    b.keep(v)


def detached(b: Builder, d: Draw) -> None:
    """A value cut from its past."""
    x = b.pick(d)
    spelled = d("spelled", (
        "{x}.detach()", "{x}.data", "{x} + ({x}.round() - {x}).detach() * 0", "{x}.detach() * 2",
        "{x}.detach().requires_grad_()", "{x}.clone().detach()", "{x} - {x}.detach().mean()",
        "{x} * {x}.data.abs().mean()", "{x}.detach_()",
    ))  # fmt: skip
    b.let(spelled.format(x=x.name))


def custom(b: Builder, d: Draw) -> None:
    """An autograd.Function with a backward of its own."""
    x = b.pick(d)
    kind = d("kind", ("parts.StraightThrough.apply({x})", "parts.Reversed.apply({x})",
                      "parts.Scaled.apply({x}, {x}.detach().sigmoid())"))  # fmt: skip
    b.let(kind.format(x=x.name))


def custom_conv(b: Builder, d: Draw) -> None:
    """A convolution inside an autograd.Function."""
    x = b.map(d)
    weight = f"self.{b.name('w')}"
    b.prepare(
        f"{weight} = nn.Parameter(torch.randn({d('out', WIDTHS)}, {_channels(x)}, 3, 3) * 0.3)"
    )
    b.let(f"parts.Convolved.apply({x.name}, {weight})")


def tensor_hook(b: Builder, d: Draw) -> None:
    """A hook on a value: its gradient is changed on the way back."""
    x = b.pick(d, fits=lambda t: t.requires_grad)
    b.line(
        f"if {x.name}.requires_grad:\n    {x.name}.register_hook({d('hook', ('parts.double', 'lambda g: g.abs()', 'lambda g: None', 'lambda g: g.clamp(-0.1, 0.1)'))})"
    )


def module_hook(b: Builder, d: Draw) -> None:
    """A hook on a layer that an earlier step has run, which is run again."""
    name = b.layer_of(d, (nn.Conv2d, nn.Linear, nn.ReLU, nn.BatchNorm2d, nn.Sequential))
    hook = d("hook", (
        "register_forward_hook(parts.scale_result)", "register_forward_pre_hook(parts.shift_argument)",
        "register_forward_hook(parts.look_at_result)", "register_forward_hook(parts.count_calls)",
        "register_full_backward_hook(parts.turn_gradient)",
    ))  # fmt: skip
    b.prepare(f"{name}.{hook}")


def frozen(b: Builder, d: Draw) -> None:
    """Parameters of an earlier layer that are not trained."""
    name = b.layer_of(d, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.Sequential))
    how = d(
        "how",
        ("weight.requires_grad_(False)", "requires_grad_(False)", "bias.requires_grad_(False)"),
    )
    b.prepare(f"{name}.{how}")


def tied(b: Builder, d: Draw) -> None:
    """A new layer whose weight is another's."""
    name = b.layer_of(d, nn.Conv2d)
    other = b.get(name)
    out, channels = other.weight.shape[0], other.weight.shape[1] * other.groups
    options = f"{other.kernel_size}, padding={other.padding!r}, groups={other.groups}"
    layer = b.layer(f"nn.Conv2d({channels}, {out}, {options})")
    b.prepare(f"{layer}.weight = {name}.weight")
    spelled = d(
        "spelled",
        (
            "{l}({x})",
            "F.conv_transpose2d({x}, {l}.weight)",
            "F.conv2d({x}, {l}.weight.transpose(0, 1))",
        ),
    )
    wanted = channels if spelled == "{l}({x})" else out
    x = b.pick(d, fits=lambda t: t.dim() == 4 and t.shape[1] == wanted)
    b.let(spelled.format(l=layer, x=x.name))


def checkpointed(b: Builder, d: Draw) -> None:
    """A layer whose values are computed again in the backward pass."""
    x = b.map(d)
    layer = b.layer(
        f"nn.Sequential(nn.Conv2d({_channels(x)}, {d('out', WIDTHS)}, 3, padding=1), nn.ReLU())"
    )
    b.let(f"torch.utils.checkpoint.checkpoint({layer}, {x.name}, use_reentrant=False)")


def unused(b: Builder, d: Draw) -> None:
    """A branch whose result nobody reads."""
    x = b.map(d)
    layer = b.layer(f"nn.Conv2d({_channels(x)}, {d('out', WIDTHS)}, 3, padding=1)")
    how = d(
        "how",
        (
            "{l}({x})",
            "F.interpolate({l}({x}), scale_factor=2)",
            "{l}({x}).relu_()",
            "{l}({x}).sum()",
        ),
    )
    b.line(f"{b.name('u')} = {how.format(l=layer, x=x.name)}")


def autocast(b: Builder, d: Draw) -> None:
    """A region in bfloat16, or one that says it is not."""
    on = d("on", ("enabled=False", "dtype=torch.bfloat16"))
    manager = f"torch.autocast('cpu', {on})"
    b.open(f"with {manager}:", manager, 1 + d.number("steps", 3))


def parameter_hook(b: Builder, d: Draw) -> None:
    """A hook on a parameter."""
    name = b.layer_of(d, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))
    hook = d(
        "hook", ("register_hook(parts.double)", "register_post_accumulate_grad_hook(parts.keep)")
    )
    b.prepare(f"{name}.weight.{hook}")


def transformed(b: Builder, d: Draw) -> None:
    """A transformation of functions inside the program."""
    x = b.map(d)
    weight = f"self.{b.name('w')}"
    b.prepare(f"{weight} = nn.Parameter(torch.randn(4, {_channels(x)}, 3, 3) * 0.3)")
    spelled = d("spelled", (
        "torch.vmap(lambda t: F.conv2d(t[None], {w}, padding=1)[0])({x})",
        "torch.vmap(torch.relu)({x})", "torch.func.grad(lambda t: t.square().sum())({x})",
        "torch.func.grad(lambda t: F.conv2d(t, {w}).square().sum())({x})",
        "torch.func.jvp(lambda t: F.conv2d(t, {w}), ({x},), ({x},))[1]",
        "torch.func.vjp(torch.relu, {x})[1]({x})[0]",
    ))  # fmt: skip
    b.let(spelled.format(x=x.name, w=weight))


def cut(b: Builder, d: Draw) -> None:
    """Something at which Dynamo starts a new graph, or which depends on values."""
    x = b.pick(d)
    how = d("how", (
        "torch._dynamo.graph_break()", "if {x}.detach().sum() > 1e6:\n    {x} = {x} * 2",
        "if {x}.detach().mean().item() > -1e6:\n    {x} = {x} + 1", "{x} = parts.uncompiled({x})",
        "{x} = {x} * (1 + 0 * len({x}.detach().flatten().tolist()))",
        "{x} = {x} + {x}.detach().numpy().shape[0]", "str({x}.shape)", "assert {x}.dim() > 0",
        "for _ in range({x}.shape[0]):\n    {x} = {x} * 0.9",
        "try:\n    {x} = {x}.view(-1, 12345)\nexcept RuntimeError:\n    pass",
    ))  # fmt: skip
    if "{x} = " in how and x.name in b.arguments:
        x = b.let(f"{x.name} * 1")
    b.line(how.format(x=x.name))


TABLE = (
    Operation(5, grad_mode), Operation(3, grad_switch), Operation(4, detached), Operation(4, custom),
    Operation(2, custom_conv), Operation(4, tensor_hook), Operation(4, module_hook),
    Operation(3, frozen), Operation(2, tied), Operation(1.5, checkpointed), Operation(2, unused),
    Operation(2, autocast, coarse=0.06), Operation(2, parameter_hook),
    Operation(3, transformed), Operation(2.5, cut),
)  # fmt: skip
