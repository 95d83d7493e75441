"""Devices, types, layouts and sizes asked for; scripted functions; random numbers."""

from __future__ import annotations

from ..building import Builder, Operation, Skip
from ..program import Draw


def device(b: Builder, d: Draw) -> None:
    """Tensors made, or moved, where another one is."""
    x = b.map(d)
    how = d(
        "how",
        (
            "{x}.to({x}.device)",
            "{x}.cpu()",
            "{x}.to({x})",
            "{x} + torch.zeros(1, device={x}.device)",
            "{x} + torch.ones(1, 1).to({x}.device)",
            "{x}.to('cpu')",
            "{x}.type_as({x})",
            "{x} + torch.linspace(-1, 1, {x}.shape[3], device={x}.device).view(1, 1, 1, -1)",
            "torch.cat([{x}, torch.linspace(-1, 1, {x}.shape[3], device={x}.device).view(1, 1, 1, -1)"
            ".expand({x}.shape[0], 1, {x}.shape[2], -1)], 1)",
            "{x} * {x}.new_ones({x}.shape[0], 1, 1, 1)",
            "{x} + torch.ones_like({x}[:, :1])",
            "{x} * torch.arange({x}.shape[2], device={x}.device).view(-1, 1)",
            "{x} + torch.eye({x}.shape[2], {x}.shape[3], device={x}.device)",
            "{x} + torch.full(({x}.shape[3],), 0.5, device={x}.device, dtype={x}.dtype)",
            "{x} * torch.meshgrid(torch.arange({x}.shape[2], device={x}.device), "
            "torch.arange({x}.shape[3], device={x}.device), indexing='ij')[0]",
            "torch.ones({x}.shape, device={x}.device).triu() * {x}",
        ),
    )
    b.let(how.format(x=x.name))


def double(b: Builder, d: Draw) -> None:
    """float64 on the way."""
    x = b.pick(d)
    how = d(
        "how",
        (
            "{x}.double().mul(2).to({x}.dtype)", "{x}.to(torch.float64).sigmoid().type_as({x})",
            "({x} * torch.ones(1, dtype=torch.float64)).to({x}.dtype)", "{x}.double().sum(1, keepdim=True).to({x})",
        ),
    )  # fmt: skip
    b.let(how.format(x=x.name))


def half(b: Builder, d: Draw) -> None:
    """Fewer bits on the way."""
    x = b.pick(d)
    kind = d("kind", ("half()", "bfloat16()", "to(torch.float16)"))
    b.let(f"{x.name}.{kind}.{d('then', ('mul(2)', 'relu()', 'clone()'))}.to({x.name}.dtype)")


ASKED = (
    "{x}.is_contiguous()", "{x}.is_contiguous(memory_format=torch.channels_last)",
    "{x}.stride(1) == 1", "{x}.stride()[0] > {x}.stride()[1]", "{x}.stride(3) < {x}.stride(2)",
    "{x}.is_cpu", "{x}.device.type == 'cpu'", "{x}.is_cuda", "{x}.dtype == torch.float16",
    "{x}.shape[2] > 4", "{x}.requires_grad", "torch.is_grad_enabled()", "self.training",
    "{x}.shape[0] == 2", "{x}.storage_offset() == 0", "{x}.is_leaf", "{x}.is_floating_point()",
    "{x}.is_meta", "{x}.numel() > 100", "{x}.ndim == 4", "torch.is_inference_mode_enabled()",
    "isinstance({x}, nn.Parameter)", "torch.is_tensor({x})", "torch.get_default_dtype() == {x}.dtype",
    "{x}.is_inference()", "{x}._is_view()", "torch.is_autocast_enabled('cpu')", "{x}.data_ptr() == 0",
    "{x}.is_sparse", "type({x}) is torch.Tensor", "len({x}) > 1", "{x}.layout is torch.strided",
    "{x}.grad_fn is None", "{x}.get_device() < 0", "{x}.is_neg()", "str({x}.device) == 'cpu'",
)  # fmt: skip


