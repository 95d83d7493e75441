"""neocog.nn against torch.nn: a module put in the other's place changes nothing but the kernels."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from typing import Any

import kernel_tools as kt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neocog import nn as ours
from neocog.errors import InvalidProblem

LAST = torch.channels_last


def whole(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(kt.integers(shape, seed), dtype=torch.float32)


def rounded(module: nn.Module) -> Any:
    """The module with whole numbers for weights, so that results are exact."""
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            p.copy_(whole(*p.shape, seed=number))
    return module


def twins(name: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """neocog's module and torch's with the same weights, by state dict."""
    mine = rounded(getattr(ours, name)(*arguments, **options))
    theirs = getattr(nn, name)(*arguments, **options)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The result, and the gradients of the input and of all weights."""
    leaf = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(leaf)
    y.backward(whole(*y.shape, seed=9))
    return [y.detach(), leaf.grad, *(p.grad for p in module.parameters())]


def check(mine: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    for our, their in zip(gradients(mine, x), gradients(theirs, x), strict=True):
        assert torch.equal(our, their)


# ------------------------------------------------------------------------------- construction


@pytest.mark.parametrize("name", ["Conv2d", "MaxPool2d", "AvgPool2d"])
def test_signatures_and_texts(name: str) -> None:
    mine, theirs = getattr(ours, name), getattr(nn, name)
    assert inspect.signature(mine) == inspect.signature(theirs)
    names = [list(inspect.signature(m.forward).parameters) for m in (mine, theirs)]
    assert names[0] == names[1]
    assert issubclass(mine, theirs)
    arguments = (3, 4, 5) if name == "Conv2d" else (3, 2)
    assert repr(mine(*arguments)) == repr(theirs(*arguments))


def test_conv_block_takes_what_conv2d_takes() -> None:
    block = list(inspect.signature(ours.ConvBlock).parameters)
    conv = list(inspect.signature(nn.Conv2d).parameters)
    assert block[: conv.index("bias") + 1] == conv[: conv.index("bias") + 1]
    made = ours.ConvBlock(3, 4, 3, padding_mode="reflect", padding=1, dtype=torch.float64)
    assert (made.padding_mode, made.weight.dtype) == ("reflect", torch.float64)


def test_fresh_weights_are_torchs() -> None:
    for mine, theirs in ((ours.Conv2d, nn.Conv2d), (ours.ConvBlock, nn.Conv2d)):
        torch.manual_seed(3)
        one = mine(3, 4, 3)
        torch.manual_seed(3)
        other = theirs(3, 4, 3)
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


@pytest.mark.parametrize("mine", [ours.Conv2d, ours.ConvBlock])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_interchange(mine: Any, bias: bool) -> None:
    one, other = mine(4, 6, 3, groups=2, bias=bias), nn.Conv2d(4, 6, 3, groups=2, bias=bias)
    assert list(one.state_dict()) == list(other.state_dict()) == ["weight", "bias"][: 1 + bias]
    for source, target in ((one, other), (other, mine(4, 6, 3, groups=2, bias=bias))):
        assert not any(target.load_state_dict(source.state_dict()))
        for name, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], value)


def test_a_network_is_exchanged_layer_by_layer() -> None:
    def network(library: Any) -> nn.Sequential:
        return nn.Sequential(
            library.Conv2d(1, 5, 3, padding=1), nn.ReLU(), library.MaxPool2d(2),
            library.Conv2d(5, 19, 3, 2), nn.ReLU(), library.AvgPool2d(2, 1),
        )  # fmt: skip

    mine, theirs = rounded(network(ours)), network(nn)
    theirs.load_state_dict(mine.state_dict())
    check(mine, theirs, whole(2, 1, 12, 12))


@pytest.mark.parametrize("wrong", [nn.ReLU(), nn.MaxPool2d(2, return_indices=True), 2])
def test_a_block_refuses_other_modules_as_its_pool(wrong: Any) -> None:
    with pytest.raises(InvalidProblem, match="pool must be a MaxPool2d"):
        ours.ConvBlock(1, 2, 3, pool=wrong)


def test_a_block_refuses_unknown_activations() -> None:
    with pytest.raises(InvalidProblem, match="got 'swish'"):
        ours.ConvBlock(1, 2, 3, activation="swish")


# ------------------------------------------------------------------------------------ results

CONVS = (
    {"kernel_size": 3},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid", "bias": False},
    {"kernel_size": 3, "groups": 2, "padding": 1},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
)


