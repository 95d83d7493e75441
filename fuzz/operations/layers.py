"""Layers and arithmetic."""

from __future__ import annotations

from math import gcd

from torch import nn

from ..building import Builder, Operation, Skip, Value
from ..program import Draw

WIDTHS = (8, 3, 4, 16)
"""Numbers of channels: few, so that compiled kernels are found again."""


def _channels(value: Value, axis: int = 1) -> int:
    channels = value.shape[axis]
    if channels > 32:
        raise Skip
    return channels


def _window(b: Builder, d: Draw, value: Value) -> str:
    """The window of a convolution, as arguments."""
    k = d("kernel", (3, 1, 2, 5, (1, 3), (3, 2)), plain=0.4)
    s = d("stride", (1, 2, 3, (2, 1)), plain=0.6)
    dilation = d("dilation", (1, 2), plain=0.8)
    tall = k if isinstance(k, int) else max(k)
    same = tall // 2 * dilation
    mode = d("mode", ("zeros", "circular", "reflect", "replicate"), plain=0.75)
    p = d("padding", ("as it was", 0, "same", 1, (1, 0)), plain=0.6)
    if p == "as it was":
        p = same
    if p == "same" and s != 1:
        p = same
    text = f"{k!r}, stride={s!r}, padding={p!r}, dilation={dilation}"
    return text + (f", padding_mode={mode!r}" if mode != "zeros" else "")


def conv(b: Builder, d: Draw) -> None:
    """A convolution."""
    x = b.map(d)
    channels = _channels(x)
    out = d("out", WIDTHS)
    groups = d("groups", (1, "depthwise", 2, 4), plain=0.7)
    if groups == "depthwise":
        groups, out = channels, channels * d("times", (1, 2), plain=0.7)
    groups = gcd(gcd(groups, channels), out)
    bias = "" if d("bias", (True, False), plain=0.7) else ", bias=False"
    many = f", groups={groups}" if groups > 1 else ""
    layer = b.layer(f"nn.Conv2d({channels}, {out}, {_window(b, d, x)}{many}{bias})")
    b.let(f"{layer}({x.name})")


def conv_function(b: Builder, d: Draw) -> None:
    """A convolution by its function, with a parameter, perhaps one that is computed."""
    x = b.map(d)
    channels, out = _channels(x), d("out", WIDTHS)
    weight = f"self.{b.name('w')}"
    b.prepare(f"{weight} = nn.Parameter(torch.randn({out}, {channels}, 3, 3) * 0.3)")
    spelled = d(
        "weight",
        ("{0}", "{0} * 0.5", "{0}.flip(2)", "{0}.abs()", "{0} - {0}.mean((1, 2, 3), True)"),
    )
    size = d(
        "call", ("padding=1", "padding='same'", "stride=2", "None, 1, 1", "bias={0}[:, 0, 0, 0]")
    )
    b.let(f"F.conv2d({x.name}, {spelled.format(weight)}, {size.format(weight)})")


def conv_transpose(b: Builder, d: Draw) -> None:
    """A transposed convolution."""
    x = b.map(d)
    k, s = d("kernel", (2, 3, 4)), d("stride", (2, 1))
    layer = b.layer(f"nn.ConvTranspose2d({_channels(x)}, {d('out', WIDTHS)}, {k}, stride={s})")
    b.let(f"{layer}({x.name})")


def conv_again(b: Builder, d: Draw) -> None:
    """A layer that the program has already used: shared."""
    name = b.layer_of(d, (nn.Conv2d, nn.Linear, nn.Sequential, nn.modules.batchnorm._NormBase))
    channels = getattr(b.get(name), "in_channels", None)
    x = b.pick(d, fits=lambda t: channels is None or t.dim() == 4 and t.shape[1] == channels)
    b.let(f"{name}({x.name})")


def norm(b: Builder, d: Draw) -> None:
    """A normalisation."""
    x = b.map(d)
    c = x.shape[1]
    kind = d(
        "kind",
        (
            "nn.BatchNorm2d({c})", "nn.BatchNorm2d({c}, affine=False)",
            "nn.BatchNorm2d({c}, track_running_stats=False)", "nn.BatchNorm2d({c}, momentum=None)",
            "nn.BatchNorm2d({c}, eps=0.1, momentum=0.5)", "nn.GroupNorm(1, {c})",
            "nn.GroupNorm({g}, {c})", "nn.InstanceNorm2d({c})",
            "nn.InstanceNorm2d({c}, affine=True, track_running_stats=True)",
            "nn.LayerNorm({w})", "nn.LocalResponseNorm(3)",
        ),
        plain=0.4,
    )  # fmt: skip
    layer = b.layer(kind.format(c=c, g=gcd(c, 4), w=x.shape[3]))
    b.let(f"{layer}({x.name})")