def branch(b: Builder, d: Draw) -> None:
    """A condition on what PyTorch says of a value; either way something is computed."""
    x = b.map(d)
    b.let(f"{x.name} * 2 if {d('asked', ASKED).format(x=x.name)} else {x.name} - 1")


def sized(b: Builder, d: Draw) -> None:
    """Arithmetic with sizes and strides."""
    x = b.map(d)
    how = d(
        "how",
        (
            "{x} / {x}.shape[2]", "{x} * {x}.size(0)", "{x} + {x}.stride(0) / 100", "{x} * len({x})",
            "{x}[:, :max(1, {x}.shape[1] // 2)]", "{x}[..., : {x}.shape[3] // 2 + 1]", "{x} * {x}.numel() ** -0.5",
            "{x}.new_zeros({x}.shape) + {x}", "F.avg_pool2d({x}, {x}.shape[2:])", "F.interpolate({x}, size=[s * 2 for s in {x}.shape[2:]])",
            "{x}.view({x}.size(0), 1, {x}.size(1), {x}.size(2), {x}.size(3)).sum(1)",
            "sum([{x} * (i + 1) for i in range({x}.shape[0])])",
        ),
    )  # fmt: skip
    b.let(how.format(x=x.name))


def scripted(b: Builder, d: Draw) -> None:
    """A scripted function."""
    x = b.map(d)
    b.let(
        d("kind", ("parts.swish({x})", "parts.padded({x}, 1)", "parts.padded({x}, 2)")).format(
            x=x.name
        )
    )


def embedded(b: Builder, d: Draw) -> None:
    """Positions, looked up."""
    x = b.map(d)
    layer = b.layer(f"nn.Embedding(16, {x.shape[3]})")
    b.let(f"{x.name} + {layer}(torch.arange({x.name}.shape[2], device={x.name}.device))")


def recurrent(b: Builder, d: Draw) -> None:
    """Layers that make tensors of their own: recurrent ones, attention."""
    x = b.map(d)
    c = x.shape[1]
    kind = d("kind", ("nn.LSTM({c}, 4, batch_first=True)", "nn.GRU({c}, 4, batch_first=True)",
                      "nn.MultiheadAttention({c}, 1, batch_first=True)"))  # fmt: skip
    layer = b.layer(kind.format(c=c))
    sequence = f"{x.name}.flatten(2).transpose(1, 2)"
    if "Attention" in kind:
        b.let(f"{layer}({sequence}, {sequence}, {sequence})[0]")
    else:
        b.let(f"{layer}({sequence})[0]")


def random_numbers(b: Builder, d: Draw) -> None:
    """Random numbers, in the order in which PyTorch draws them."""
    x = b.pick(d)
    how = d(
        "how",
        (
            "F.dropout({x}, 0.4, training=True)", "{x} + torch.rand({x}.shape, dtype=torch.float32).to({x})",
            "{x} * torch.randn((), dtype=torch.float32).to({x})", "F.dropout({x}, 0.4, training=self.training)",
            "{x} * torch.bernoulli(torch.full(({x}.shape[0],) + (1,) * ({x}.dim() - 1), 0.7, dtype=torch.float32)).to({x})",
            "{x}[torch.randperm({x}.shape[0])]",
        ),
    )  # fmt: skip
    b.let(how.format(x=x.name))


def number_argument(b: Builder, d: Draw) -> None:
    """Arithmetic with a number that comes as an argument, another one with every call."""
    if not b.numbers:
        raise Skip
    x, n = b.pick(d), b.numbers[d.number("which", len(b.numbers))]
    how = d(
        "how", ("{x} * {n}", "{x} + {n}", "{x}.clamp(max={n})", "{x} * {n} if {n} > 0.6 else {x}")
    )
    b.let(how.format(x=x.name, n=n))


TABLE = (
    Operation(5, device), Operation(2, double), Operation(1.5, half, coarse=0.03), Operation(6, branch),
    Operation(3, sized), Operation(3, scripted), Operation(1.5, embedded), Operation(1, recurrent),
    Operation(2.5, random_numbers), Operation(6, number_argument),
)  # fmt: skip