@pytest.mark.parametrize("options", CONVS, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_conv2d(options: Any, batched: bool) -> None:
    mine, theirs = twins("Conv2d", 4, 6, **options)
    x = whole(2, 4, 8, 7)
    check(mine, theirs, x if batched else x[0])


def test_pools() -> None:
    x = whole(2, 3, 9, 8)
    for options in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}):
        check(ours.MaxPool2d(**options), nn.MaxPool2d(**options), x)
        check(ours.MaxPool2d(**options, ceil_mode=True), nn.MaxPool2d(**options, ceil_mode=True), x)
    check(ours.MaxPool2d(2, 1, dilation=2), nn.MaxPool2d(2, 1, dilation=2), x)
    for options in ({"kernel_size": 2}, {"kernel_size": 4, "stride": 2, "padding": 1}):
        check(ours.AvgPool2d(**options), nn.AvgPool2d(**options), x)  # divides by powers of two
    options = {"kernel_size": 4, "padding": 2, "divisor_override": 8, "ceil_mode": True}
    check(ours.AvgPool2d(**options), nn.AvgPool2d(**options), x)
    both = [m(2, return_indices=True)(x) for m in (ours.MaxPool2d, nn.MaxPool2d)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize(
    "pool", [None, ours.MaxPool2d(2), ours.AvgPool2d(2), nn.MaxPool2d(2)], ids=str
)
@pytest.mark.parametrize(("name", "layer"), [
    ("identity", nn.Identity()), ("relu", nn.ReLU()), ("leaky_relu", nn.LeakyReLU(0.25)),
])  # fmt: skip
def test_conv_block(pool: Any, name: str, layer: nn.Module) -> None:
    mine = ours.ConvBlock(3, 19, 3, padding=1, activation=name, negative_slope=0.25, pool=pool)
    torch_pool = {ours.MaxPool2d: nn.MaxPool2d, ours.AvgPool2d: nn.AvgPool2d}.get(type(pool))
    last = nn.Identity() if pool is None else (torch_pool or type(pool))(2)
    conv = nn.Conv2d(3, 19, 3, padding=1)
    conv.load_state_dict(rounded(mine).state_dict())
    x, theirs = whole(2, 3, 6, 7), nn.Sequential(conv, layer, last)
    check(mine, theirs, x)
    residual = whole(2, 19, 6, 7, seed=5)
    assert torch.equal(mine(x, residual), last(layer(conv(x) + residual)))


def test_conv_block_pads_in_other_modes() -> None:
    mine = rounded(ours.ConvBlock(2, 3, 3, padding=1, padding_mode="reflect"))
    theirs = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.ReLU())
    theirs[0].load_state_dict(mine.state_dict())
    check(mine, theirs, whole(2, 2, 6, 6))


# ---------------------------------------------------------------------------- life of a module


def block() -> Any:
    return rounded(ours.ConvBlock(2, 5, 3, padding=1, pool=ours.MaxPool2d(2)))


def test_copies_and_pickles_are_equal_and_apart() -> None:
    module, x = block(), whole(1, 2, 6, 6)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
        assert repr(other) == repr(module)
        with torch.no_grad():
            other.weight.zero_()
            other.bias.zero_()
        assert not torch.equal(other(x), expected)
    assert torch.equal(module(x), expected)


def test_train_and_eval_compute_the_same() -> None:
    module, x = block(), whole(1, 2, 6, 6)
    trained = module.train()(x)
    evaluated = module.eval()(x)
    assert torch.equal(trained, evaluated)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            result = module(x)
        assert torch.equal(result, trained) and not result.requires_grad


def test_channels_last_modules_and_inputs() -> None:
    x = whole(2, 2, 6, 6)
    expected = gradients(block(), x)
    for of_module, of_input in itertools.product((torch.contiguous_format, LAST), repeat=2):
        module = block().to(memory_format=of_module)
        results = gradients(module, x.contiguous(memory_format=of_input))
        last = LAST in (of_module, of_input)
        assert results[0].is_contiguous(memory_format=LAST if last else torch.contiguous_format)
        for result, theirs in zip(results, expected, strict=True):
            assert torch.equal(result, theirs)


def test_a_module_in_float64_goes_to_torch() -> None:
    module, x = block().double(), whole(1, 2, 6, 6).double()
    conv = F.conv2d(x, module.weight, module.bias, padding=1)
    assert torch.equal(module(x), F.max_pool2d(F.relu(conv), 2))


# ---------------------------------------------------------------------------------- autograd


PARTS = ("input", "weight", "bias")
FROZEN = [some for n in (1, 2, 3) for some in itertools.combinations(PARTS, n)]


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_frozen_parts(frozen: tuple[str, ...]) -> None:
    """Those that ask for gradients get the same ones, the others none."""
    x = whole(2, 2, 6, 6)
    whole_result = dict(zip(("y", *PARTS), gradients(block(), x), strict=True))
    module, leaf = block(), x.clone().requires_grad_()
    parts = dict(zip(PARTS, (leaf, module.weight, module.bias), strict=True))
    for name in frozen:
        parts[name].requires_grad_(False)
    y = module(leaf)
    assert y.requires_grad == (len(frozen) < 3)
    if y.requires_grad:
        y.backward(whole(*y.shape, seed=9))
    for name, part in parts.items():
        if name in frozen:
            assert part.grad is None
        else:
            assert torch.equal(part.grad, whole_result[name])