ACTIVATIONS = (
    "nn.ReLU()", "nn.ReLU(inplace=True)", "nn.ReLU6()", "nn.ReLU6(inplace=True)",
    "nn.LeakyReLU(0.1)", "nn.LeakyReLU(0.1, inplace=True)", "nn.LeakyReLU(-0.5)", "nn.ELU()",
    "nn.Sigmoid()", "nn.Tanh()", "nn.SiLU()", "nn.SiLU(inplace=True)", "nn.GELU()",
    "nn.GELU(approximate='tanh')", "nn.Hardswish()", "nn.Hardswish(inplace=True)",
    "nn.Hardsigmoid()", "nn.PReLU()", "nn.PReLU({c})", "nn.Softplus()", "nn.Mish()",
    "nn.Hardtanh(-0.5, 0.7)", "nn.SELU()", "nn.CELU(0.5)", "nn.Softsign()", "nn.Identity()",
)  # fmt: skip


def activation(b: Builder, d: Draw) -> None:
    """An activation, as a module."""
    x = b.pick(d)
    kind = d("kind", ACTIVATIONS, plain=0.3)
    channels = x.shape[1] if x.tensor.dim() > 1 else 1
    layer = b.layer(kind.format(c=channels))
    b.let(f"{layer}({x.name})")


def activation_function(b: Builder, d: Draw) -> None:
    """An activation, as a function or a method."""
    x = b.pick(d)
    spelled = d(
        "spelled",
        (
            "F.relu({x})", "torch.relu({x})", "{x}.relu()", "F.relu({x}, inplace=True)",
            "torch.relu_({x})", "{x}.clamp(min=0)", "{x}.clamp(-0.5, 0.5)", "{x}.sigmoid()",
            "torch.tanh({x})", "F.silu({x})", "F.gelu({x})", "F.leaky_relu({x}, 0.2)",
            "F.leaky_relu_({x}, 0.2)", "{x}.clamp_(min=0)", "F.relu6({x})", "F.hardtanh({x})",
            "torch.maximum({x}, torch.zeros_like({x}))", "torch.where({x} > 0, {x}, {x} * 0.1)",
            "{x}.abs()", "{x}.square()", "{x}.exp().log1p()", "{x} * {x}.sigmoid()",
            "F.threshold({x}, 0.1, 0.0)", "{x}.masked_fill({x} < 0, 0)",
        ),
    )  # fmt: skip
    b.let(spelled.format(x=x.name))


def pool(b: Builder, d: Draw) -> None:
    """A pool."""
    x = b.map(d, least=2)
    kind = d(
        "kind",
        (
            "F.max_pool2d({x}, 2)", "F.avg_pool2d({x}, 2)", "F.max_pool2d({x}, 3, 2, 1)",
            "F.max_pool2d({x}, 3, 2, 1, ceil_mode=True)", "F.max_pool2d({x}, 2, 1, dilation=2)",
            "F.max_pool2d({x}, (1, 2), (1, 2))", "F.avg_pool2d({x}, 3, 1, 1)",
            "F.avg_pool2d({x}, 3, 2, 1, ceil_mode=True)",
            "F.avg_pool2d({x}, 3, 2, 1, count_include_pad=False)",
            "F.avg_pool2d({x}, 2, divisor_override=3)", "F.adaptive_avg_pool2d({x}, 1)",
            "F.adaptive_avg_pool2d({x}, (3, 2))", "F.adaptive_max_pool2d({x}, 2)",
            "F.max_pool2d({x}, 2, return_indices=True)[0]", "F.lp_pool2d({x}.abs() + 0.1, 2, 2)",
            "{x}.mean((2, 3))", "{x}.mean((2, 3), keepdim=True)", "{x}.amax((2, 3), keepdim=True)",
            "{x}.mean(1, keepdim=True)", "{x}.sum(3)", "{x}.max(2).values",
        ),
    )  # fmt: skip
    if d("module", (False, True)) and kind.startswith(
        ("F.max_pool2d({x}, 2)", "F.avg_pool2d({x}, 2)")
    ):
        name = "nn.MaxPool2d(2)" if "max" in kind else "nn.AvgPool2d(2)"
        b.let(f"{b.layer(name)}({x.name})")
    else:
        b.let(kind.format(x=x.name))


