"""Small networks for the tests of ``neocog.freeze`` and of the torch.compile backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Layers by name and a function of them and the arguments."""

    def __init__(self, flow: Callable[..., object], **layers: nn.Module):
        super().__init__()
        self.flow = flow
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Tensor) -> object:
        """``flow(self, *args)``."""
        return self.flow(self, *args)


def conv(i: int, o: int, size: int = 3, **options: object) -> nn.Conv2d:
    """A convolution that keeps the size of maps unless ``options`` say otherwise."""
    return nn.Conv2d(i, o, size, **{"padding": size // 2, **options})  # type: ignore[arg-type]


def ready(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that have seen something and weights that need no gradient."""
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return model.eval()


def chain() -> nn.Module:
    return nn.Sequential(
        conv(3, 19), nn.BatchNorm2d(19), nn.ReLU(), nn.MaxPool2d(2),
        conv(19, 24, stride=2), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 10), nn.Tanh(),
    )  # fmt: skip


def residual_add_relu() -> nn.Module:
    def flow(m, x):
        x = m.first(x)
        return F.relu(m.norm(m.second(x)) + x)

    return Net(flow, first=conv(3, 19), second=conv(19, 19, bias=False), norm=nn.BatchNorm2d(19))


def residual_relu_norm_add() -> nn.Module:
    def flow(m, x):
        x = m.first(x)
        return x + m.norm(F.relu(m.second(x)))

    return Net(flow, first=conv(3, 8), second=conv(8, 8), norm=nn.BatchNorm2d(8))


def pre_activation() -> nn.Module:
    """Batch norm and ReLU before the convolution, as in DenseNet."""

    def flow(m, x):
        for norm, layer in ((m.norm1, m.conv1), (m.norm2, m.conv2)):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return x

    return Net(flow, norm1=nn.BatchNorm2d(3), conv1=conv(3, 5), norm2=nn.BatchNorm2d(8),
               conv2=conv(8, 16))  # fmt: skip


def concatenation() -> nn.Module:
    """Of results, of the input itself, twice the same, and nested."""

    def flow(m, x):
        a, b = F.relu(m.a(x)), m.b(x)
        inner = torch.cat([a, x, F.max_pool2d(b, 3, 1, 1)], 1)
        return torch.cat((m.last(inner), inner, b, b), dim=1)

    return Net(flow, a=conv(3, 7), b=conv(3, 16, 1), last=conv(26, 6))


def squeeze_and_excite() -> nn.Module:
    def flow(m, x):
        x = m.first(x)
        gate = torch.sigmoid(m.up(F.silu(m.down(F.adaptive_avg_pool2d(x, 1)))))
        return F.hardswish(m.last(gate * x))

    return Net(flow, first=conv(3, 19), down=conv(19, 4, 1), up=conv(4, 19, 1), last=conv(19, 9, 1))


def separable() -> nn.Module:
    return nn.Sequential(
        conv(3, 24, 1), nn.Hardswish(), conv(24, 24, 5, groups=24, stride=2, bias=False),
        nn.BatchNorm2d(24), nn.ReLU6(), conv(24, 12, 1, groups=3), nn.LeakyReLU(0.2), nn.GELU(),
    )  # fmt: skip


def two_outputs() -> nn.Module:
    """A dict with a map, a vector that is no tensor's twin, and an output that is also read."""

    def flow(m, x):
        inside = F.relu(m.first(x))
        second = m.second(inside)
        return {"inside": inside, "pair": (second, second.mean((2, 3))), "number": 7}

    return Net(flow, first=conv(3, 19), second=conv(19, 8))


def shared_weights() -> nn.Module:
    """One convolution called on maps of two sizes and twice on one."""

    def flow(m, x):
        x = m.first(x)
        return m.twice(F.avg_pool2d(x, 2)), m.twice(m.twice(x))

    return Net(flow, first=conv(3, 16), twice=conv(16, 16))


def in_place() -> nn.Module:
    """Writes to values that others read before or after."""

    def flow(m, x):
        x = m.first(x)
        before = m.second(x)
        F.relu(x, inplace=True)
        after = m.second(x)
        before += x
        before.relu_()
        return before * after, x

    return Net(flow, first=conv(3, 8), second=conv(8, 8))


def vectors() -> nn.Module:
    """From maps to vectors in three ways, and linear layers with and without bias."""

    def flow(m, x):
        x = m.first(x)
        a = m.one(F.relu(F.adaptive_max_pool2d(x, 2).flatten(1)))
        b = m.two(F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1))
        return F.gelu(a), b.sigmoid(), x.mean([2, 3]), x.mean((-1, -2), keepdim=True)

    return Net(flow, first=conv(3, 19), one=nn.Linear(76, 21), two=nn.Linear(19, 3, bias=False))


def foreign_layers() -> nn.Module:
    """Calls without a kernel in the middle: a program on either side."""

    def flow(m, x):
        x = F.relu(m.first(x))
        y = m.up(x)
        return m.last(torch.cos(y)) + m.skip(y), torch.sin(x)

    return Net(flow, first=conv(3, 8), up=nn.ConvTranspose2d(8, 6, 2, 2), last=conv(6, 4),
               skip=conv(6, 4, 1))  # fmt: skip


def pools() -> nn.Module:
    def flow(m, x):
        x = m.first(x)
        return (F.max_pool2d(x, 3, 2, ceil_mode=True), F.max_pool2d(x, (3, 2), 2, padding=(1, 0)),
                F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
                F.avg_pool2d(F.relu(m.second(x)), 2, ceil_mode=True))  # fmt: skip

    return Net(flow, first=conv(3, 19), second=conv(19, 5))


def winograd() -> nn.Module:
    """Enough channels for the transformed algorithm."""
    return nn.Sequential(conv(3, 32), nn.ReLU(), conv(32, 40), nn.BatchNorm2d(40), nn.SiLU())


def padded() -> nn.Module:
    """Zeros before a convolution, before a pool, in a concatenation, and returned."""

    def flow(m, x):
        y = m.first(F.pad(x, (0, 1, 2, 0)))
        pooled = F.max_pool2d(F.pad(y, (1, 1)), 3, 2)
        both = torch.cat([F.pad(y, (1, 0)), m.second(F.pad(y, (1, 0)))], 1)
        return pooled, both, F.pad(both, (0, 2, 3, 0))

    return Net(flow, first=conv(3, 19, stride=2), second=conv(19, 5))


def numbers() -> nn.Module:
    """Maps and numbers, as hard-swish by hand has them."""

    def flow(m, x):
        y = m.first(x)
        y = y * F.relu6(y + 3) / 6
        y += m.second(y) * 0.17
        return (y - 0.5).mul_(2).sub_(1, alpha=3), 2 * F.relu(3 + x)

    return Net(flow, first=conv(3, 19), second=conv(19, 19))


def strided() -> nn.Module:
    """Strides of 2, the first of which read few channels, and every end of a map."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), conv(16, 48), nn.ReLU(),
        nn.Conv2d(48, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), conv(64, 40), nn.MaxPool2d(2),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    made.__name__: made
    for made in (
        chain, residual_add_relu, residual_relu_norm_add, pre_activation, concatenation,
        squeeze_and_excite, separable, two_outputs, shared_weights, in_place, vectors,
        foreign_layers, pools, winograd, padded, numbers, strided,
    )
}  # fmt: skip
"""Every network takes maps of 3 channels with even sides."""


def make(name: str) -> nn.Module:
    """A network of the table, the same weights each time."""
    torch.manual_seed(0)
    return ready(NETWORKS[name]())


def images(
    batch: int = 2, side: int = 12, channels_last: bool = False, channels: int = 3
) -> Tensor:
    """Random maps, not square."""
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(batch, channels, side, side + 4, generator=generator)
    return made.contiguous(memory_format=torch.channels_last) if channels_last else made


def leaves(result: object) -> Iterator[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from leaves(value)
    elif isinstance(result, tuple | list):
        for value in result:
            yield from leaves(value)


def looks_at_values(m: nn.Module, x: Tensor) -> Tensor:
    """Control flow that depends on the values of a tensor."""
    x = m.first(x)  # type: ignore[operator]
    return x if x.sum() > 0 else -x


def writes_to_a_view(m: nn.Module, x: Tensor) -> Tensor:
    """The write to half of the channels changes the whole."""
    x = m.first(x)  # type: ignore[operator]
    x[:, :2].relu_()
    return x