def shared(library: Any) -> list[Tensor]:
    """One weight in two places of a network, its gradients accumulated over two batches."""
    conv = rounded(library.Conv2d(3, 3, 3, padding=1))
    for seed in (0, 1):
        x = whole(1, 3, 5, 5, seed=seed)
        conv(conv(x)).sum().backward()
    return [conv.weight.grad, conv.bias.grad]


def test_shared_weights_and_accumulated_gradients() -> None:
    for mine, theirs in zip(shared(ours), shared(nn), strict=True):
        assert torch.equal(mine, theirs)


def test_a_graph_used_twice() -> None:
    module, x = block(), whole(1, 2, 6, 6).requires_grad_()
    y = module(x)
    first = torch.autograd.grad(y.sum(), (x, module.weight), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, module.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), x)


def test_two_forwards_before_a_backward() -> None:
    """Each keeps what its own backward pass needs."""
    module, xs = block(), [whole(1, 2, 6, 6, seed=s) for s in (0, 1)]
    expected = [gradients(module, x)[1] for x in xs]
    leaves = [x.clone().requires_grad_() for x in xs]
    results = [module(leaf) for leaf in leaves]
    for y in reversed(results):
        y.backward(whole(*y.shape, seed=9))
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def views(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in memory of every shape."""
    n, c, h, w = x.shape
    room = torch.zeros(n + 1, c + 2, h + 3, 2 * w + 1)
    room[1:, 1 : c + 1, 2 : h + 2, 1 : 2 * w : 2] = x
    flat = torch.zeros(x.numel() + 1)
    flat[1:] = x.flatten()
    return {
        "sliced": room[1:, 1 : c + 1, 2 : h + 2, 1 : 2 * w : 2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "moved by one": flat[1:].view(x.shape),
        "flipped twice": x.flip(3).flip(3),
        "channels_last": x.contiguous(memory_format=LAST),
    }


@pytest.mark.parametrize("name", views(whole(1, 1, 1, 1)))
def test_inputs_and_weights_of_any_strides(name: str) -> None:
    x, mine, theirs = whole(2, 4, 6, 7), *twins("Conv2d", 4, 5, 3)
    expected = gradients(theirs, x)
    leaf = views(x)[name].requires_grad_()
    y = mine(leaf)
    y.backward(views(whole(*y.shape, seed=9))[name])
    assert torch.equal(y, expected[0]) and torch.equal(leaf.grad, expected[1])
    for p, gradient in zip(mine.parameters(), expected[2:], strict=True):
        assert torch.equal(p.grad, gradient)
    weight = views(theirs.weight.detach())[name].requires_grad_()
    y = ours.F.conv2d(x, weight, theirs.bias)
    y.backward(whole(*y.shape, seed=9))
    assert torch.equal(y, expected[0]) and torch.equal(weight.grad, expected[2])


def test_expanded_inputs_and_gradients() -> None:
    mine, theirs = twins("Conv2d", 4, 5, 3)
    one = whole(1, 1, 6, 6)
    for module in (mine, theirs):
        leaf = one.clone().requires_grad_()
        y = module(leaf.expand(3, 4, 6, 6))
        y.sum().backward()  # its gradient is one number, expanded
        module.kept = [y.detach(), leaf.grad, module.weight.grad, module.bias.grad]
    assert all(torch.equal(a, b) for a, b in zip(mine.kept, theirs.kept, strict=True))
    pools = []
    for pool in (ours.MaxPool2d(2), nn.MaxPool2d(2)):
        leaf = whole(2, 3, 6, 6).requires_grad_()
        pool(leaf).sum().backward()
        pools.append(leaf.grad)
    assert torch.equal(*pools)


MODULES = {
    "conv2d": (lambda lib: rounded(lib.Conv2d(2, 3, 3)), "the input"),
    "max pool": (lambda lib: lib.MaxPool2d(2), "the input"),
    "weights": (lambda lib: rounded(lib.Conv2d(2, 3, 3)), "the weight"),
}


@pytest.mark.parametrize("library", [ours, nn], ids=["neocog", "torch"])
@pytest.mark.parametrize("name", MODULES)
def test_what_changed_after_the_forward_pass_is_noticed(library: Any, name: str) -> None:
    make, what = MODULES[name]
    module, x = make(library), whole(1, 2, 6, 6).requires_grad_() * 1
    y = module(x)
    with torch.no_grad():
        (x if what == "the input" else module.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_changed_result_of_an_activation_is_noticed() -> None:
    """Its derivative is told from the result."""
    y = block()(whole(1, 2, 6, 6))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