def dropout(b: Builder, d: Draw) -> None:
    """Dropout; with probability 0 it does nothing, and must be understood to do nothing."""
    x = b.pick(d)
    kind = d("kind", ("nn.Dropout({p})", "nn.Dropout({p}, inplace=True)", "nn.Dropout2d({p})"))
    b.let(f"{b.layer(kind.format(p=d('p', (0.0, 0.3))))}({x.name})")


NUMBERS = (2, 0.5, -1.5, 1, 0, 3.25)


def number(b: Builder, d: Draw) -> None:
    """Arithmetic with a number."""
    x = b.pick(d)
    spelled = d(
        "spelled",
        (
            "{x} * {n}", "{x} + {n}", "{n} - {x}", "{x} - {n}", "{x} / 1.7", "torch.add({x}, {n})",
            "{x}.mul({n})", "torch.sub({x}, 0.5, alpha=2)", "-{x}", "torch.rsub({x}, {n})",
        ),
    )  # fmt: skip
    b.let(spelled.format(x=x.name, n=d("n", NUMBERS)))


def tensors(b: Builder, d: Draw) -> None:
    """Arithmetic with two values of one shape: residual additions, gates."""
    x = b.pick(d)
    y = b.like(d, x)
    spelled = d(
        "spelled",
        (
            "{x} + {y}", "{x} * {y}", "{x} - {y}", "torch.add({x}, {y}, alpha=2)",
            "F.relu({x} + {y})", "{x} * torch.sigmoid({y})", "{x} / ({y}.abs() + 1)",
            "torch.maximum({x}, {y})", "torch.addcmul({x}, {x}, {y}, value=0.5)",
            "torch.lerp({x}, {y}, 0.3)", "{x}.add_({y})", "{x} + {y}.detach()",
        ),
        plain=0.4,
    )  # fmt: skip
    b.let(spelled.format(x=x.name, y=y.name))


def broadcast(b: Builder, d: Draw) -> None:
    """Arithmetic with a parameter or a value of another shape."""
    x = b.map(d)
    n, c, h, w = x.shape
    shape = d("shape", (f"1, {c}, 1, 1", f"{c}, 1, 1", "1", f"{w}", f"1, 1, {h}, {w}", ""))
    name = f"self.{b.name('w')}"
    kind = d("kind", ("nn.Parameter(torch.randn({s}))", "torch.randn({s})"))
    b.prepare(f"{name} = {kind.format(s=shape if shape else '()')}")
    if kind.startswith("torch"):  # a plain attribute: a tensor, but neither parameter nor buffer
        b.setup[-1] = (
            f"self.register_buffer({name.removeprefix('self.')!r}, {kind.format(s=shape or '()')})"
        )
    b.let(
        d("spelled", ("{x} * {w}", "{x} + {w}", "{w} - {x}", "{x}.mul({w})")).format(
            x=x.name, w=name
        )
    )


def gate(b: Builder, d: Draw) -> None:
    """Squeeze and excitation."""
    x = b.map(d)
    c = _channels(x)
    name = b.layer(f"nn.Conv2d({c}, {c}, 1)")
    act = d("act", ("torch.sigmoid", "F.hardsigmoid", "torch.tanh"))
    b.let(f"{x.name} * {act}({name}({x.name}.mean((2, 3), keepdim=True)))")


def cat(b: Builder, d: Draw) -> None:
    """A concatenation of channels, or of images."""
    x = b.pick(d, fits=lambda t: t.dim() >= 2)
    y = b.like(d, x)
    axis = d("axis", (1, 0, -1), plain=0.6)
    b.let(d("spelled", ("torch.cat([{x}, {y}], {a})", "torch.cat(({x}, {y}, {x}), {a})")).format(
        x=x.name, y=y.name, a=axis))  # fmt: skip


def linear(b: Builder, d: Draw) -> None:
    """A fully connected layer: of all that was flattened, or of the last axis."""
    x = b.pick(d, fits=lambda t: t.dim() >= 2)
    flat = d("flat", (True, False)) and x.tensor.dim() > 2
    bias = d("bias", ("", ", bias=False"), plain=0.7)
    features = x.tensor[0].numel() if flat else x.shape[-1]
    if features > 2048:
        raise Skip
    layer = b.layer(f"nn.Linear({features}, {d('out', WIDTHS)}{bias})")
    b.let(f"{layer}({x.name}.flatten(1))" if flat else f"{layer}({x.name})")


def softmax(b: Builder, d: Draw) -> None:
    """Softmax and its like."""
    x = b.pick(d, fits=lambda t: t.dim() >= 2)
    kind = d(
        "kind",
        ("{x}.softmax(1)", "F.log_softmax({x}, 1)", "{x}.softmax(-1)", "F.normalize({x}, dim=1)"),
    )
    b.let(kind.format(x=x.name))


def sequence(b: Builder, d: Draw) -> None:
    """Several layers in one nn.Sequential, or a residual block."""
    x = b.map(d)
    c = _channels(x)
    kind = d(
        "kind",
        (
            "nn.Sequential(nn.Conv2d({c}, {o}, 3, padding=1), nn.BatchNorm2d({o}), nn.ReLU())",
            "nn.Sequential(nn.Conv2d({c}, {o}, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))",
            "nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d({c}, {o}, 3), nn.InstanceNorm2d({o}))",
            "parts.Block({c}, True)", "parts.Block({c}, False)",
            "parts.Standardised({c}, {o}, 3, padding=1)",
            "nn.utils.parametrizations.weight_norm(nn.Conv2d({c}, {o}, 3))",
            "nn.utils.parametrizations.spectral_norm(nn.Conv2d({c}, {o}, 3))",
            "torch.nn.utils.parametrize.register_parametrization(nn.Conv2d({c}, {o}, 3), 'weight', parts.Doubled())",
        ),
        plain=0.3,
    )  # fmt: skip
    b.let(f"{b.layer(kind.format(c=c, o=d('out', WIDTHS)))}({x.name})")


def conv_elsewhere(b: Builder, d: Draw) -> None:
    """A convolution over one axis, or over three."""
    x = b.map(d)
    c, o = _channels(x), d("out", WIDTHS)
    if d("axes", (1, 3)) == 1:
        layer = b.layer(f"nn.Conv1d({c}, {o}, 3, padding=1)")
        b.let(f"{layer}({x.name}.flatten(2))")
    else:
        layer = b.layer(f"nn.Conv3d({c}, {o}, (1, 3, 3), padding=(0, 1, 1))")
        b.let(f"{layer}({x.name}.unsqueeze(2)).squeeze(2)")


FOREIGN = (
    "{x}.cumsum(1)", "{x}.sort(1).values", "{x}.topk(2, 1).values", "torch.fft.rfft2({x}).abs()",
    "torch.einsum('nchw,ndhw->ncd', {x}, {x})", "{x}.flatten(2) @ {x}.flatten(2).mT",
    "F.grid_sample({x}, F.affine_grid(torch.eye(2, 3).to({x}).expand({x}.shape[0], 2, 3), {x}.shape, False), align_corners=False)",
    "{x}.std((2, 3), keepdim=True) + {x}", "torch.var_mean({x}, 1, keepdim=True)[0] * {x}", "{x}.logsumexp(1)",
    "F.scaled_dot_product_attention({x}, {x}, {x})", "F.fold(F.unfold({x}, 2, stride=2), {x}.shape[2:], 2, stride=2)",
    "{x}.gather(1, torch.zeros_like({x}[:, :2], dtype=torch.long))", "torch.linalg.vector_norm({x}, dim=1, keepdim=True)",
    "{x}.norm() * {x}", "torch.stack([{x}, {x}.flip(3)]).mean(0)", "{x}.scatter_add(1, torch.zeros_like({x}, dtype=torch.long), {x})",
    "torch.complex({x}, {x}).conj().imag", "torch.view_as_complex(torch.stack([{x}, {x}], -1)).real", "{x}.sum(dim=(1, 2))",
    "torch.bmm({x}[:, 0], {x}[:, 1].mT)", "F.cosine_similarity({x}, {x}.flip(1), dim=1)", "{x}.pow(2)", "{x}.abs().sqrt() + {x}",
    "torch.block_diag(*{x}[:, 0])", "F.channel_shuffle({x}, 2)", "F.conv2d({x}.flatten(0, 1)[:, None], torch.ones(1, 1, 3, 3).to({x})).squeeze(1)",
)  # fmt: skip


def foreign(b: Builder, d: Draw) -> None:
    """Something that no kernel of neocog does."""
    x = b.map(d, least=2)
    b.let(d("spelled", FOREIGN).format(x=x.name))


TABLE = (
    Operation(10, conv), Operation(2, conv_function), Operation(0.7, conv_transpose),
    Operation(1.5, conv_again), Operation(4, norm), Operation(5, activation),
    Operation(4, activation_function), Operation(4, pool), Operation(1, dropout),
    Operation(2, number), Operation(4, tensors), Operation(1, broadcast), Operation(1, gate),
    Operation(2, cat), Operation(1.5, linear), Operation(0.7, softmax), Operation(2, sequence),
    Operation(0.7, conv_elsewhere), Operation(1.5, foreign),
)  # fmt: skip
